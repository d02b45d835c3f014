"""What happens around optimizer steps: the opponent follows, times are taken, metrics are written."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from sapo.runs.folder import RunFolder
from sapo.runs.metrics import CPU_TIME, MOVED, OPTIMIZER_TIME, OVERHEAD_TIME, STEP_TIME
from sapo.text.interrupts import interrupt, raise_swallowed
from sapo.training.interruption import EvaluationStopped, stops_within
from sapo.training.metrics import MetricAverages, clock
from sapo.weights.master import MovedSample

_ECHO = 1.0
"""Seconds in which a second signal is the same Ctrl-C: a terminal sends it to each process, and so does a launcher."""


class RunCallback(TrainerCallback):
    """Ties the parts of a run to Trainer's events, in the order they happen, and takes the times of a step.

    Args:
        folder: receives metrics and options.
        averages: receives the times.
        begin: fixes what is measured against the start of the run.
        before_step: looks at the gradients before the optimizer does.
        after_step: lets opponent and reference follow, before a checkpoint of this step is written.
    """

    def __init__(
        self,
        folder: RunFolder,
        averages: MetricAverages,
        *,
        begin: Callable[[], None],
        before_step: Callable[[], None],
        after_step: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._averages = averages
        self._begin = begin
        self._before_step = before_step
        self._after_step = after_step
        self._optimizer_started = 0.0
        self._step_began = (0.0, 0.0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Fix what is measured against the start of the run."""
        self._begin()
        self._folder.begin(state.global_step, args.to_dict())
        self._step_began = self._now(args)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Look at the gradients, and start the clock of the optimizer."""
        self._before_step()
        self._optimizer_started = clock(args.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The moving average, before a checkpoint of this step is written."""
        self._after_step()
        averages = self._averages
        averages.add(OPTIMIZER_TIME.name, clock(args.device) - self._optimizer_started)
        before, self._step_began = self._step_began, self._now(args)
        wall, cpu, work = (now - then for now, then in zip(self._step_began, before, strict=True))
        averages.add(STEP_TIME.name, wall)
        averages.add(OVERHEAD_TIME.name, max(0.0, wall - work))
        averages.add(CPU_TIME.name, cpu)
        if self._folder.lost is not None:
            control.should_save = control.should_training_stop = True
        last = state.global_step >= state.max_steps or control.should_training_stop
        if last and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leave the folder that is no longer this run's alone.

        Raises:
            TrainingError: where the last step is saved.
        """
        if self._folder.lost is not None:
            raise self._folder.lost_error(state.global_step)

    def _now(self, args: TrainingArguments) -> tuple[float, float, float]:
        """Wall and CPU seconds, and seconds of work so far."""
        return clock(args.device), time.process_time(), self._averages.worked

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Append to metrics.jsonl."""
        if state.is_world_process_zero and logs:
            # Trainer counts operations from the rows of its dataloader, not from what a step here computes.
            kept = {name: value for name, value in logs.items() if name != "total_flos"}
            self._folder.append_metrics(json.dumps({"step": state.global_step, **kept}))


class MovedFraction(TrainerCallback):
    """Measures which share of the trained weights a step changes, in the steps that a log line follows.

    Args:
        record: receives name, share and number of weights.
        tensors: returns what the optimizer steps.
        skipped: whether the optimizer kept from acting in the last step.
    """

    def __init__(
        self,
        record: Callable[[str, float, float], None],
        tensors: Callable[[], list[torch.Tensor]],
        skipped: Callable[[], bool],
    ) -> None:
        self._record = record
        self._sample = MovedSample(tensors)
        self._skipped = skipped
        self._due = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remember a sample of the weights; DeepSpeed steps them in the backward pass."""
        every = args.logging_strategy != IntervalStrategy.STEPS or state.logging_steps < 1
        self._due = every or (state.global_step + 1) % state.logging_steps == 0
        self._due |= args.logging_first_step and state.global_step == 0
        self._due |= state.global_step + 1 == state.max_steps
        if self._due:
            self._sample.take()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Compare it with them."""
        if self._due:
            moved = self._sample.moved()
            if not self._skipped():
                self._record(MOVED.name, *moved)


class KeepRecipe(TrainerCallback):
    """Writes recipe.yaml when a run begins, and tries what will be written of it when it ends.

    Args:
        folder: of the run.
        recipe: reproduces the run.
        rehearse: raises a `SapoError` if the end of the run could not be written.
    """

    def __init__(self, folder: RunFolder, recipe: dict[str, Any], rehearse: Callable[[], None]) -> None:
        self._folder = folder
        self._recipe = recipe
        self._rehearse = rehearse

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the recipe: it is wanted most by those whose run did not end."""
        self._folder.write_recipe(self._recipe)
        if state.is_world_process_zero:
            self._rehearse()


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run with a checkpoint; a second one ends it at once.

    A step under way is abandoned before its next token or part where `stops_within` says so, else finished. What
    follows a step (snapshot, evaluation, table of pairs) is left out, an evaluation under way is abandoned, and no
    further step begins. Before the first step there is nothing to keep: the run ends at once.

    Args:
        begin: called after each step.
    """

    def __init__(self, begin: Callable[[], None] = lambda: None) -> None:
        self._begin = begin
        self.received: signal.Signals | None = None
        """The first signal that came to this process; None before it."""
        self.told = False
        """Whether the processes have agreed that one came to any of them."""
        self._noted = 0.0
        self._begun, self._ended = False, False
        self._kept = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None and "RANK" in os.environ and now - self._noted < _ECHO:
            return
        if self.received is not None or not self._begun:
            interrupt(number, frame)
        self.received, self._noted = signal.Signals(number), now
        said = "Stopping after this step, with a checkpoint"  # the first, or one of several processes or of vLLM
        if self._ended:
            said = "Saving the models"
        elif self._kept:
            said = f"Stopping now, with a checkpoint of step {self._kept}"
        if os.environ.get("RANK", "0") == "0":
            # Not through the stream: the signal may have come in the middle of another write to it.
            os.write(2, f"\n{said}; Ctrl-C again ends at once.\n".encode())

    def is_told(self, args: TrainingArguments) -> bool:
        """Whether a signal has come, to whichever of the processes; all take part."""
        told = self.received is not None
        if args.world_size > 1:
            flag = torch.tensor(float(told), device=args.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            told = bool(flag)
        self.told |= told
        return told

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """From here on a stop keeps something.

        Raises:
            KeyboardInterrupt: a library has swallowed an earlier one.
        """
        if not self._begun:
            raise_swallowed()
        self._begun = True
        self._kept = state.global_step if stops_within(args) else 0

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Abandon an evaluation; of several processes none leaves the others behind.

        Raises:
            EvaluationStopped: `CheckpointHooks` goes on without its metrics.
        """
        if args.world_size == 1 and self.received is not None and not self._ended:
            raise EvaluationStopped

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ask for a checkpoint and the end; in all processes at the same step, whichever of them was told when."""
        self._kept = 0
        self._begin()
        if self.is_told(args):
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """What is left is saving."""
        self._ended = True
