"""What became of the rows of a dataset, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sapo.data.columns import ColumnUse
from sapo.errors import SapoError

SHOWN_ROWS = 5
"""Row numbers kept of each kind of drop and fault."""

_KINDS = 20
"""Kinds of faults listed."""


@dataclass
class Faults:
    """Errors of rows, by what they say apart from the row's number.

    Attributes:
        rows: for each error, the first rows it was found in, from 1.
        counts: for each error, in how many rows it was found.
        of_all: errors of the dataset as a whole.
    """

    rows: dict[str, list[int]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    of_all: list[str] = field(default_factory=list)

    def add(self, error: SapoError, row: int, where: str) -> None:
        """Count the error of a row (from 0), which `where` names in its message."""
        said = str(error).removeprefix(f"{where}: ")
        self.counts[said] += 1
        if self.counts[said] <= SHOWN_ROWS:
            self.rows.setdefault(said, []).append(row + 1)

    def lines(self) -> list[str]:
        """The errors, the most frequent first."""
        lines = [f"refused {count}: {said} ({_rows(self.rows[said], count)})" for said, count in self._shown()]
        left = len(self.counts) - len(lines)
        return [*lines, *([f"refused for {left} more reasons"] if left else [])]

    def _shown(self) -> list[tuple[str, int]]:
        return self.counts.most_common(_KINDS)


@dataclass
class DataReport:
    """What became of the rows.

    Attributes:
        source: the dataset's name, as in messages.
        format: the format recognised.
        rows: rows read.
        kept: examples kept.
        dropped: why, and how many rows were left out; where a row gives several turns, how many turns.
        dropped_rows: for each reason, the numbers of the first rows, from 1.
        truncated_prompts: turns whose prompt was truncated.
        truncated_responses: turns whose response (or rejected response) was truncated, its EOS token lost.
        boundary_merges: replies tokenized apart, since a token would run across the end of the prompt.
        prompt_lengths: tokens of each turn's prompt, after truncation.
        response_lengths: tokens of each turn's response, after truncation.
        total_lengths: tokens of each turn's prompt and (longer) response together, before truncation; turns that were
            left out for their length included.
        max_length: of the options.
        columns: what the rows hold and nothing uses.
        replies: how many rows have how many assistant messages (0: plain text).
        system_messages: rows with a system message that says something.
        duplicates: turns that equal an earlier one.
        duplicate_rows: the numbers of the first of them, from 1.
        faults: errors of rows, where they are counted; None where the first one is raised.
    """

    source: str
    format: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_rows: dict[str, list[int]] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_responses: int = 0
    boundary_merges: int = 0
    prompt_lengths: list[int] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)
    total_lengths: list[int] = field(default_factory=list)
    max_length: int = 0
    columns: ColumnUse = field(default_factory=ColumnUse)
    replies: Counter[int] = field(default_factory=Counter)
    system_messages: int = 0
    duplicates: int = 0
    duplicate_rows: list[int] = field(default_factory=list)
    faults: Faults | None = None

    def drop(self, reason: str, row: int) -> None:
        """Count one row (its number from 0), or a turn of it, that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if self.dropped[reason] <= SHOWN_ROWS:
            self.dropped_rows.setdefault(reason, []).append(row + 1)

    def refuse(self, error: SapoError, row: int) -> None:
        """Count the error of a row (from 0), or raise it."""
        if self.faults is None:
            raise error
        self.faults.add(error, row, f"row {row + 1} of {self.source}")

    @property
    def too_long(self) -> int:
        """Turns longer than `max_length`."""
        return sum(length > self.max_length for length in self.total_lengths)

    def length_for(self, percent: int) -> int:
        """The smallest `max_length` that truncates no more than the longest `100 - percent` % of the turns."""
        ordered = sorted(self.total_lengths)
        return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]

    def lines(self) -> list[str]:
        """A short summary, in plain text."""
        turns = len(self.response_lengths)
        several = f" ({turns} turns)" if turns != self.kept else ""
        lines = [f"{self.source}: format {self.format}, {self.rows} rows, {self.kept} examples kept{several}"]
        lines += [
            f"dropped {count}: {reason} ({_rows(self.dropped_rows.get(reason, []), count)})"
            for reason, count in sorted(self.dropped.items())
        ]
        if self.faults is not None:
            lines += self.faults.lines()
        lines += self.columns.lines()
        if self.truncated_prompts or self.truncated_responses:
            lines.append(
                f"warning: {self._share()} exceed max_length={self.max_length} and are cut; "
                f"--max_length {self.length_for(95)} would keep 95% whole, {self.length_for(100)} all"
            )
            lines.append(
                f"cut to fit: {self.truncated_prompts} prompts, {self.truncated_responses} responses "
                "(a truncated response has no EOS token, a truncated prompt may lack its system message)"
            )
        if self.boundary_merges:
            lines.append(
                f"{self.boundary_merges} replies tokenized apart from their prompt, as a token would span "
                "both; a space that ends the prompts belongs at the start of the completions"
            )
        return lines

    def details(self) -> list[str]:
        """What `sapo data check` tells besides, in plain text."""
        lines = []
        talks = {count: rows for count, rows in sorted(self.replies.items()) if count}
        if talks:
            listed = ", ".join(f"{rows} with {count}" for count, rows in list(talks.items())[:6])
            more = sum(list(talks.values())[6:])
            lines.append(f"replies per conversation: {listed}{f', {more} with more' if more else ''}")
            lines.append(f"system messages: in {self.system_messages} of {sum(talks.values())} conversations")
        if self.duplicates:
            lines.append(f"duplicates: {self.duplicates} ({_rows(self.duplicate_rows, self.duplicates)})")
        if self.total_lengths:
            lines.append(
                f"longer than max_length={self.max_length}: {self._share()}; {self.length_for(95)} keeps 95% whole, "
                f"{self.length_for(100)} all"
            )
        return lines

    def _share(self) -> str:
        total = len(self.total_lengths)
        return f"{self.too_long} of {total} ({self.too_long / total:.0%})"


def row_name(row: int, reports: Sequence[DataReport]) -> str:
    """What a message calls a row, from its number in the prepared data that `reports` tell of."""
    for report in reports:
        if row < report.rows:
            return f"row {row + 1} of {report.source}"
        row -= report.rows
    return ""


def _rows(numbers: list[int], count: int) -> str:
    listed = ", ".join(map(str, numbers))
    return f"row {listed}" if count == 1 else f"rows {listed}{', ...' if count > len(numbers) else ''}"
