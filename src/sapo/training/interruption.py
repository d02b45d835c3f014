"""End a run in the middle of an optimizer step, as if that step had not begun."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sapo.preference.pairs import PairSource
from sapo.training.context import RunContext
from sapo.training.log import TrainingLog


class StepAbandoned(Exception):  # noqa: N818 - never leaves the trainer
    """A signal came while a step was under way."""


class Interruption:
    """Looks for a signal before each part of a step, and puts back what the abandoned step has changed.

    One process with a generator of its own can stop within a step. Several processes would have to agree before each
    part, and an engine has requests under way: they finish the step.

    Args:
        context: of the run.
        source: of pairs.
        log: averages since the last log line.
        asked: whether a signal asks for the end.
    """

    def __init__(self, context: RunContext, source: PairSource, log: TrainingLog, asked: Callable[[], bool]) -> None:
        self._context = context
        self._source = source
        self._log = log
        self._asked = asked
        self._possible = stops_within(context.args)
        self._logged: dict[str, Any] = {}
        self._random: list[torch.Tensor] = []

    def begin(self, step: int, *, first: bool) -> Callable[[], None]:
        """A micro-batch of the step after `step` begins; returns what looks before each of its parts.

        Args:
            step: the last step that was completed.
            first: it is the first of its step, which `PairSource.begin_step` has begun.

        Raises:
            StepAbandoned: as `_look`.
        """
        if self._possible and first:
            self._logged = self._log.state()
            self._random = [torch.get_rng_state(), *(device.get_rng_state() for device in self._devices())]

        self._look(step)
        return partial(self._look, step)

    def _look(self, step: int) -> None:
        """Before a part of the step after `step`.

        Raises:
            StepAbandoned: a signal asks for the end, and there is a step to keep.
        """
        if self._possible and step > 0 and self._asked():
            raise StepAbandoned

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
