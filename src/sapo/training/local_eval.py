"""The local measures while a run trains, at its evaluations, within a stated share of its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging

from sapo.data.examples import Example, collate_examples
from sapo.errors import ConfigurationError
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.measures.measure import LocalOptions, Measured, measure, sample_responses, summarize

if TYPE_CHECKING:
    from sapo.training.trainer import SAPOTrainer

logger = logging.get_logger(__name__)

_HALVES = 4
"""Ways to halve the rows for the statistics of a corpus: no standard errors are wanted here."""


class LocalSignals:
    """Measures the policy on the same rows at each evaluation for which there is time.

    The rows are spread evenly over the first evaluation set; each process takes its part of them. Samples are seeded by
    row, so nothing that the training draws is touched. `eval_local/time_share` is the time spent here over the time of
    the run so far; a measurement that would exceed `eval_local_max_time_fraction` is put off to a later evaluation.

    Args:
        trainer: of the run.
        rows: a prepared evaluation set.
        clock: gives seconds.

    Raises:
        ConfigurationError: the weights are sharded: the policy cannot generate in between.
    """

    def __init__(self, trainer: SAPOTrainer, rows: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        args = trainer.args
        if trainer.shell is not None:
            raise ConfigurationError(
                "eval_local=true with sharded weights: the policy cannot generate then. Leave it out, and run "
                "sapo evaluate on a checkpoint."
            )
        self.rows = rows
        count = min(args.eval_local_size, len(rows))
        places = [place * len(rows) // count for place in range(count)]
        self._examples: list[Example] = collate_examples([rows[place] for place in places])["examples"]
        self._trainer = trainer
        self._clock = clock
        self._options = LocalOptions(
            max_length=args.max_length,
            max_new_tokens=min(LocalOptions().max_new_tokens, args.max_length),
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
        )
        self._began = clock()
        self._spent = 0.0
        self._cost: float | None = None
        self._told = False

    def begin(self) -> None:
        """Start the clock of the run."""
        self._began, self._spent = self._clock(), 0.0

    def observe(self) -> None:
        """Measure, if there is time, and give the numbers to the averages of the evaluation."""
        if self._decided_together(self._fits()):
            started = self._clock()
            args = self._trainer.args
            own = self._measure(range(args.process_index, len(self._examples), args.world_size))
            found = sorted(gather_object(own), key=lambda pair: pair[0])
            self._add([Measured.of(stored) for _, stored in found])
            self._cost = self._clock() - started
            self._spent += self._cost
        elif not self._told:
            self._told = True
            logger.warning(
                f"Local measures on {len(self._examples)} rows would take more than eval_local_max_time_fraction="
                f"{self._trainer.args.eval_local_max_time_fraction:g} of the run's time so far; they are postponed. "
                "Lower eval_local_size, or raise the share, for more of them."
            )
        elapsed = self._clock() - self._began
        self._trainer.averages["eval"].add("local/time_share", self._spent / max(elapsed, 1e-9))

    def _fits(self) -> bool:
        if self._cost is None:
            # What a measurement takes is not known before the first: a batch of it is tried.
            started = self._clock()
            batch = range(min(self._options.batch_size, len(self._examples)))
            self._measure(batch)
            trial = self._clock() - started
            self._spent += trial
            processes = self._trainer.args.world_size
            self._cost = trial * max(1, len(self._examples)) / (len(batch) * processes)
        share = self._trainer.args.eval_local_max_time_fraction
        elapsed = self._clock() - self._began
        return bool(self._spent + self._cost <= share * (elapsed + self._cost))

    @staticmethod
    def _decided_together(fits: bool) -> bool:
        """What the first process finds: clocks differ, and all must do the same."""
        return bool(gather_object([fits])[0])

    def _measure(self, places: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
        trainer = self._trainer
        turns = [self._examples[place].turns[0] for place in places]
        others = None
        if trainer.opponent is not None:
            others = sample_responses(self._generator(trainer.opponent.using), places, turns, self._options)
        measured = measure(
            self._policy,
            self._generator(self._policy),
            places,
            turns,
            self._options,
            pad_token_id=trainer.pad_token_id,
            opponent=others,
        )
        return [(one.row, one.as_dict()) for one in measured]

    def _generator(self, weights: Callable[[], AbstractContextManager[nn.Module]]) -> TransformersGenerator:
        args = self._trainer.args
        return TransformersGenerator(
            weights,
            Sampling(args.temperature, args.top_k, args.top_p),
            eos_ids=self._trainer.eos_ids,
            pad_token_id=self._trainer.pad_token_id,
            batch_size=self._options.batch_size,
        )

    @contextmanager
    def _policy(self) -> Iterator[nn.Module]:
        with self._trainer.compute_loss_context_manager():
            yield self._trainer.policy()

    def _add(self, measured: Sequence[Measured]) -> None:
        found = summarize(
            measured,
            [self._examples[one.row].turns[0].response_ids for one in measured],
            self._trainer.eos_ids,
            max_new_tokens=self._options.max_new_tokens,
            resamples=0,
            halves=_HALVES,
        )
        for name, estimate in found.items():
            self._trainer.averages["eval"].add(f"local/{name}", estimate.value)
