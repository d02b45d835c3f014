"""End a run in the middle of an optimizer step, as if that step had not begun; or in the middle of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from sapo.preference.pairs import PairSource
from sapo.training.log import TrainingLog


class StepAbandoned(Exception):  # noqa: N818 - never leaves the trainer
    """A signal came while a step was under way."""


class EvaluationStopped(Exception):  # noqa: N818 - never leaves the trainer
    """A signal came while the run evaluated."""


class Interruption:
    """Looks for a signal before each part of a step, and puts back what the abandoned step has changed.

    One process with a generator of its own can stop within a step: before each new token, before the reference and
    before each pass of the policy. Several processes would have to agree each time, and an engine has requests under
    way: they finish the step.

    Args:
        args: of the run.
        asked: whether a signal asks for the end.
    """

    def __init__(self, args: Any, asked: Callable[[], bool]) -> None:
        self._asked = asked
        self._possible = stops_within(args)
        self._raise: type[Exception] | None = None
        self._logged: dict[str, Any] = {}
        self._random: list[torch.Tensor] = []

    def keep(self, source: PairSource, log: TrainingLog) -> None:
        """Name what an abandoned step has changed: the `source` of pairs, and averages since the last log line."""
        self._source = source
        self._log = log

    @contextmanager
    def within(self, step: int, *, first: bool) -> Iterator[Callable[[], None]]:
        """While the pairs of a micro-batch of the step after `step` are made.

        Args:
            step: the last step that was completed.
            first: it is the first of its step, which `PairSource.begin_step` has begun.

        Yields:
            What looks before each later part of the micro-batch.

        Raises:
            StepAbandoned: a signal asks for the end, and there is a step to keep.
        """
        if self._possible and first:
            self._logged = self._log.state()
            self._random = [torch.get_rng_state(), *(device.get_rng_state() for device in self._devices())]
        ends = StepAbandoned if self._possible and step > 0 else None
        with self._watching(ends):
            self.look()
            yield partial(self._look, ends)
            self.look()

    def evaluating(self) -> AbstractContextManager[None]:
        """While the run evaluates: `look` raises `EvaluationStopped`."""
        return self._watching(EvaluationStopped if self._possible else None)

    @contextmanager
    def _watching(self, ends: type[Exception] | None) -> Iterator[None]:
        before, self._raise = self._raise, ends
        try:
            yield
        finally:
            self._raise = before

    def look(self) -> None:
        """Before a new token: of the step or the evaluation that is under way, if any.

        Raises:
            StepAbandoned, EvaluationStopped: a signal asks for the end.
        """
        self._look(self._raise)

    def _look(self, ends: type[Exception] | None) -> None:
        if ends is not None and self._asked():
            raise ends

    def undo(self) -> None:
        """Pairs, averages and random state are again as they were when the step began."""
        self._source.undo()
        self._log.restore([self._logged])
        torch.set_rng_state(self._random[0])
        for device, state in zip(self._devices(), self._random[1:], strict=True):
            device.set_rng_state(state)

    @staticmethod
    def _devices() -> list[Any]:
        return [torch.get_device_module()] if torch.accelerator.is_available() else []


def stops_within(args: Any) -> bool:
    """Whether a run with these options can abandon a step."""
    return bool(args.world_size == 1 and args.generation_backend == "transformers")
