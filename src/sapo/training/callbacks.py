"""What happens around optimizer steps: the opponent follows, times are taken, metrics are written."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sapo.runs.folder import RunFolder
from sapo.training.metrics import MetricAverages


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
        self._step_began = (0.0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Fix what is measured against the start of the run."""
        self._begin()
        self._folder.begin(state.global_step, args.to_dict())
        self._step_began = (time.perf_counter(), time.process_time())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Look at the gradients, and start the clock of the optimizer."""
        self._before_step()
        self._optimizer_started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The moving average, before a checkpoint of this step is written."""
        self._after_step()
        averages, (wall, cpu) = self._averages, self._step_began
        self._step_began = (time.perf_counter(), time.process_time())
        averages.add("time/optimizer", self._step_began[0] - self._optimizer_started)
        averages.add("time/step", self._step_began[0] - wall)
        averages.add("time/cpu", self._step_began[1] - cpu)

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
            self._folder.append_metrics(json.dumps({"step": state.global_step, **logs}))


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the current step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ask for a checkpoint and the end; in all processes at the same step, whichever of them was told when."""
        told = self.received is not None
        if args.world_size > 1:
            flag = torch.tensor(float(told), device=args.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            told = bool(flag)
        if told:
            control.should_save = True
            control.should_training_stop = True
