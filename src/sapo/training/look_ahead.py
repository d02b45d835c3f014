"""Batches read ahead of the step that is trained, so that their pairs can be generated together or in advance."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from sapo.config import SAPOConfig
from sapo.preference.pairs import PendingBatch


class LookAhead:
    """The micro-batches of the current step and of those whose pairs are generated with it.

    A pool ends where the number of the step is a multiple of `steps_per_generation`, and where the epoch does: a
    resumed run comes upon the same pools. An engine that generates ahead has a sliding window of steps instead.

    Args:
        args: `steps_per_generation`, `lookahead_steps` and `gradient_accumulation_steps`.
    """

    def __init__(self, args: SAPOConfig) -> None:
        self._args = args
        self._ahead: list[dict[str, Any]] = []
        self._pending: list[PendingBatch] = []

    def clear(self) -> None:
        """Forget what an earlier start of the run has read."""
        self._ahead, self._pending = [], []

    def take(
        self, batches: Iterator[dict[str, Any]], count: int, *, step: int, max_steps: int, epoch: int
    ) -> list[dict[str, Any]]:
        """The `count` micro-batches of optimizer step `step`; fewer at the end of the epoch.

        Args:
            batches: those of the epoch that have not been read.
            count: micro-batches of a step.
            step: index of the step, from 0.
            max_steps: of the run; nothing is read for later ones.
            epoch: index of the epoch.
        """
        pool, window = self._args.steps_per_generation, self._args.lookahead_steps
        if window or not self._ahead:
            steps = min(1 + window if window else pool - step % pool, max(1, max_steps - step))
            each, there = self._args.gradient_accumulation_steps, len(self._ahead)
            self._ahead += itertools.islice(batches, max(count, steps * each) - there)
            self._pending = [
                PendingBatch(inputs["examples"], epoch, step + index // each, index % each)
                for index, inputs in enumerate(self._ahead)
            ][there:]
        taken, self._ahead = self._ahead[:count], self._ahead[count:]
        return taken

    def pending(self) -> list[PendingBatch]:
        """What has been read since this was last asked."""
        pending, self._pending = self._pending, []
        return pending
