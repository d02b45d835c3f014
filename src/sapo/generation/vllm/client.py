"""HTTP client of one vLLM server: model, weights and completions.

Requires the endpoints of vLLM 0.30 or newer started with `VLLM_SERVER_DEV_MODE=1` (and with
`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` for adapters), as `sapo serve` does. Nothing is retried here; the caller decides.
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
from sapo.generation.vllm.limits import completion_options
from sapo.generation.vllm.weight_stream import RECEIVER, send_weights

ADAPTER = "sapo-opponent"
"""Name of the opponent's adapter on the servers."""

CONNECTIONS = 256
"""Maximum concurrent requests to one server, which forms its own batches."""


class ServerUnavailableError(Exception):
    """The server did not respond in time or reported a transient error: retry, or use another server."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The name of a server's base model in requests, and the maximum tokens of context plus continuation."""

    name: str
    max_length: int


class VLLMClient:
    """Requests to one server.

    Each raises `ServerUnavailableError` where the server does not respond in time, and `GenerationError` where what it
    returns is invalid. The environment variable `VLLM_API_KEY` is sent if set, and never shown.

    Args:
        url: such as `http://127.0.0.1:8000`; a trailing `/v1` is not needed.
        timeout: request timeout in seconds.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self.open()

    def open(self) -> None:
        """Create the connection pool, also after `close`."""
        key = os.environ.get("VLLM_API_KEY")
        self._http = httpx2.Client(
            base_url=self.url,
            timeout=httpx2.Timeout(self._timeout, connect=min(self._timeout, 10.0)),
            limits=httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # Proxies from the environment are for the internet; your own server is reached directly.
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections; pending requests fail."""
        self._http.close()

    def served_model(self) -> ServedModel:
        """The base model."""
        listed = self._call("GET", "/v1/models").get("data")
        for model in listed if isinstance(listed, list) else ():
            if isinstance(model, dict) and not model.get("parent") and isinstance(model.get("max_model_len"), int):
                return ServedModel(str(model["id"]), model["max_model_len"])
        raise GenerationError(f"{self.url}: lists no model with its length. Is this a vLLM server?")

    def weight_version(self) -> str:
        """The version tag of its weights, "default" for those it was started with."""
        return str(self._call("GET", "/weight_info").get("weight_version"))

    def is_on_cpu(self) -> bool:
        """Whether it computes on a CPU."""
        return "device_config=cpu" in str(self._call("GET", "/server_info"))

    def takes_streams(self) -> bool:
        """Whether it was started with the weight receiver."""
        return RECEIVER in str(self._call("GET", "/server_info?config_format=json"))

    def load(self, weights: Weights, version: str) -> None:
        """Load `weights` (see `Engine.load`), reset the prefix cache, and tag them `version`."""
        # From the first changed weight on, the earlier tag would be wrong.
        loading = f"loading {version}"
        self._tag(loading)
        if isinstance(weights, Mapping):
            self._send(weights)
        elif (weights / "adapter_config.json").is_file():
            adapter = {"lora_name": ADAPTER, "lora_path": str(weights), "load_inplace": True}
            self._call("POST", "/v1/load_lora_adapter", adapter)
        else:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}}
            self._call("POST", "/collective_rpc", reload)
        # Otherwise cached keys and values of the earlier weights would be reused silently.
        if self._call("POST", "/reset_prefix_cache").get("success") is False:
            raise ServerUnavailableError(f"{self.url}: could not reset its prefix cache")
        # Restarted since, it has its own weights again.
        if self.weight_version() != loading:
            raise ServerUnavailableError(f"{self.url}: it was restarted while it loaded weights")
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
        """Decode `tokens` with the server's tokenizer."""
        return str(self._call("POST", "/detokenize", {"model": model, "tokens": list(tokens)}).get("prompt"))

    def token_logps(self, tokens: Sequence[int], model: str) -> list[float]:
        """Log-probability in nats of each of `tokens` given the previous ones, from the second on."""
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
                f"{self.url}: returns no log-probabilities of a prompt. Is this a vLLM server?"
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
        """The tokens after `context`, at most `budget`, up to and including the first of `eos_ids`."""
        answer = self._call(
            "POST",
            "/v1/completions",
            {
                "model": model,
                "prompt": list(context),
                **completion_options(sampling, budget, seed, eos_ids),
                "skip_special_tokens": False,
                "return_token_ids": True,
            },
        )
        try:
            choice = answer["choices"][0]
            tokens, seen, reason = choice["token_ids"], choice["prompt_token_ids"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError) as error:
            raise GenerationError(f"{self.url}: a response without token ids. Use vLLM 0.30 or newer.") from error
        if seen != list(context):
            raise GenerationError(
                f"{self.url}: it used {len(seen or ())} of {len(context)} context tokens. Start it without "
                "prompt truncation."
            )
        if reason == "abort":
            raise ServerUnavailableError(f"{self.url}: it aborted a request")
        check_reply(self.url, tokens, budget, eos_ids)
        return list(tokens)

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON object of a response; {} without one."""
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
                f"{self.url}: has no {path}, so the opponent's weights cannot be loaded. Use vLLM 0.30 or newer, and "
                "start it with sapo serve, or with VLLM_SERVER_DEV_MODE=1 and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
            )
        if answer.status_code == 404 and path == "/v1/completions":
            # It listed this model, or loaded this adapter, so it was restarted since.
            raise ServerUnavailableError(f"{self.url}{path}: 404 {_message(answer)}")
        if answer.is_error:
            raise GenerationError(f"{self.url}{path}: {answer.status_code} {_message(answer)}")
        try:
            content = answer.json() if answer.content else {}
        except ValueError:
            content = {}
        return content if isinstance(content, dict) else {}


def check_reply(who: str, tokens: Any, budget: int, eos_ids: Collection[int]) -> None:
    """Refuse a reply that violates the contract of `Generator`; the caller checks for tokens outside the vocabulary."""
    if not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise GenerationError(f"{who}: its response contains no token ids.")
    ended = bool(tokens) and tokens[-1] in eos_ids
    if len(tokens) > budget or (len(tokens) < budget and not ended):
        raise GenerationError(
            f"{who}: it generated {len(tokens)} of {budget} tokens and no EOS token. Start it with a "
            "larger --max-model-len and with --generation-config vllm."
        )
    if any(token in eos_ids for token in tokens[:-1]):
        raise GenerationError(f"{who}: it generated tokens after an EOS token. Does a proxy drop stop_token_ids?")


def _message(answer: httpx2.Response) -> str:
    try:
        content = answer.json()
    except ValueError:
        return brief(answer.text, 300)
    found = content.get("error", content.get("detail", content)) if isinstance(content, dict) else content
    return brief(found.get("message", found) if isinstance(found, dict) else found, 300)
