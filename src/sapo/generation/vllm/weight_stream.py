"""The training's end of a line to vLLM's workers: weights of a whole model go out, one at a time (`vllm_receiver`)."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

RECEIVER = "sapo.generation.vllm.worker.WeightReceiver"
"""What vLLM's `--worker-extension-cls` must be."""

_KEY_BYTES = 16
_PATIENCE = 0.2


def send_weights(
    weights: Mapping[str, Tensor], url: str, workers: int, ask: Callable[[dict[str, Any]], Any], timeout: float
) -> None:
    """Let the workers of a server fetch `weights`.

    Args:
        weights: in main memory, under the names of a checkpoint.
        url: of the server: the workers reach this machine by the way by which it reaches them.
        workers: processes among which the server has divided its model; each takes all weights and keeps its part.
        ask: tells the server to fetch them, given the arguments of `WeightReceiver.sapo_receive`; returns when it has.
        timeout: seconds of silence after which a worker is given up.

    Raises:
        OSError: a worker went away.
    """
    key = secrets.token_bytes(_KEY_BYTES)
    listed = [(name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in weights.items()]
    host = _own_address(url)
    with socket.create_server((host, 0)) as listener, ThreadPoolExecutor(workers + 1) as pool:
        listener.settimeout(_PATIENCE)
        where = {"host": host, "port": listener.getsockname()[1], "key": key.hex(), "weights": json.dumps(listed)}
        asked = pool.submit(ask, where)
        lines: list[Future[None]] = []
        while len(lines) < workers and not asked.done():
            try:
                line, _ = listener.accept()
            except TimeoutError:
                continue
            line.settimeout(timeout)
            if _has_key(line, key):
                lines.append(pool.submit(_send, line, weights))
            else:
                line.close()
        # The server knows best what went wrong, if anything did.
        asked.result()
        for sent in lines:
            sent.result()


def _send(line: socket.socket, weights: Mapping[str, Tensor]) -> None:
    with line:
        for weight in weights.values():
            if weight.numel():
                line.sendall(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def _has_key(line: socket.socket, key: bytes) -> bool:
    given = b""
    while len(given) < len(key) and (more := line.recv(len(key) - len(given))):
        given += more
    return hmac.compare_digest(given, key)


def _own_address(url: str) -> str:
    """The address of this machine on the way to `url`; nothing is sent."""
    address = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address.hostname or "127.0.0.1", address.port or 80))
        host: str = probe.getsockname()[0]
    return host
