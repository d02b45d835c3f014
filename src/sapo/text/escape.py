"""Escaped control characters: text of models and data that cannot control a terminal."""

from __future__ import annotations

import unicodedata

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"


def visible(text: str, encoding: str = "utf-8") -> str:
    r"""`text` with control and format characters escaped as \x1b, so that it cannot control a terminal.

    Line breaks stay, as do the joiners of some scripts and of emoji. Characters outside `encoding` are escaped too.
    """
    if not text.isprintable():
        text = "".join(char if _is_harmless(char) else char.encode("unicode_escape").decode() for char in text)
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        return text.encode("ascii", "backslashreplace").decode()


def _is_harmless(char: str) -> bool:
    return char == "\n" or char in _JOINERS or unicodedata.category(char) not in _UNSEEN
