"""Rounding float32 masters to the bfloat16 weights that compute, so that steps far below a rounding error count.

A weight of 0.02 has neighbours 1.2e-4 away. To the nearest, a master that started at a bfloat16 number has to move half
of that before its weight moves at all: ten steps of 5e-6 left 15 % of what was gained in the weights of a model of
135 million parameters (docs/performance.md). Here each element has a threshold of its own, spread evenly and fixed for
good: masters a hundredth of the way on move a hundredth of their weights, by the whole way. Stochastic rounding draws
again at each step; here a weight changes only as its master does, and nothing has to be drawn or kept.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sapo.seeds import derive_seed

PERIOD = 65_521
"""Elements after which thresholds repeat; prime, so that columns of a matrix do not share theirs."""

_PERIODS_AT_ONCE = 16
"""On a GPU; a CPU takes one period, which its cache holds."""


@torch.no_grad()
def round_to(weight: Tensor, master: Tensor) -> None:
    """Write `master` to `weight`, which has its shape; to bfloat16 by the thresholds, to other types as torch does.

    With t(i) in 0 to 65535 the threshold of flat index i, the last 16 of the 32 bits of `master[i]` are dropped after
    t(i) has been added to them: a magnitude between two bfloat16 numbers goes to the larger one for as many thresholds
    as it is far from the smaller. What bfloat16 can hold stays as it is; infinities and NaN stay what they are.
    """
    if weight.dtype != torch.bfloat16 or master.dtype != torch.float32:
        weight.copy_(master)
        return
    flat = master.reshape(-1)
    target = weight.view(-1) if weight.is_contiguous() else torch.empty_like(flat, dtype=weight.dtype)
    table = _thresholds(master.device)
    for begin in range(0, flat.numel(), table.numel()):
        part = flat[begin : begin + table.numel()]
        kept = (part.view(torch.int32) + table[: part.numel()]).bitwise_and_(-65536).view(torch.float32)
        # Dropping bits could make a NaN an infinity.
        target[begin : begin + table.numel()].copy_(torch.where(part.isnan(), part, kept))
    if not weight.is_contiguous():
        weight.copy_(target.view(weight.shape))


def rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """What `round_to` makes of `master` in a weight of `dtype`; `master` itself where that is its own."""
    if master.dtype == dtype:
        return master
    weight = torch.empty_like(master, dtype=dtype)
    round_to(weight, master)
    return weight


@lru_cache(maxsize=4)
def _thresholds(device: torch.device) -> Tensor:
    drawn = torch.Generator().manual_seed(derive_seed("bfloat16 thresholds"))
    table = torch.randint(0, 65536, (PERIOD,), generator=drawn, dtype=torch.int32)
    return table if device.type == "cpu" else table.repeat(_PERIODS_AT_ONCE).to(device)
