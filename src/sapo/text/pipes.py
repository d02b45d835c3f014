"""Output whose reader goes away, such as `head`, or `tee` at Ctrl-C: a command outlives it."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


def outlive_readers(note: str | None) -> None:
    """From now on, what nobody reads any more is dropped where standard output and error go to pipes.

    Args:
        note: a line for standard error at the moment when the reader of standard output has gone; None for none.
    """
    sys.stderr = _outliving(sys.stderr, lambda: None)
    sys.stdout = _outliving(sys.stdout, lambda: None if note is None else _say(note))


def _say(note: str) -> None:
    sys.stderr.write(f"{note}\n")


def _outliving(stream: TextIO, gone: Callable[[], None]) -> TextIO:
    try:
        number = stream.fileno()
        if not stat.S_ISFIFO(os.fstat(number).st_mode):
            return stream
    except (OSError, ValueError, AttributeError):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(number, gone)), stream.encoding, stream.errors, line_buffering=stream is sys.stderr
    )


class _Pipe(io.FileIO):
    def __init__(self, number: int, gone: Callable[[], None]) -> None:
        super().__init__(number, "wb", closefd=False)
        self._gone = gone

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            self._gone()
            return memoryview(data).nbytes
