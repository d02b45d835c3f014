"""The opponent on vLLM servers: rows spread over all healthy servers, weights verified, failures retried.

A server may die, restart or hang at any time. Its weight version is checked before and after each batch of rows, so
rows that a restarted server generated with its initial weights are discarded and generated again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sapo.errors import ConfigurationError, GenerationError
from sapo.generation.protocol import Weights, check_request
from sapo.generation.sampling import Sampling
from sapo.generation.vllm.client import ADAPTER, CONNECTIONS, ServerUnavailableError, VLLMClient
from sapo.generation.vllm.limits import check_temperature
from sapo.generation.vllm.weight_stream import RECEIVER

logger = logging.get_logger(__name__)

SERVER_TIMEOUT = 240.0
"""Seconds to wait for an unavailable server, unless a run says otherwise."""

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 10.0
"""Seconds before the first and between later retries; doubled each time."""

_ATTEMPTS = 6
"""Maximum attempts per row on servers that report healthy."""

_STARTED_WITH = "default"
"""vLLM's tag of its initial weights."""

_TOKENS_AT_A_TIME = 4096


class VLLMServers:
    """An `Engine` of one or several vLLM servers.

    Args:
        urls: one per server.
        sampling: how the next token is drawn; greedy is exact, sampling has the same distribution as other backends.
        eos_ids: EOS tokens.
        vocabulary_size: upper bound of token ids, exclusive.
        stream: send weights as tensors instead of folders; the servers must be started for it.
        adapter: whether the weights are an adapter for the servers' base model.
        loads: whether this process loads the weights; the others wait for it.
        timeout: total seconds to wait for an unavailable server.
        request_timeout: seconds until a request is aborted and retried.
        sleep: waits between two attempts.

    Raises:
        ConfigurationError: no server, a duplicate, or an unsupported temperature.
    """

    def __init__(
        self,
        urls: Sequence[str],
        sampling: Sampling,
        *,
        eos_ids: Collection[int],
        vocabulary_size: int,
        stream: bool = False,
        adapter: bool = False,
        loads: bool = True,
        timeout: float = SERVER_TIMEOUT,
        request_timeout: float = 300.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        check_temperature(sampling)
        clients = [VLLMClient(url, request_timeout) for url in urls]
        addresses = [client.url for client in clients]
        if not clients or len(set(addresses)) < len(addresses):
            raise ConfigurationError(f"vllm_server_url={' '.join(addresses)}: duplicate server. Remove one.")
        for url in addresses:
            if not url.startswith(("http://", "https://")):
                raise ConfigurationError(f"vllm_server_url={url}: must begin with http:// or https://.")
        self._clients = clients
        self._sampling = sampling
        self._end_ids = frozenset(eos_ids)
        self._vocabulary_size = vocabulary_size
        self._stream = stream
        self._adapter = adapter
        self._loads = loads
        self._timeout = timeout
        self._sleep = sleep
        self._names: dict[str, str] = {}
        self._lengths: dict[str, int] = {}
        self._loaded: tuple[Weights, str] | None = None
        self._lost: set[str] = set()
        self._closed = False
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="vllm")

    # ---- Before the run ----

    def check(self, tokenizer: Any, max_length: int, model_config: Any = None) -> None:
        """Check that every server is available and serves a model with this tokenizer and a sufficient max_length.

        Args:
            tokenizer: the policy's tokenizer.
            max_length: maximum tokens of prompt plus response.
            model_config: the policy's configuration, to check that new weights can be loaded; unused for adapters.
        """
        for client in self._clients:
            self._retry(client, self._handshake)
            if self._lengths[client.url] < max_length:
                raise ConfigurationError(
                    f"{client.url} serves at most {self._lengths[client.url]} tokens, and max_length={max_length}. "
                    f"Start it with --max-model-len {max_length}, or lower max_length."
                )
            self._retry(client, lambda client: self._compare_tokenizer(client, tokenizer))
            if self._stream and not self._retry(client, VLLMClient.takes_streams):
                raise ConfigurationError(
                    f"{client.url} does not accept streamed weights. Start it with sapo serve, or with "
                    f"--worker-extension-cls {RECEIVER}; or remove vllm_weights_transfer."
                )
            # For these, vLLM 0.32 on a CPU keeps using some old weights after new ones are loaded.
            text = None if model_config is None or self._adapter else model_config.get_text_config()
            stale = text is not None and (text.tie_word_embeddings or "num_experts" in str(text.to_dict()))
            if stale and self._retry(client, VLLMClient.is_on_cpu):
                raise ConfigurationError(
                    f"{client.url} runs on a CPU, where vLLM does not apply all new weights of a model with "
                    "tied embeddings or experts. Train an adapter with --use_peft, or remove generation_backend."
                )

    def token_logps(self, tokens: Sequence[int]) -> list[list[float]]:
        """Each server's log-probabilities in nats of `tokens`, from the second on, under the latest weights."""

        def ask(client: VLLMClient) -> list[float]:
            trouble: list[str] = []
            if not self._is_ready(client, trouble):
                raise ServerUnavailableError(trouble[0])
            found = client.token_logps(tokens, self._model(client))
            if not self._still_serves(client):
                raise ServerUnavailableError(f"{client.url} was restarted")
            return found

        return [self._retry(client, ask) for client in self._clients]

    @property
    def urls(self) -> list[str]:
        """Addresses of the servers."""
        return [client.url for client in self._clients]

    def _handshake(self, client: VLLMClient) -> None:
        served = client.served_model()
        self._names[client.url], self._lengths[client.url] = served.name, served.max_length

    def _compare_tokenizer(self, client: VLLMClient, tokenizer: Any) -> None:
        first, size = 0, len(tokenizer)
        step = _TOKENS_AT_A_TIME
        while first < size:
            ids = list(range(first, min(first + step, size)))
            if client.texts(ids, self._names[client.url]) == tokenizer.decode(ids):
                first, step = first + step, _TOKENS_AT_A_TIME
            elif len(ids) > 1:
                # Find the differing token among these.
                step = max(1, len(ids) // 2)
            else:
                there = client.texts(ids, self._names[client.url])
                raise ConfigurationError(
                    f"{client.url} has another tokenizer: token {first} is {there!r} there and "
                    f"{tokenizer.decode(ids)!r} in processing_class. Serve the model that is trained."
                )

    # ---- Weights ----

    def load(self, weights: Weights, version: str) -> None:
        """Serve `weights`; see `Engine.load`. An unavailable server gets them when it is back."""
        if self._closed:
            self._closed, self._pool = False, ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="vllm")
            for client in self._clients:
                client.open()
        self._loaded = (weights.resolve() if isinstance(weights, Path) else weights, version)
        self._servers()

    def _servers(self) -> list[VLLMClient]:
        """All healthy servers with the latest weights, at least one; a `GenerationError` if none is in time."""
        if self._loaded is None:
            raise GenerationError("no weights have been loaded into the vLLM servers yet")
        until, wait = time.monotonic() + self._timeout, _FIRST_WAIT
        while True:
            trouble: list[str] = []
            ready = [client for client in self._clients if self._is_ready(client, trouble)]
            if ready:
                return ready
            if self._closed or time.monotonic() >= until:
                raise GenerationError(
                    f"{trouble[0]}; waited {self._timeout:g} s. Start vLLM again (sapo serve --config recipe.yaml) and "
                    "continue with --resume_from_checkpoint true, or raise vllm_server_timeout."
                )
            self._sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _is_ready(self, client: VLLMClient, trouble: list[str]) -> bool:
        assert self._loaded is not None
        weights, version = self._loaded
        try:
            served = client.weight_version()
            if served != version and self._loads:
                if client.url in self._lost:
                    # It may have come back with another model.
                    self._handshake(client)
                client.load(weights, version)
                served = client.weight_version()
                if client.url in self._lost:
                    logger.warning(f"{client.url} is back; the opponent's weights were loaded again.")
            if served != version:
                trouble.append(f"{client.url} serves weights {served}, not {version}")
                return False
            if client.url not in self._names:
                self._handshake(client)
        except ServerUnavailableError as error:
            self._mark_unavailable(client, error)
            trouble.append(str(error))
            return False
        self._lost.discard(client.url)
        return True

    def _mark_unavailable(self, client: VLLMClient, error: Exception) -> None:
        if client.url not in self._lost:
            self._lost.add(client.url)
            logger.warning(f"A vLLM server does not respond and is retried: {error}.")

    def _model(self, client: VLLMClient) -> str:
        return ADAPTER if self._adapter else self._names[client.url]

    # ---- Text ----

    def generate(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Continue each context; see `Generator.generate`."""
        check_request(contexts, max_new_tokens, seeds)
        replies: list[list[int]] = [[] for _ in contexts]
        missing = [row for row, budget in enumerate(max_new_tokens) if budget > 0]
        attempts, trouble = 0, [""]
        while missing:
            servers = self._servers()
            attempts += 1
            if attempts > _ATTEMPTS:
                raise GenerationError(
                    f"{len(missing)} rows failed after {_ATTEMPTS} attempts although the servers report healthy "
                    f"(last: {trouble[-1]}). Raise vllm_request_timeout, or check the servers' logs."
                )
            self._check_lengths(servers, missing, contexts, max_new_tokens)
            found = self._ask(servers, missing, contexts, max_new_tokens, seeds, trouble)
            for row, tokens in found.items():
                replies[row] = tokens
            missing = [row for row in missing if row not in found]
        return replies

    def _ask(
        self,
        servers: list[VLLMClient],
        rows: list[int],
        contexts: Sequence[Sequence[int]],
        budgets: Sequence[int],
        seeds: Sequence[int],
        trouble: list[str],
    ) -> dict[int, list[int]]:
        """Replies to `rows`, divided among the servers; without rows of servers that restarted or failed.

        What failed is appended to `trouble`.
        """

        def one(client: VLLMClient, row: int) -> list[int] | ServerUnavailableError:
            try:
                return client.continue_row(
                    contexts[row],
                    budgets[row],
                    seeds[row],
                    model=self._model(client),
                    sampling=self._sampling,
                    eos_ids=self._end_ids,
                )
            except ServerUnavailableError as error:
                return error

        shares = {client.url: rows[place :: len(servers)] for place, client in enumerate(servers)}
        asked = {
            client.url: [(row, self._pool.submit(one, client, row)) for row in shares[client.url]] for client in servers
        }
        found: dict[int, list[int]] = {}
        for client in servers:
            own = {}
            for row, future in asked[client.url]:
                tokens = future.result()
                if isinstance(tokens, ServerUnavailableError):
                    trouble.append(str(tokens))
                    self._mark_unavailable(client, tokens)
                else:
                    self._check_tokens(client, tokens)
                    own[row] = tokens
            if self._still_serves(client):
                found |= own
        return found

    def _still_serves(self, client: VLLMClient) -> bool:
        assert self._loaded is not None
        try:
            served = client.weight_version()
        except ServerUnavailableError as error:
            self._mark_unavailable(client, error)
            return False
        if served == self._loaded[1]:
            return True
        if served == _STARTED_WITH:
            self._mark_unavailable(client, GenerationError(f"{client.url} was restarted; its output is discarded"))
            return False
        raise GenerationError(
            f"{client.url} serves weights {served}, which this run did not load. Does another run use it? Use "
            "separate servers for each run."
        )

    def _check_tokens(self, client: VLLMClient, tokens: Sequence[int]) -> None:
        if any(not 0 <= token < self._vocabulary_size for token in tokens):
            raise GenerationError(
                f"{client.url}: it generated tokens outside the policy's vocabulary ({max(tokens)} of "
                f"{self._vocabulary_size}). Serve the model that is trained."
            )

    def _check_lengths(
        self,
        servers: list[VLLMClient],
        rows: list[int],
        contexts: Sequence[Sequence[int]],
        budgets: Sequence[int],
    ) -> None:
        shortest = min(self._lengths[client.url] for client in servers)
        for row in rows:
            if len(contexts[row]) + budgets[row] > shortest:
                raise ConfigurationError(
                    f"row {row}: {len(contexts[row])} tokens and {budgets[row]} new ones exceed the {shortest} that "
                    f"the vLLM servers accept. Start them with --max-model-len {len(contexts[row]) + budgets[row]}."
                )

    def close(self) -> None:
        """Close all connections, even during requests; the servers keep running."""
        self._closed, self._loaded = True, None
        for client in self._clients:
            client.close()
        self._pool.shutdown(cancel_futures=True)

    def _retry(self, client: VLLMClient, do: Callable[[VLLMClient], Any]) -> Any:
        """Call `do` with a server; retry while it does not respond, until the timeout."""
        until, wait = time.monotonic() + self._timeout, _FIRST_WAIT
        while True:
            try:
                return do(client)
            except ServerUnavailableError as error:
                if time.monotonic() >= until:
                    raise GenerationError(
                        f"{error}: no vLLM server responds there after {self._timeout:g} s. Start one with sapo serve "
                        "--config recipe.yaml, or set vllm_server_url."
                    ) from error
                self._mark_unavailable(client, error)
            self._sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
