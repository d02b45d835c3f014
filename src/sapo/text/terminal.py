"""Lines, and tables for a terminal of any width: cells are folded and never cut; columns that do not fit go below."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sapo.text.escape import visible
from sapo.text.fitted import fitted

WIDTH_OF_FILES = 240
"""Width of a table that goes to a file or a pipe, where nobody's window is too narrow."""
_FIRST = 31
"""Characters of the first column beyond which it is folded."""
_GAP = 2
"""Characters between two columns, besides the one of a line between them that is not drawn."""


def terminal() -> Console:
    """A console for tables, wide enough if it is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    return console


def say(console: Console, *lines: str, style: str | None = None) -> None:
    """Print lines without markup: broken between words on a terminal, as they are to a file or a pipe."""
    for line in lines:
        text = fitted(line, console.width if console.is_terminal else None)
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_table(
    console: Console, title: str, rows: Sequence[Sequence[str]], *, right: bool = False, strong: int = 0
) -> None:
    """Print rows, the first of which is the head; the first column is repeated beside each group of columns.

    Args:
        console: its width decides how many columns stand side by side.
        title: printed above.
        rows: of equal length; texts are printed as they are, without markup.
        right: align all columns but the first to the right.
        strong: number of rows after the head that are printed bold.
    """
    head, *body = [[visible(cell, console.encoding) for cell in row] for row in rows]
    widths = [max(_longest(row[place]) for row in (head, *body)) for place in range(len(head))]
    first = min(widths[0], _FIRST)
    say(console, visible(title, console.encoding), style="bold")
    for group in _groups(widths[1:], console.width - first - 2):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, _GAP, 0, 0), pad_edge=False, collapse_padding=True)
        table.add_column(Text(head[0]), overflow="fold", max_width=first)
        for place in group:
            table.add_column(Text(head[place + 1]), overflow="fold", justify="right" if right else "left")
        for number, row in enumerate(body):
            cells = [Text(_folded(row[0], first)), *(Text(row[place + 1]) for place in group)]
            table.add_row(*cells, style="bold" if number < strong else None)
        console.print(table)


def _folded(text: str, width: int) -> str:
    """A name that is too long, on several lines that end between its parts."""
    lines = [text]
    while len(lines[-1]) > width:
        head = lines[-1][:width]
        cut = max(head.rfind(mark) for mark in "_/ ") + 1 or width
        lines[-1:] = [lines[-1][:cut], f"  {lines[-1][cut:]}"]
    return "\n".join(lines)


def _longest(text: str) -> int:
    return max(map(len, text.splitlines()), default=0)


def _groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """Places of columns in groups that fit into `room` characters; one that fits nowhere stands alone.

    A column too many would make all others narrower, and break names anywhere.
    """
    groups: list[list[int]] = [[]]
    used = 0
    for place, width in enumerate(widths):
        if groups[-1] and used + width + _GAP + 1 > room:
            groups.append([])
            used = 0
        groups[-1].append(place)
        used += width + _GAP + 1
    return groups
