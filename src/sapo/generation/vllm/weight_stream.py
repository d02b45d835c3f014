"""The training side of a socket to vLLM's workers: sends a full model's weights one at a time (see `worker`)."""

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
"""Value of vLLM's `--worker-extension-cls`."""

_KEY_BYTES = 16
_PATIENCE = 0.2


def send_weights(
    weights: Mapping[str, Tensor], url: str, workers: int, ask: Callable[[dict[str, Any]], Any], timeout: float
) -> None:
    """Send `weights`, which are in main memory, to each of a server's `workers`; an `OSError` if one disconnects.

    Args:
        weights: by their names in a checkpoint; each model-parallel process receives all and keeps its shard.
        url: of the server; workers connect back to the local address that reaches it.
        workers: number of these processes.
        ask: makes the server call `WeightReceiver.sapo_receive` with these arguments; returns when it is done.
        timeout: seconds without data after which a worker is considered failed.
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
        # First, because the server's error is the most specific.
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
    """This machine's address on the route to `url`; sends nothing."""
    address = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address.hostname or "127.0.0.1", address.port or 80))
        host: str = probe.getsockname()[0]
    return host
