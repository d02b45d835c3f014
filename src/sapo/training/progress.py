"""What a run shows: a progress bar with the few numbers that matter, or plain lines, and a table of pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sapo.preference.pairs import Pair
from sapo.runs.metrics import ACCURACY, EVAL, HEADLINES, LOSS, RUNTIME
from sapo.text.escape import visible
from sapo.text.numbers import number_text
from sapo.text.terminal import say

_BAR, _SHORTEST_BAR = 30, 5


class Status:
    """Two lines of a run that goes on: steps, bar and time; and the last logged numbers, as many as fit.

    Attributes:
        step: completed optimizer steps.
        steps: of the whole run.
        seconds: of a step on average, of this start of the run; 0 before the first.
        numbers: texts such as "loss 0.5", the most important first.
    """

    def __init__(self, step: int, steps: int) -> None:
        self.step, self.steps = step, steps
        self.seconds, self._since = 0.0, time.perf_counter()
        self.numbers: list[str] = []

    def advance(self, step: int, seconds: float) -> None:
        """A step has ended."""
        self.step, self.seconds, self._since = step, seconds, time.perf_counter()

    @property
    def left(self) -> timedelta:
        """Time left; runs down within a step."""
        rest = self.seconds * (self.steps - self.step) - (time.perf_counter() - self._since)
        return timedelta(seconds=max(0, round(rest)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        head = f"step {self.step}/{self.steps} "
        times = [f"{self.left} left", f"{self.seconds:.3g} s/step"] if self.seconds else ["first step ..."]
        tail = f" {_fitting(times, width - len(head) - 1)}"
        bar = min(_BAR, width - len(head) - len(tail))
        line = Table.grid(padding=0)
        cells: list[Any] = [Text(head)]
        if bar >= _SHORTEST_BAR:
            cells.append(ProgressBar(total=max(1, self.steps), completed=self.step, width=bar))
        line.add_row(*cells, Text(tail))
        yield line
        # Two lines from the first: if their number changes while another thread prints, rich leaves one behind.
        yield Text(_fitting(self.numbers, width))


def _fitting(parts: Sequence[str], width: int) -> str:
    """The first parts that fit into a line; a part is never cut."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line


class TerminalProgress(TrainerCallback):
    """Progress as a bar on a terminal, elsewhere (a file, a pipe, a dumb terminal) as one plain line per log.

    A quiet console shows neither. Colours follow the environment variable NO_COLOR, as rich reads it.

    Args:
        console: to print on.
        tokenizer: decodes the pairs of the table.
        last_pairs: returns the pairs of the last micro-batch.
        log_pairs_steps: optimizer steps between two tables of pairs; 0 for none.
        pairs: pairs in a table.
    """

    def __init__(
        self,
        console: Console,
        tokenizer: Any,
        last_pairs: Callable[[], Sequence[Pair]],
        *,
        log_pairs_steps: int,
        pairs: int,
    ) -> None:
        self._console = console
        self._tokenizer = tokenizer
        self._last_pairs = last_pairs
        self._log_pairs_steps = log_pairs_steps
        self._pairs = pairs
        self._live: Live | None = None
        self._status = Status(0, 0)
        self._began, self._first_step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the bar."""
        self._began, self._first_step = time.perf_counter(), state.global_step
        self._status = Status(state.global_step, state.max_steps)
        if self._console.is_terminal and not self._console.is_dumb_terminal and not self._console.quiet:
            self._live = Live(self._status, console=self._console, refresh_per_second=4)
            self._live.start(refresh=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move the bar; now and then show pairs."""
        self._status.advance(state.global_step, self._pace(state))
        every = self._log_pairs_steps
        if every and (state.global_step == 1 or state.global_step % every == 0):
            pairs = list(dict.fromkeys(self._last_pairs()))[: self._pairs]
            self._console.print(pair_table(pairs, self._tokenizer, state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the numbers that matter."""
        if logs is None or RUNTIME.name in logs:
            return
        labels = {EVAL + LOSS.name: "evaluation loss", EVAL + ACCURACY.name: "evaluation accuracy"}
        if LOSS.name in logs:
            labels = {metric.name: metric.label for metric in HEADLINES}
        shown = [f"{label} {number_text(logs[name])}" for name, label in labels.items() if name in logs]
        if self._live is not None and LOSS.name in logs:
            self._status.numbers = shown
        elif shown:
            if LOSS.name in logs:
                self._status.advance(state.global_step, self._pace(state))
                shown += [f"{self._status.seconds:.3g} s/step", f"left {self._status.left}"]
            line = f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}"
            say(self._console, line)

    def _pace(self, state: TrainerState) -> float:
        """Seconds of a step, of this start of the run."""
        steps: int = max(1, state.global_step - self._first_step)
        return (time.perf_counter() - self._began) / steps

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class _Headlines:
    """What Trainer prints of a log line: the key figures, of about 35 numbers that `metrics.jsonl` has."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Hand on fewer numbers."""
        logs = logs or {}
        known = {f"{prefix}{metric.name}" for metric in HEADLINES for prefix in ("", EVAL)} | {"epoch", "learning_rate"}
        measured = LOSS.name in logs or EVAL + LOSS.name in logs
        fewer = {name: value for name, value in logs.items() if name in known or not measured}
        super().on_log(args, state, control, logs=fewer, **kwargs)  # type: ignore[misc]


class _HeadlineProgress(_Headlines, ProgressCallback):
    pass


class _HeadlinePrinter(_Headlines, PrinterCallback):
    pass


def print_headlines(trainer: Trainer) -> None:
    """Let what Trainer itself prints, in a script, be a line that can be read."""
    callbacks = trainer.callback_handler.callbacks
    for place, one in enumerate(callbacks):
        if type(one) is ProgressCallback:
            callbacks[place] = _HeadlineProgress()
        elif type(one) is PrinterCallback:
            callbacks[place] = _HeadlinePrinter()


@contextmanager
def showing(progress: TerminalProgress, trainer: Trainer) -> Iterator[None]:
    """Let `progress` alone show what `trainer` does in this block; leave the terminal as it was, after errors too."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    try:
        yield
    finally:
        progress.close()


def pair_table(pairs: Sequence[Pair], tokenizer: Any, step: int) -> Table:
    """A few pairs, the regenerated segment marked; model text is escaped."""
    table = Table(title=f"pairs drawn at step {step}", show_lines=True, expand=False)
    for name in ("prompt", "chosen", "rejected"):
        table.add_column(name, overflow="fold")
    for pair in pairs:
        chosen, rejected = pair.segment, pair.rewritten
        table.add_row(
            Text(_ending(visible(tokenizer.decode(list(pair.prompt_ids))))),
            _marked(tokenizer, pair.chosen_ids, chosen.start, chosen.stop, "green"),
            _marked(tokenizer, pair.rejected_ids, rejected.start, rejected.stop, "red"),
        )
    return table


def _ending(text: str, length: int = 160) -> str:
    """The end of a text, from the beginning of a word on."""
    if len(text) <= length:
        return text
    kept = text[-length:]
    return f"... {kept.split(maxsplit=1)[-1] if not kept[0].isspace() else kept.lstrip()}"


def _marked(tokenizer: Any, ids: tuple[int, ...], start: int, stop: int, colour: str) -> Text:
    def decode(part: tuple[int, ...]) -> str:
        return visible(tokenizer.decode(list(part))) if part else ""

    head, tail = decode(ids[:start]), decode(ids[stop:])
    text = Text(head if len(head) <= 80 else f"...{head[-77:]}")
    text.append(f"⟦{decode(ids[start:stop])}⟧", style=colour)
    text.append(tail if len(tail) <= 80 else f"{tail[:77]}...")
    return text
