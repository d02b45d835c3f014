"""What libraries print on standard error while a command starts waits, so that an error is the first thing there."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sapo.errors import SapoError
from sapo.text.fitted import fitted, width_of
from sapo.text.interrupts import raise_swallowed, unwatch


class Notices:
    """Log records and warnings that wait to be shown."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], Any]] | None = []
        self.dropped = False
        """Whether nothing but errors is shown: of several processes the first tells what all of them find."""

    def hold(self, show: Callable[[], Any]) -> bool:
        """Whether something waits, or is not shown at all; after `release` nothing waits."""
        if self.dropped:
            return True
        if self._waiting is None:
            return False
        self._waiting.append(show)
        return True

    def release(self) -> None:
        """Show what has waited; from now on everything is shown at once.

        Raises:
            KeyboardInterrupt: see `raise_swallowed`.
        """
        raise_swallowed()
        unwatch()
        waiting, self._waiting = self._waiting, None
        for show in waiting or ():
            show()


class _Fitted(logging.Formatter):
    """Another formatter's text, broken between words."""

    def __init__(self, own: logging.Formatter | None, width: int) -> None:
        super().__init__()
        self._own, self._width = own or logging.Formatter(), width

    def format(self, record: logging.LogRecord) -> str:
        return fitted(self._own.format(record), self._width)


def fit_messages() -> None:
    """Break log records and warnings between words where standard error is a terminal."""
    width = width_of(sys.stderr)
    if width is None:
        return
    for handler in _handlers():
        if not isinstance(handler.formatter, _Fitted):
            handler.setFormatter(_Fitted(handler.formatter, width))
    # The path and the line of code that Python adds say nothing to the user of a command.
    warnings.formatwarning = lambda message, category, *_, **__: f"{fitted(f'{category.__name__}: {message}', width)}\n"


def _handlers() -> set[logging.StreamHandler]:
    """Handlers that write to standard error."""
    loggers = [
        logging.root,
        *(one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)),
    ]
    found = [logging.lastResort, *(handler for logger in loggers for handler in logger.handlers)]
    return {one for one in found if isinstance(one, logging.StreamHandler) and one.stream is sys.stderr}


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Say on a terminal what takes seconds to import; then remove the line."""
    shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and os.environ.get("RANK", "0") == "0"
    shown = shown and "torch" not in sys.modules
    if shown:
        sys.stderr.write("Loading torch and transformers ...")
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


@contextmanager
def held_notices() -> Iterator[Notices]:
    """Keep log records and warnings off the terminal until they are released, or the block ends.

    A `SapoError` drops them: the command ends with that one line. What is written to `sys.stderr` itself, such as a
    progress bar, is shown at once.
    """
    notices = Notices()
    filters = {one: partial(_passes, notices, one) for one in _handlers()}
    show = warnings.showwarning

    def show_later(*given: Any, **more: Any) -> None:
        if not notices.hold(partial(show, *given, **more)):
            show(*given, **more)

    for handler, passes in filters.items():
        handler.addFilter(passes)
    warnings.showwarning = show_later
    try:
        yield notices
        notices.release()
    except SapoError:
        raise
    except BaseException:
        notices.release()
        raise
    finally:
        for handler, passes in filters.items():
            handler.removeFilter(passes)
        warnings.showwarning = show


def _passes(notices: Notices, handler: logging.Handler, record: logging.LogRecord) -> bool:
    if notices.dropped and record.levelno >= logging.ERROR:
        return True
    return not notices.hold(partial(handler.handle, record))
