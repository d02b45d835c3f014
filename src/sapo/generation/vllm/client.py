"""One vLLM server, spoken to over HTTP: its model, its weights, its completions.

Needs the endpoints that vLLM 0.30 or newer has when it is started with `VLLM_SERVER_DEV_MODE=1` (and with
`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` for adapters), as `sapo serve` does. Nothing here tries twice: whoever asks
decides about that.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
from torch import Tensor

from sapo.errors import GenerationError, brief
from sapo.generation.protocol import Weights
from sapo.generation.sampling import Sampling
from sapo.generation.vllm.weight_stream import RECEIVER, send_weights

ADAPTER = "sapo-opponent"
"""Name under which the servers know the opponent's adapter."""

CONNECTIONS = 256
"""Requests under way at once to one server; it forms its own batches of them."""


class ServerUnavailableError(Exception):
    """The server did not answer, or not in time, or has a trouble that may pass: ask again, or another one."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of itself.

    Attributes:
        name: of the base model, as requests must give it.
        max_length: most tokens of a context and its continuation together.
    """

    name: str
    max_length: int


class VLLMClient:
    """Requests to one server.

    Args:
        url: such as `http://127.0.0.1:8000`; a trailing `/v1` is not needed. The environment variable
            `VLLM_API_KEY` is sent along if it is set, and shown nowhere.
        timeout: seconds until a request is given up.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self.open()

    def open(self) -> None:
        """Be ready to connect, again after `close`."""
        key = os.environ.get("VLLM_API_KEY")
        self._http = httpx2.Client(
            base_url=self.url,
            timeout=httpx2.Timeout(self._timeout, connect=min(self._timeout, 10.0)),
            limits=httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # A proxy of the environment is for the internet; a server of one's own is reached directly.
            trust_env=False,
        )

    def close(self) -> None:
        """Close its connections; what waits for an answer is told that there is none."""
        self._http.close()

    def served_model(self) -> ServedModel:
        """The base model.

        Raises:
            ServerUnavailableError, GenerationError: it does not answer; it answers something else.
        """
        listed = self._call("GET", "/v1/models").get("data")
        for model in listed if isinstance(listed, list) else ():
            if isinstance(model, dict) and not model.get("parent") and isinstance(model.get("max_model_len"), int):
                return ServedModel(str(model["id"]), model["max_model_len"])
        raise GenerationError(f"{self.url}: lists no model with its length. Is this a vLLM server?")

    def weight_version(self) -> str:
        """The tag of the weights that it serves, "default" for those it was started with.

        Raises:
            ServerUnavailableError: it does not answer.
            GenerationError: it does not tell.
        """
        return str(self._call("GET", "/weight_info").get("weight_version"))

    def is_on_cpu(self) -> bool:
        """Whether it computes on a CPU.

        Raises:
            ServerUnavailableError, GenerationError: it does not answer; it does not tell.
        """
        return "device_config=cpu" in str(self._call("GET", "/server_info"))

    def takes_streams(self) -> bool:
        """Whether it was started so that weights can be sent to it.

        Raises:
            ServerUnavailableError, GenerationError: it does not answer; it does not tell.
        """
        return RECEIVER in str(self._call("GET", "/server_info?config_format=json"))

    def load(self, weights: Weights, version: str) -> None:
        """Make it serve `weights`, drop what it keeps of earlier ones, tag it `version`.

        Args:
            weights: a model folder or an adapter folder, or the weights of a whole model by name.
            version: of the weights.

        Raises:
            ServerUnavailableError: it does not answer.
            GenerationError: it cannot.
        """
        # So that nobody takes it for the earlier version once the first weight has changed.
        self._tag(f"loading {version}")
        if isinstance(weights, Mapping):
            self._send(weights)
        elif (weights / "adapter_config.json").is_file():
            adapter = {"lora_name": ADAPTER, "lora_path": str(weights), "load_inplace": True}
            self._call("POST", "/v1/load_lora_adapter", adapter)
        else:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}}
            self._call("POST", "/collective_rpc", reload)
        # Keys and values of the earlier weights would be used again, without a word.
        if self._call("POST", "/reset_prefix_cache").get("success") is False:
            raise ServerUnavailableError(f"{self.url}: cannot forget the keys and values of earlier weights yet")
        self._tag(version)

    def _send(self, weights: Mapping[str, Tensor]) -> None:
        workers = self._call("GET", "/get_world_size?include_dp=false").get("world_size")

        def ask(where: dict[str, Any]) -> None:
            self._call("POST", "/collective_rpc", {"method": "sapo_receive", "kwargs": where})

        try:
            send_weights(weights, self.url, int(workers or 1), ask, self._timeout)
        except OSError as error:
            raise ServerUnavailableError(f"{self.url}: {brief(error)}") from error

    def _tag(self, version: str) -> None:
        self._call("POST", "/update_weight_version", {"new_version": version})

    def texts(self, tokens: Sequence[int], model: str) -> str:
        """The text of `tokens` by its tokenizer.

        Raises:
            ServerUnavailableError, GenerationError: it does not answer; it has no tokenizer.
        """
        return str(self._call("POST", "/detokenize", {"model": model, "tokens": list(tokens)}).get("prompt"))

    def token_logps(self, tokens: Sequence[int], model: str) -> list[float]:
        """Log-probability in nats of each of `tokens` after those before it, from the second on.

        Raises:
            ServerUnavailableError, GenerationError: it does not answer; it answers something else.
        """
        asked = {
            "model": model,
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
        }
        try:
            given = self._call("POST", "/v1/completions", asked)["choices"][0]["prompt_logprobs"]
            return [float(at[str(token)]["logprob"]) for token, at in zip(tokens[1:], given[1:], strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise GenerationError(
                f"{self.url}: gives no log-probabilities of a prompt. Is this a vLLM server?"
            ) from error

    def continue_row(
        self,
        context: Sequence[int],
        budget: int,
        seed: int,
        *,
        model: str,
        sampling: Sampling,
        eos_ids: Collection[int],
    ) -> list[int]:
        """The tokens after `context`, at most `budget`, up to and including the first of `eos_ids`.

        Nothing of the server's own defaults (of the model's generation configuration) takes part.

        Raises:
            ServerUnavailableError: it does not answer.
            GenerationError: it cannot, or its answer breaks the rules of `Generator`.
        """
        answer = self._call(
            "POST",
            "/v1/completions",
            {
                "model": model,
                "prompt": list(context),
                "max_tokens": budget,
                "seed": seed,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "stop_token_ids": sorted(eos_ids),
                # Its own idea of an end token must not end a row: only ours does.
                "ignore_eos": True,
                "skip_special_tokens": False,
                "return_token_ids": True,
            },
        )
        try:
            choice = answer["choices"][0]
            tokens, seen, reason = choice["token_ids"], choice["prompt_token_ids"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError) as error:
            raise GenerationError(f"{self.url}: an answer without token ids. Use vLLM 0.30 or newer.") from error
        if seen != list(context):
            raise GenerationError(
                f"{self.url}: it continued {len(seen or ())} tokens of {len(context)} that were sent. Start it without "
                "truncation of prompts."
            )
        if reason == "abort":
            raise ServerUnavailableError(f"{self.url}: it gave up a request")
        check_reply(self.url, tokens, budget, eos_ids)
        return list(tokens)

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON object of an answer; {} where there is none."""
        try:
            answer = self._http.request(method, path, json=body)
        except (httpx2.HTTPError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not self._http.is_closed:
                raise
            raise ServerUnavailableError(f"{self.url}: {brief(error) or type(error).__name__}") from error
        if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
            raise ServerUnavailableError(f"{self.url}{path}: {answer.status_code} {_message(answer)}")
        if answer.status_code == 404 and path in (
            "/server_info",
            "/weight_info",
            "/collective_rpc",
            "/v1/load_lora_adapter",
        ):
            raise GenerationError(
                f"{self.url}: has no {path}, so it cannot be given the opponent's weights. Use vLLM 0.30 or newer, and "
                "start it with sapo serve, or with VLLM_SERVER_DEV_MODE=1 and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
            )
        if answer.is_error:
            raise GenerationError(f"{self.url}{path}: {answer.status_code} {_message(answer)}")
        try:
            content = answer.json() if answer.content else {}
        except ValueError:
            content = {}
        return content if isinstance(content, dict) else {}


def check_reply(who: str, tokens: Any, budget: int, eos_ids: Collection[int]) -> None:
    """Refuse a reply that breaks the rules of `Generator`; tokens unknown to the model are for the caller to find.

    Raises:
        GenerationError: not tokens, more or fewer than may be, or some after the end.
    """
    if not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise GenerationError(f"{who}: its answer holds no token ids.")
    ended = bool(tokens) and tokens[-1] in eos_ids
    if len(tokens) > budget or (len(tokens) < budget and not ended):
        raise GenerationError(
            f"{who}: it wrote {len(tokens)} tokens where {budget} were asked for, and no end token. Start it with a "
            "larger --max-model-len and with --generation-config vllm."
        )
    if any(token in eos_ids for token in tokens[:-1]):
        raise GenerationError(f"{who}: it wrote on after an end token. Is it a proxy that drops stop_token_ids?")


def _message(answer: httpx2.Response) -> str:
    try:
        content = answer.json()
    except ValueError:
        return brief(answer.text, 300)
    found = content.get("error", content.get("detail", content)) if isinstance(content, dict) else content
    return brief(found.get("message", found) if isinstance(found, dict) else found, 300)
