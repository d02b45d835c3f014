"""Pairs that an optimizer step trained on, with their losses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sapo.preference.pairs import Pair


@dataclass(frozen=True, slots=True)
class TrainedPair:
    """A pair of the current optimizer step and its loss in nats."""

    pair: Pair
    loss: float


def describe(trained: Iterable[TrainedPair], tokenizer: Any) -> list[dict[str, Any]]:
    """Pairs and their losses as human-readable JSON rows."""
    return [
        {
            "row": one.pair.row,
            "turn": one.pair.turn,
            "loss": one.loss if math.isfinite(one.loss) else str(one.loss),
            **{
                name: tokenizer.decode(ids)
                for name, ids in (
                    ("prompt", one.pair.prompt_ids),
                    ("chosen", one.pair.chosen_ids),
                    ("rejected", one.pair.rejected_ids),
                )
            },
            "prompt_ids": one.pair.prompt_ids,
            "chosen_ids": one.pair.chosen_ids,
            "rejected_ids": one.pair.rejected_ids,
        }
        for one in trained
    ]
