"""How weights lie while they decode: input-major on a CPU, or in another dtype.

A float32 matrix product of few rows is slower with PyTorch's output-major weights than memory bandwidth allows: the
linear layers of a 135M Llama take 1.4 times as long at 8 rows, and 1.3 times at 64, as with transposed storage
(`benchmarks/generation.py`). In bfloat16 there is no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LEAST_BYTES = 64 * 2**20
"""Smaller weights fit into the CPU cache, where the order does not matter."""
_LEAST_ROWS, _LEAST_TOKENS = 4, 64
"""Transposing all weights twice costs as much as 20 to 45 tokens save."""


@contextmanager
def stored_by_input(model: nn.Module, rows: int, tokens: int) -> Iterator[None]:
    """Store the linear layers' weights input-major if that makes `tokens` steps of `rows` rows faster.

    Values and memory addresses of the weights do not change; one weight at a time is copied. The layout is restored
    afterwards. Sums are computed in another order, so logits differ by rounding (bit-identical from 16 rows on).
    """
    weights = _float32_weights(model) if rows >= _LEAST_ROWS and tokens >= _LEAST_TOKENS else []
    turned: list[tuple[Tensor, Tensor]] = []
    if sum(weight.nbytes for weight in weights) >= _LEAST_BYTES:
        turned = [(weight, weight.data) for weight in weights]
    try:
        # The weight has the right values at every line, even while its original memory is being overwritten.
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
        return []  # measured only with AVX-512 and MKL
    weights = {id(module.weight): module.weight for module in model.modules() if type(module) is nn.Linear}
    return [
        weight
        for weight in weights.values()
        if type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
    ]


@contextmanager
def weights_cast(weights: Iterable[nn.Parameter], dtype: torch.dtype | None) -> Iterator[None]:
    """Compute with those of `weights` that are float32 cast to `dtype`, and put them back; no gradients."""
    held = [(weight, weight.data) for weight in weights if weight.dtype == torch.float32]
    try:
        for weight, original in held:
            weight.data = original.to(dtype)
        yield
    finally:
        for weight, original in held:
            weight.data = original
