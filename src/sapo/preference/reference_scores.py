"""Cache of the reference's log-probabilities of stored pairs, valid until the reference changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sapo.preference.objectives import ReferenceLogps
from sapo.preference.pairs import Pair


class ReferenceScores:
    """Scores of stored pairs, computed when a pair is first drawn and reused later.

    Pairs are compared by identity: the buffer returns the stored objects.

    Args:
        capacity: number of entries above which those of pairs that left the buffer are removed.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: dict[int, tuple[Pair, float, float]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Remove all entries, because the reference has changed."""
        self._known.clear()

    def of(
        self, pairs: Sequence[Pair], score: Callable[[list[Pair]], ReferenceLogps], stored: Callable[[], Iterable[Pair]]
    ) -> ReferenceLogps:
        """Scores of `pairs`.

        Args:
            pairs: at least one.
            score: scores pairs with the reference; called at most once, with the missing ones.
            stored: the buffer's contents, to find entries to remove.
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
        """Both scores of each stored pair `[n, 2]`, NaN if not computed yet."""
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
