"""JSON text -> values, as strictly as training data need it: a name that occurs twice in one object is an error."""

from __future__ import annotations

import json
import re
from typing import Any


class InvalidJson(ValueError):  # noqa: N818
    """Text that is not valid JSON.

    Attributes:
        reason: what is wrong.
        line: line in the text, from 1; of a list, the line where the item begins. None if unknown.
        column: column in that line, from 1; None if unknown.
    """

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        self.column = column


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        InvalidJson: it is not valid, nested too deeply, has a number that Python does not read, or an object with a
            duplicate name, of whose values `json.loads` would silently keep the last.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        # json ends some sentences with the words before a position, which stands apart here.
        raise InvalidJson(error.msg.removesuffix(" starting at"), error.lineno, error.colno) from error
    except RecursionError as error:
        raise InvalidJson("nested too deeply", _line(text)) from error
    except ValueError as error:
        reason = error.reason if isinstance(error, InvalidJson) else "a number has too many digits"
        raise InvalidJson(reason, _line(text)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidJson(f"one object has the name {twice[:40]!r} twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _line(text: str) -> int | None:
    """The line of the first item that cannot be read in a list; of other text, None if it has several lines."""
    start = re.match(r"\s*\[", text)
    if start is None:
        return None if "\n" in text.strip() else 1
    place = start.end()
    while True:
        begin = re.compile(r"[\s,]*").match(text, place).end()  # type: ignore[union-attr]
        try:
            _, place = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError):
            return text.count("\n", 0, begin) + 1
