"""The local measures while a run trains, at its evaluations, within a stated share of its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from sapo.data.examples import Example, collate_examples
from sapo.errors import ConfigurationError
from sapo.generation.decoding import TransformersGenerator
from sapo.measures.measure import LocalOptions, Measured, measure, sample_responses, summarize
from sapo.training.context import RunContext
from sapo.training.metrics import MetricAverages
from sapo.training.time_share import TimeShare

logger = logging.get_logger(__name__)

_HALVES = 4
"""Ways to halve the rows for the statistics of a corpus: no standard errors are wanted here."""


class LocalSignals:
    """Measures the policy on the same rows at the first and the last evaluation, and at others if there is time.

    The rows are spread evenly over the first evaluation set; each process takes its part of them. Samples are seeded by
    row, so nothing that the training draws is touched. `eval_local/time_share` is the time spent here over the time of
    the run so far; a measurement in between that would exceed `eval_local_max_time_fraction` is left out.

    Args:
        context: of the run.
        averages: receives the numbers of an evaluation.
        rows: a prepared evaluation set.
        clock: gives seconds.

    Raises:
        ConfigurationError: the weights are sharded: the policy cannot generate in between.
    """

    def __init__(
        self,
        context: RunContext,
        averages: MetricAverages,
        rows: Any,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        args = context.args
        if context.roles.sharded:
            raise ConfigurationError(
                "eval_local=true with sharded weights: the policy cannot generate then. Leave it out, and run "
                "sapo evaluate on a checkpoint."
            )
        self.rows = rows
        count = min(args.eval_local_size, len(rows))
        places = [place * len(rows) // count for place in range(count)]
        self._examples: list[Example] = collate_examples([rows[place] for place in places])["examples"]
        self._context = context
        self._averages = averages
        self._options = LocalOptions(
            max_length=args.max_length,
            max_new_tokens=min(LocalOptions().max_new_tokens, args.max_length),
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
        )
        self._time = TimeShare(args.eval_local_max_time_fraction, clock)
        self._told = False

    def begin(self, checkpoint: Path | None = None) -> None:
        """Start the clock of the run, or of what follows `checkpoint`."""
        self._time.begin()

    def observe(self, *, last: bool = False) -> None:
        """Measure at the first and the `last` evaluation, and where there is time; for the evaluation's averages."""
        if last or self._time.cost is None or self._context.world.first_decides(self._time.fits()):
            with self._time.spending():
                args = self._context.args
                own = self._measure(range(args.process_index, len(self._examples), args.world_size))
                found = sorted(chain.from_iterable(self._context.world.gather(own)), key=lambda pair: pair[0])
                self._add([Measured.of(stored) for _, stored in found])
        elif not self._told:
            self._told = True
            logger.warning(
                f"Local measures on {len(self._examples)} rows would take more than eval_local_max_time_fraction="
                f"{self._context.args.eval_local_max_time_fraction:g} of the run's time so far; until there is time "
                "they are left out, except at the last evaluation. Lower eval_local_size or raise the fraction."
            )
        self._averages.add("local/time_share", self._time.share)

    def _measure(self, places: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
        context = self._context
        turns = [self._examples[place].turns[0] for place in places]
        others = None
        if context.roles.opponent is not None:
            others = sample_responses(self._generator(context.roles.opponent_module), places, turns, self._options)
        measured = measure(
            context.roles.policy_module,
            self._generator(context.roles.policy_module),
            places,
            turns,
            self._options,
            pad_token_id=context.pad_token_id,
            opponent=others,
        )
        return [(one.row, one.as_dict()) for one in measured]

    def _generator(self, weights: Callable[[], AbstractContextManager[nn.Module]]) -> TransformersGenerator:
        return self._context.generator(weights, self._context.sampling, self._options.batch_size)

    def _add(self, measured: Sequence[Measured]) -> None:
        found = summarize(
            measured,
            [self._examples[one.row].turns[0].response_ids for one in measured],
            self._context.eos_ids,
            max_new_tokens=self._options.max_new_tokens,
            resamples=0,
            halves=_HALVES,
        )
        for name, estimate in found.items():
            self._averages.add(f"local/{name}", estimate.value)
