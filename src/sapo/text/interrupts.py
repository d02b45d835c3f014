"""Ctrl-C while a command starts: a library under import may swallow the exception, or take it for a missing package."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
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


class _Ended(BaseException):
    """A signal asks the process to end."""


@contextmanager
def undone_at_signals() -> Iterator[None]:
    """Unwind the block at SIGTERM and SIGHUP, so that nothing half written is left; then the signal ends the process.

    For commands of one process: in one of several, Python does not get to run while it waits for the others.
    """
    received = signal.SIGTERM

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        # A second one must not keep the block from being unwound.
        for one in taken:
            signal.signal(one, signal.SIG_IGN)
        raise _Ended

    # One that the program was started to ignore, as by nohup, stays ignored.
    taken = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    for one in taken:
        signal.signal(one, end)
    try:
        yield
    except _Ended:
        signal.signal(received, signal.SIG_DFL)
        os.kill(os.getpid(), received)
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)
