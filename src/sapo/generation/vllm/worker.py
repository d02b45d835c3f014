"""Runs inside vLLM's workers: receives new weights from a socket, one at a time, without a shared folder.

`sapo serve` starts vLLM with `--worker-extension-cls sapo.generation.vllm.worker.WeightReceiver` when weights are
streamed. Imports nothing of this package, because vLLM's environment may lack its other requirements.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch

SECONDS = 300.0
"""Timeout in seconds without data."""


class WeightReceiver:
    """Methods that vLLM adds to its worker class."""

    model_runner: Any

    def sapo_receive(self, host: str, port: int, key: str, weights: str) -> None:
        """Receive and load a full model's weights from the process that listens at `host` and `port`.

        Args:
            host: of the training process.
            port: of it.
            key: shared secret, sent first; hexadecimal.
            weights: JSON list of (name, dtype, shape) in order of arrival.
        """
        with socket.create_connection((host, int(port)), timeout=SECONDS) as line:
            line.sendall(bytes.fromhex(key))
            self.model_runner.reload_weights(weights_iterator=receive(line, json.loads(weights)))


def receive(
    line: socket.socket, weights: Sequence[tuple[str, str, Sequence[int]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors listed in `weights` as their bytes arrive."""
    for name, dtype, shape in weights:
        tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        # A new tensor is contiguous, so this view covers its bytes.
        room = memoryview(tensor.view(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")
        while room:
            taken = line.recv_into(room)
            if taken == 0:
                raise ConnectionError(f"the connection closed in {name}")
            room = room[taken:]
        yield name, tensor
