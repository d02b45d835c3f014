"""Weights stored input by input while a processor decodes.

A product of few rows with a float32 weight that is stored output by output, as PyTorch does, reads it slower than
memory allows: at 8 rows the linear layers of a 135M Llama take 1.4 times, at 64 rows 1.3 times as long as with the
same weights stored the other way round (`benchmarks/generation.py`). In bfloat16 there is no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LEAST_BYTES = 64 * 2**20
"""Smaller weights stay in the processor's cache, where the order does not matter."""
_LEAST_ROWS, _LEAST_TOKENS = 4, 64
"""Turning all weights round and back takes as long as it saves in 20 to 45 tokens."""


@contextmanager
def stored_by_input(model: nn.Module, rows: int, tokens: int) -> Iterator[None]:
    """Store the linear layers' weights input by input, where `tokens` steps of `rows` rows get faster by it.

    No value changes, nor does the memory that a weight lies in; one weight at a time is copied. Afterwards all is as
    it was. Sums are formed in another order, so that logits differ by rounding (bit-equal from 16 rows on).
    """
    weights = _float32_weights(model) if rows >= _LEAST_ROWS and tokens >= _LEAST_TOKENS else []
    turned: list[tuple[Tensor, Tensor]] = []
    if sum(weight.nbytes for weight in weights) >= _LEAST_BYTES:
        turned = [(weight, weight.data) for weight in weights]
    try:
        # At each line a weight holds the right values, whatever the memory that it had holds just then.
        for weight, original in turned:
            weight.data = original.t().contiguous().t()
            original.view(-1).copy_(weight.data.t().reshape(-1))
            weight.data = original.view(original.shape[::-1]).t()
        yield
    finally:
        for weight, original in turned:
            weight.data = weight.data.contiguous()
            original.copy_(weight.data)
            weight.data = original


def _float32_weights(model: nn.Module) -> list[Tensor]:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch._C.has_mkl:
        return []  # measured there only
    weights = {id(module.weight): module.weight for module in model.modules() if type(module) is nn.Linear}
    return [
        weight
        for weight in weights.values()
        if type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
    ]
