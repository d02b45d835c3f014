"""Fields of a row or of a message that exclude it from training, such as `weight: 0` or KTO's `label: false`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_SWITCHES = frozenset(
    {"train", "training", "trainable", "train_on_turn", "loss", "calculate_loss", "output_with_loss"}
    | {"label", "kto_tag", "desirable"}
)
"""False: not trained on."""
_MASKS = frozenset({"mask", "masked", "ignore"})
"""True: not trained on."""
_WEIGHTS = frozenset({"weight", "weights", "sample_weight", "loss_weight", "loss_scale", "loss_mask"})
"""0: not trained on."""
_SPANS = frozenset({"train_detail", "training_detail"})
"""Parts of a reply, each with such a field."""
_SIGNED = _WEIGHTS | {"label"}
"""Below 0: not trained on."""
_WORDS = {"true": True, "yes": True, "1": 1, "1.0": 1, "false": False, "no": False, "0": 0, "0.0": 0, "-1": -1}
_WORDS |= {"good": True, "chosen": True, "desirable": True, "bad": False, "rejected": False, "undesirable": False}
"""Values as CSV has them, and labels in words."""
_KNOWN = _SWITCHES | _MASKS | _WEIGHTS | _SPANS


def untrained_mark(fields: Mapping[str, Any]) -> str | None:
    """The field that excludes a row or a message from training, such as `weight: 0`; None if there is none.

    Recognized, in any case, are `weight`, `weights`, `sample_weight`, `loss_weight`, `loss_scale` and `loss_mask` 0 or
    below; `train`, `training`, `trainable`, `train_on_turn`, `loss`, `calculate_loss`, `output_with_loss`, `label`,
    `kto_tag` and `desirable` false; `mask`, `masked` and `ignore` true. False and true may be 0 and 1, text, or a label
    in words such as `rejected`; `label` may be -1. A list of such values, or `train_detail` and `training_detail` with
    parts of a reply, exclude a row or a message if they exclude a part of it.
    """
    for name, trained in _marks(fields):
        if not trained:
            value = fields[name]
            return f"marked {name}: {'in part' if isinstance(value, (list, tuple)) else str(value).lower()}"
    return None


def honoured(fields: Mapping[str, Any]) -> set[str]:
    """The fields whose value says whether to train, in full: a weight of 0.5 does not."""
    return {name for name, _ in _marks(fields)}


def _marks(fields: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    for name, value in fields.items():
        kind = name.lower()
        if kind not in _KNOWN or value is None:
            continue
        if isinstance(value, (list, tuple)):
            # Marks of parts or of turns. What is trained on is trained on in full, so one of them excludes it.
            parts = [part if isinstance(part, Mapping) else {name: part} for part in value]
            if kind != "label" and (kind in _SPANS or any(set(_marks(part)) for part in parts)):
                yield name, not any(map(untrained_mark, parts))
            continue
        if isinstance(value, str):
            value = _WORDS.get(value.strip().lower(), value)
        if not isinstance(value, (bool, int, float)) or math.isnan(value):
            continue
        if (max(value, 0) if kind in _SIGNED else value) not in (0, 1):
            continue
        if kind == "loss" and isinstance(value, float):
            continue  # a measured loss, not a switch
        yield name, (value > 0) != (kind in _MASKS)
