"""What a CUDA graph does to a step, on a CPU: its kernels are repeated on the same memory, and its Python is not."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item")
"""Operators with which the host waits for the device."""


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator.overloadpacket.__name__
        if name in WAITS:
            raise AssertionError(f"{name} waits for the device, which a capture forbids")
        outputs = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, outputs))
        return outputs


class Recorder:
    """A `Replay`: the first step is recorded as it runs, the others repeat the record."""

    made = 0
    repeated = 0

    def __init__(self):
        type(self).made += 1
        self._calls = None

    def __call__(self, step):
        if self._calls is None:
            with _Recording() as recording:
                step()
            self._calls = recording.calls
            return
        type(self).repeated += 1
        for operator, args, kwargs, outputs in self._calls:
            for old, new in zip(_tensors(outputs), _tensors(operator(*args, **kwargs)), strict=True):
                # Views and results in place are in that memory already.
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, tuple | list) else []
