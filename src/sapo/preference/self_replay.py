"""Self-replay: the start's own replies, mixed into every batch as responses that are trained on as they are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from sapo.data.examples import Example
from sapo.preference.pairs import Pair, PairSource, SourceDecorator
from sapo.preference.segments import Segment
from sapo.seeds import derive_seed

Reply = tuple[Sequence[int], Sequence[int]]
"""Prompt and the start's reply to it, as token ids."""


def is_replayed(pair: Pair) -> bool:
    """Whether a pair is self-replay: a response alone, of no row of the data."""
    return pair.row < 0


def replayed_pair(index: int, reply: Reply) -> Pair:
    """Reply number `index` as a pair without a rejected side."""
    prompt, response = tuple(reply[0]), tuple(reply[1])
    end = Segment(len(response), len(response))
    return Pair(-1 - index, 0, prompt, response, response, end, end)


class SelfReplay(SourceDecorator):
    """Adds replayed replies to the pairs of another source; that source never sees them, so none is ever rejected.

    Which replies a micro-batch gets follows from its number alone, so nothing is kept in checkpoints: the replies are
    gone through in a new order each time, and all processes together use each once.

    Args:
        source: the pairs of the data.
        replies: returns the start's replies; called when training begins.
        share: of a batch that is replayed, below 1.
        batch_size: pairs of the source in a micro-batch.
        micro_batches: of an optimizer step.
        seed: the run's seed.
        process: index of this process, and the number of all.
        record: receives `self_replay/share`.
    """

    def __init__(
        self,
        source: PairSource,
        replies: Callable[[Path | None], Sequence[Reply]],
        *,
        share: float,
        batch_size: int,
        micro_batches: int,
        seed: int,
        process: tuple[int, int] = (0, 1),
        record: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        super().__init__(source)
        self._replies = replies
        self._each = batch_size * share / (1 - share)
        self._micro_batches = micro_batches
        self._seed = seed
        self._process, self._processes = process
        self._record = record
        self._pairs: list[Pair] = []
        self._order: tuple[int, list[int]] = (-1, [])

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """The source's pairs, then the replayed ones."""
        own = self._source.pairs(examples, epoch=epoch, step=step, micro_batch=micro_batch)
        number = step * self._micro_batches + micro_batch
        first, last = (math.floor(count * self._each) for count in (number, number + 1))
        replayed = [self._at(count * self._processes + self._process) for count in range(first, last)]
        self._record("self_replay/share", len(replayed) / (len(own) + len(replayed)))
        return [*own, *replayed]

    def _at(self, place: int) -> Pair:
        turn, index = divmod(place, len(self._pairs))
        if self._order[0] != turn:
            order = list(range(len(self._pairs)))
            random.Random(derive_seed(self._seed, "self-replay", turn)).shuffle(order)
            self._order = (turn, order)
        return self._pairs[self._order[1][index]]

    def begin(self, step: int, checkpoint: Path | None = None) -> None:
        """Get the replies, then begin the source."""
        self._pairs = [replayed_pair(index, reply) for index, reply in enumerate(self._replies(checkpoint))]
        self._source.begin(step, checkpoint)
