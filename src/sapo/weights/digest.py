"""A digest of a model's weights in memory, to tell whether text that a model generated is this model's."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from sapo.weights.opponent import is_neutral

_STRIDE = 7


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Hash of the types, shapes and bits of all weights, whatever their names and wherever they are; not of sharded
    ones.

    A model and the same model under an adapter that does nothing yet have the same digest. The bits of a weight enter
    as two sums of integers, which are exact in any order.
    """
    skipped = "lora_" if isinstance(model, PeftModel) and is_neutral(model) else None
    parts = sorted(
        f"{weight.dtype} {tuple(weight.shape)} {' '.join(map(str, _sums(weight)))}"
        for name, weight in model.named_parameters()
        if skipped is None or skipped not in name
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _sums(weight: Tensor) -> list[int]:
    kinds: dict[int, Any] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = weight.detach().contiguous().flatten().view(kinds[weight.element_size()])
    return [int(bits.sum(dtype=torch.int64)), int(bits[::_STRIDE].sum(dtype=torch.int64))]
