"""Ctrl-C while a command starts: a library under import may swallow the exception, or take it for a missing package."""

from __future__ import annotations

import signal
from types import FrameType

_asked = False


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT: raise `KeyboardInterrupt`, and remember it.

    Raises:
        KeyboardInterrupt: always.
    """
    global _asked
    _asked = True
    raise KeyboardInterrupt


def watch() -> None:
    """Answer SIGINT by `interrupt` from now on, unless the program was started to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def unwatch() -> None:
    """Leave SIGINT to Python again, where Ctrl-C may have another meaning, as in a chat."""
    if signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def raise_swallowed() -> None:
    """Before the work begins, or when it fails to: end it if somebody has asked for that.

    Raises:
        KeyboardInterrupt: an earlier one has not ended the program.
    """
    global _asked
    asked, _asked = _asked, False
    if asked:
        raise KeyboardInterrupt
