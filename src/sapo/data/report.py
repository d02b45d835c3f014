"""Counts of kept, dropped, truncated and malformed rows, and their summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sapo.data.columns import ColumnUse
from sapo.errors import SapoError

T = TypeVar("T")

SHOWN_ROWS = 5
"""Row numbers kept per reason or error."""

_KINDS = 20
"""Number of distinct errors listed."""


@dataclass
class Faults:
    """Errors of rows, grouped by their message without the row number.

    Attributes:
        rows: first row numbers of each error, from 1.
        counts: number of rows with each error.
        of_all: errors of the dataset as a whole.
    """

    rows: dict[str, list[int]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    of_all: list[str] = field(default_factory=list)

    def add(self, error: SapoError, row: int, where: str) -> None:
        """Count the error of a row (from 0), which `where` names in its message."""
        _count(self.counts, self.rows, str(error).removeprefix(f"{where}: "), 1, [row + 1])

    def lines(self) -> list[str]:
        """The errors, the most frequent first."""
        lines = [
            f"refused {count}: {message} ({listed_rows(self.rows[message], count)})" for message, count in self._shown()
        ]
        left = len(self.counts) - len(lines)
        return [*lines, *([f"refused for {left} more reasons"] if left else [])]

    def _shown(self) -> list[tuple[str, int]]:
        return self.counts.most_common(_KINDS)


@dataclass
class DataReport:
    """Counts of one dataset's rows.

    Attributes:
        source: name of the dataset in messages.
        format: the detected format.
        rows: rows read.
        kept: examples kept.
        dropped: number of dropped rows by reason; of turns, where a row gives several.
        dropped_rows: first row numbers of each reason, from 1.
        truncated_prompts: turns whose prompt was truncated.
        truncated_responses: turns whose response (or rejected response) was truncated, its EOS token lost.
        boundary_merges: replies tokenized separately because a token would span prompt and reply.
        prompt_lengths: tokens of each turn's prompt, after truncation.
        response_lengths: tokens of each turn's response, after truncation.
        total_lengths: tokens of each turn's prompt and (longer) response together, before truncation; turns that were
            left out for their length included.
        max_length: as in the options.
        columns: unused columns.
        noted: number of rows that are kept, by what a person should know of them.
        noted_rows: first row numbers of each, from 1.
        replies: number of rows by number of assistant messages (0: plain text).
        system_messages: rows with a non-empty system message.
        duplicates: turns that equal an earlier one.
        duplicate_rows: row numbers of the first of them, from 1.
        faults: errors of rows if they are counted; None if the first one is raised.
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
    noted: dict[str, int] = field(default_factory=dict)
    noted_rows: dict[str, list[int]] = field(default_factory=dict)
    replies: Counter[int] = field(default_factory=Counter)
    system_messages: int = 0
    duplicates: int = 0
    duplicate_rows: list[int] = field(default_factory=list)
    faults: Faults | None = None

    def drop(self, reason: str, row: int) -> None:
        """Count one dropped row (number from 0), or one of its turns."""
        _count(self.dropped, self.dropped_rows, reason, 1, [row + 1])

    def note(self, what: str, row: int) -> None:
        """Count a row (number from 0) that is kept."""
        _count(self.noted, self.noted_rows, what, 1, [row + 1])

    def add(self, part: DataReport) -> None:
        """Add the counts of further rows."""
        self.rows += part.rows
        self.truncated_prompts += part.truncated_prompts
        self.truncated_responses += part.truncated_responses
        self.boundary_merges += part.boundary_merges
        self.system_messages += part.system_messages
        self.replies += part.replies
        for reason, count in part.dropped.items():
            _count(self.dropped, self.dropped_rows, reason, count, part.dropped_rows[reason])
        for what, count in part.noted.items():
            _count(self.noted, self.noted_rows, what, count, part.noted_rows[what])
        for mine, theirs in (
            (self.prompt_lengths, part.prompt_lengths),
            (self.response_lengths, part.response_lengths),
            (self.total_lengths, part.total_lengths),
        ):
            mine += theirs
        self.columns.add(part.columns)
        if self.faults is not None and part.faults is not None:
            for message, rows in part.faults.rows.items():
                _count(self.faults.counts, self.faults.rows, message, part.faults.counts[message], rows)

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
        return percentile(sorted(self.total_lengths), percent)

    def lines(self) -> list[str]:
        """A short summary, in plain text."""
        turns = len(self.response_lengths)
        several = f" ({turns} turns)" if turns != self.kept else ""
        lines = [
            f"{self.source}: format {self.format}, {_some(self.rows, 'row')}, "
            f"{_some(self.kept, 'example')} kept{several}"
        ]
        lines += [
            f"dropped {count}: {reason} ({listed_rows(self.dropped_rows.get(reason, []), count)})"
            for reason, count in sorted(self.dropped.items())
        ]
        if self.faults is not None:
            lines += self.faults.lines()
        lines += [
            f"{what}: {_some(count, 'row')} ({listed_rows(self.noted_rows[what], count)})"
            for what, count in sorted(self.noted.items())
        ]
        lines += self.columns.lines()
        if self.truncated_prompts or self.truncated_responses:
            lines.append(
                f"warning: {self._share()} exceed max_length={self.max_length} and are truncated; "
                f"--max_length {self.length_for(95)} would keep 95% complete, {self.length_for(100)} all"
            )
            lines.append(
                f"truncated: {self.truncated_prompts} prompts, {self.truncated_responses} responses "
                "(a truncated response has no EOS token, a truncated prompt may lack its system message)"
            )
        if self.boundary_merges:
            lines.append(
                f"{self.boundary_merges} replies tokenized separately because a token would span prompt and reply; "
                "start the completions, not end the prompts, with the space or line break between them"
            )
        return lines

    def details(self) -> list[str]:
        """Additional lines for `sapo data check`."""
        lines = []
        talks = {count: rows for count, rows in sorted(self.replies.items()) if count}
        if talks:
            listed = ", ".join(f"{count} ({_some(rows, 'row')})" for count, rows in list(talks.items())[:6])
            rest = sum(list(talks.values())[6:])
            more = f", more ({_some(rest, 'row')})" if rest else ""
            lines.append(f"replies per conversation: {listed}{more}")
            lines.append(f"system messages: in {self.system_messages} of {sum(talks.values())} conversations")
        if self.duplicates:
            lines.append(f"duplicates: {self.duplicates} ({listed_rows(self.duplicate_rows, self.duplicates)})")
        if self.total_lengths:
            lines.append(
                f"longer than max_length={self.max_length}: {self._share()}; 95% fit into {self.length_for(95)} "
                f"tokens, all into {self.length_for(100)}"
            )
        return lines

    def _share(self) -> str:
        total = len(self.total_lengths)
        return f"{self.too_long} of {total} ({self.too_long / total:.0%})"


def _count(counts: dict[str, int], shown: dict[str, list[int]], reason: str, count: int, rows: list[int]) -> None:
    """Count rows for a reason, and keep the numbers of the first."""
    counts[reason] = counts.get(reason, 0) + count
    listed = shown.setdefault(reason, [])
    listed += rows[: SHOWN_ROWS - len(listed)]


def row_name(row: int, reports: Sequence[DataReport]) -> str:
    """Name of a row in messages, from its number in the prepared data of `reports`."""
    for report in reports:
        if row < report.rows:
            return f"row {row + 1} of {report.source}"
        row -= report.rows
    return ""


def _some(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def listed_rows(numbers: Sequence[int], count: int | None = None) -> str:
    """The first row numbers in words.

    Args:
        numbers: of the first rows, or of all.
        count: of rows; None if `numbers` are all.
    """
    count = len(numbers) if count is None else count
    numbers = numbers[:SHOWN_ROWS]
    listed = ", ".join(map(str, numbers))
    return f"row {listed}" if count == 1 else f"rows {listed}{', ...' if count > len(numbers) else ''}"


def percentile(ordered: Sequence[T], percent: int) -> T:
    """The smallest of sorted values that `percent` (0 to 100) of them do not exceed (nearest rank)."""
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]
