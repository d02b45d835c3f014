"""The reference's log-probabilities of stored pairs, kept for as long as the reference stands still."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sapo.preference.objectives import ReferenceLogps
from sapo.preference.pairs import Pair


class ReferenceScores:
    """Scores of stored pairs, formed when a pair is first drawn and used when it is drawn again.

    A pair is known by identity: the buffer gives out the very objects that it holds.

    Args:
        capacity: entries beyond which those of pairs that left the buffer are dropped.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: dict[int, tuple[Pair, float, float]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget everything: the reference has changed."""
        self._known.clear()

    def of(
        self, pairs: Sequence[Pair], score: Callable[[list[Pair]], ReferenceLogps], stored: Callable[[], Iterable[Pair]]
    ) -> ReferenceLogps:
        """Scores of `pairs`.

        Args:
            pairs: at least one.
            score: computes pairs with the reference; called at most once, with those not known yet.
            stored: what the buffer holds; asked for only to drop the rest.
        """
        missing = list({id(pair): pair for pair in pairs if id(pair) not in self._known}.values())
        if missing:
            if len(self._known) + len(missing) > self._capacity:
                kept = {id(pair) for pair in stored()}
                self._known = {key: entry for key, entry in self._known.items() if key in kept}
            formed = score(missing)
            values = zip(missing, formed.chosen_logps.tolist(), formed.rejected_logps.tolist(), strict=True)
            self._known |= {id(pair): (pair, chosen, rejected) for pair, chosen, rejected in values}
        entries = [self._known[id(pair)] for pair in pairs]
        chosen, rejected = (torch.tensor([entry[place] for entry in entries]) for place in (1, 2))
        return ReferenceLogps(chosen, rejected)

    def state(self, stored: Sequence[Pair]) -> Tensor:
        """Both scores of each stored pair `[n, 2]`, nan where there are none yet."""
        unknown = (None, math.nan, math.nan)
        rows = [self._known.get(id(pair), unknown)[1:] for pair in stored]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(stored), 2)

    def restore(self, stored: Sequence[Pair], state: Tensor) -> None:
        """Continue from `state` with the same pairs in the same order."""
        self._known = {
            id(pair): (pair, chosen, rejected)
            for pair, (chosen, rejected) in zip(stored, state.tolist(), strict=True)
            if not math.isnan(chosen)
        }
