"""What a run shows: a progress bar with the few numbers that matter, or plain lines, and a table of pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sapo.preference.pairs import Pair
from sapo.runs.metrics import ACCURACY, EVAL, HEADLINES, LOSS, RUNTIME
from sapo.text import number_text, visible


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
        self._bar: Progress | None = None
        self._task: Any = None
        self._began, self._first_step = 0.0, 0
        self.last: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the bar."""
        self._began, self._first_step = time.perf_counter(), state.global_step
        if self._console.is_terminal and not self._console.is_dumb_terminal and not self._console.quiet:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move the bar; now and then show pairs."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
        every = self._log_pairs_steps
        if every and (state.global_step == 1 or state.global_step % every == 0):
            pairs = self._last_pairs()[: self._pairs]
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
        if LOSS.name in logs:
            self.last = dict(logs)
            labels = {metric.name: metric.label for metric in HEADLINES}
        else:
            labels = {name: name for name in (EVAL + LOSS.name, EVAL + ACCURACY.name)}
        shown = "  ".join(f"{label} {number_text(logs[name])}" for name, label in labels.items() if name in logs)
        if self._bar is not None and LOSS.name in logs:
            self._bar.update(self._task, description=f"{self._pace(state)[0]}  {shown}")
        elif shown:
            pace = "".join(f"  {part}" for part in self._pace(state)) if LOSS.name in logs else ""
            line = f"step {state.global_step}/{state.max_steps}  {shown}{pace}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _pace(self, state: TrainerState) -> tuple[str, str]:
        """Time a step and time left, of this start of the run."""
        each = (time.perf_counter() - self._began) / max(1, state.global_step - self._first_step)
        left = timedelta(seconds=round(each * (state.max_steps - state.global_step)))
        return f"{each:.3g} s/step", f"left {left}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def pair_table(pairs: Sequence[Pair], tokenizer: Any, step: int) -> Table:
    """A few pairs, the rewritten segment marked; model text is escaped."""
    table = Table(title=f"pairs drawn at step {step}", show_lines=True, expand=False)
    for name in ("prompt", "chosen", "rejected"):
        table.add_column(name, overflow="fold")
    for pair in pairs:
        chosen, rejected = pair.segment, pair.rewritten
        table.add_row(
            Text(visible(tokenizer.decode(list(pair.prompt_ids)))[-160:]),
            _marked(tokenizer, pair.chosen_ids, chosen.start, chosen.stop, "green"),
            _marked(tokenizer, pair.rejected_ids, rejected.start, rejected.stop, "red"),
        )
    return table


def _marked(tokenizer: Any, ids: tuple[int, ...], start: int, stop: int, colour: str) -> Text:
    def decode(part: tuple[int, ...]) -> str:
        return visible(tokenizer.decode(list(part))) if part else ""

    head, tail = decode(ids[:start]), decode(ids[stop:])
    text = Text(head if len(head) <= 80 else f"...{head[-77:]}")
    text.append(f"⟦{decode(ids[start:stop])}⟧", style=colour)
    text.append(tail if len(tail) <= 80 else f"{tail[:77]}...")
    return text
