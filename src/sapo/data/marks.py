"""Fields of a row or of a message that exclude it from training, such as `weight: 0` or KTO's `label: false`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_SWITCHES = frozenset(
    {"train", "training", "trainable", "train_on_turn", "loss", "calculate_loss", "label", "kto_tag", "desirable"}
)
"""False: not trained on."""
_MASKS = frozenset({"mask", "masked", "ignore"})
"""True: not trained on."""
_WEIGHTS = frozenset({"weight", "loss_weight", "loss_scale", "loss_mask"})
"""0: not trained on."""
_WORDS = {"true": True, "yes": True, "1": 1, "1.0": 1, "false": False, "no": False, "0": 0, "0.0": 0}
"""Values as CSV has them."""


def untrained_mark(fields: Mapping[str, Any]) -> str | None:
    """The field that excludes a row or a message from training, such as `weight: 0`; None if there is none.

    Recognized, in any case, are `weight`, `loss_weight`, `loss_scale` and `loss_mask` 0; `train`, `training`,
    `trainable`, `train_on_turn`, `loss`, `calculate_loss`, `label`, `kto_tag` and `desirable` false; `mask`, `masked`
    and `ignore` true. False and true may be 0 and 1, or text.
    """
    for name, trained in _marks(fields):
        if not trained:
            return f"marked {name}: {str(fields[name]).lower()}"
    return None


def honoured(fields: Mapping[str, Any]) -> set[str]:
    """The fields whose value says whether to train, in full: a weight of 0.5 does not."""
    return {name for name, _ in _marks(fields)}


def _marks(fields: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    for name, value in fields.items():
        kind = name.lower()
        if kind not in _SWITCHES | _MASKS | _WEIGHTS or value is None:
            continue
        if isinstance(value, str):
            value = _WORDS.get(value.strip().lower(), value)
        if not isinstance(value, (bool, int, float)) or math.isnan(value) or value not in (0, 1):
            continue
        if kind == "loss" and isinstance(value, float):
            continue  # a measured loss, not a switch
        yield name, bool(value) != (kind in _MASKS)
