"""Runs inside vLLM's workers: takes new weights from a socket, one at a time, without a folder that both sides see.

`sapo serve` starts vLLM with `--worker-extension-cls sapo.generation.vllm.worker.WeightReceiver` where it is asked for.
Imports nothing of this package, because vLLM may live in an environment that has not its other requirements.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch

SECONDS = 300.0
"""Longest silence of the other side."""


class WeightReceiver:
    """Methods that vLLM adds to its worker class."""

    model_runner: Any

    def sapo_receive(self, host: str, port: int, key: str, weights: str) -> None:
        """Take over a whole model.

        Args:
            host: where the training listens.
            port: likewise.
            key: sent first, so that nobody else is given the weights; hexadecimal.
            weights: JSON list of (name, dtype, shape) in the order in which they come.

        Raises:
            OSError: the training went away.
        """
        with socket.create_connection((host, int(port)), timeout=SECONDS) as line:
            line.sendall(bytes.fromhex(key))
            self.model_runner.reload_weights(weights_iterator=receive(line, json.loads(weights)))


def receive(
    line: socket.socket, weights: Sequence[tuple[str, str, Sequence[int]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `weights` lists, as their bytes arrive.

    Raises:
        ConnectionError: the line ended before the last of them.
    """
    for name, dtype, shape in weights:
        tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        # A new tensor is contiguous: its bytes are these.
        room = memoryview(tensor.view(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")
        while room:
            taken = line.recv_into(room)
            if taken == 0:
                raise ConnectionError(f"the line ended in {name}")
            room = room[taken:]
        yield name, tensor
