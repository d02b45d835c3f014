"""Lines that a terminal of any width shows whole: broken between words, commands folded as a shell reads them."""

from __future__ import annotations

import os
import re
import textwrap
from typing import IO

_COMMAND = re.compile(r"(?:^ *|: +)(?=(?:sapo|pip|vllm|llama-cli|ollama) (?:[^,; ]| (?! ))*(?<!\))$)")
"""In front of a command with which a line ends. What has two spaces in a row is a row of a table."""
_PYTHON = re.compile(r"from [\w.]+ import |\w+ = ")
"""Begins a line of Python, which can be pasted only as it is."""
_LABEL = re.compile(r" *(?:\S.*? {2,}(?=\S))?")
"""Spaces at the beginning, and the first cell of a row whose cells are two spaces or more apart."""
_NARROW = 24
"""Columns that the text beside a label needs; with fewer it goes on below the label's beginning."""


def width_of(stream: IO[str]) -> int | None:
    """Columns of the terminal that `stream` writes to; None for a file or a pipe."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return None


def fitted(text: str, width: int | None) -> str:
    """`text` in lines of at most `width` characters, besides words that are longer, such as paths; None keeps it.

    A line that is too long goes on below what follows its label, or on a narrow terminal below the label. A command at
    its end can still be pasted: it begins a line, and its lines end in a backslash.
    """
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in _parts(line, width))


def _parts(line: str, width: int) -> list[str]:
    if len(line) <= width or _PYTHON.match(line) or line.endswith(" \\"):
        return [line]
    label = _LABEL.match(line)
    indent = label.end() if label is not None else 0
    if indent > width - _NARROW:
        indent = min(4 + len(line) - len(line.lstrip()), width // 4)
    found = _COMMAND.search(line)
    if found is None:
        if " " not in line[indent:]:
            return [line]
        return textwrap.wrap(
            line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
    if found.end() <= indent:
        return _folded(line, width)
    return [*_parts(line[: found.end()].rstrip(), width), *_folded(f"  {line[found.end() :]}", width)]


def _folded(command: str, width: int) -> list[str]:
    """A command in lines that end in a backslash, broken in front of flags; after a flag where that is too long."""
    lines: list[str] = []
    pieces = re.split(r" (?=--|-[a-z] |&& )", command)
    too_long = [piece.startswith("-") and len(piece) + 8 > width for piece in pieces]
    for piece in (
        part for one, long in zip(pieces, too_long, strict=True) for part in one.split(" ", 1 if long else 0)
    ):
        if lines and len(lines[-1]) + len(piece) + 3 <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"      {piece}" if lines else piece)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
