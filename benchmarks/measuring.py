"""Peak memory and processor time of a piece of work, in a fork of this process: everything is imported already."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of glibc's malloc.h."""


def resident() -> int:
    """Bytes of this process in memory."""
    return psutil.Process().memory_info().rss


def peak_resident() -> int:
    """Most bytes since `forget_peak`. Not `ru_maxrss`: a child starts with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def forget_peak() -> None:
    """Let the peak be what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back_freed_blocks() -> None:
    """Let the allocator return every larger block when it is freed, and what is free already: what is resident is then
    what is in use. A fork finds free blocks of its parent, which would hide as much of its own."""
    library = ctypes.CDLL("libc.so.6")
    library.mallopt(_MMAP_THRESHOLD, 65536)
    library.malloc_trim(0)


def in_forks(work: Callable[[int], Any], processes: int = 1, *, give_back: bool = True) -> list[Any]:
    """What `work(number)` returns in each of several forks that run at a time.

    Args:
        work: is given the number of its fork.
        processes: forks.
        give_back: whether freed blocks are given back, which makes memory exact and costs time.

    Raises:
        RuntimeError: one of them failed, with its traceback.
    """
    context = multiprocessing.get_context("fork")
    ends = []
    for number in range(processes):
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_report, args=(work, number, send, give_back))
        child.start()
        send.close()
        ends.append((receive, child))
    results = []
    for receive, child in ends:
        try:
            error, result = receive.recv()
        except EOFError:
            error, result = "a fork ended without a result", None
        child.join()
        if error is not None:
            raise RuntimeError(error)
        results.append(result)
    return results


def _report(
    work: Callable[[int], Any], number: int, send: multiprocessing.connection.Connection, give_back: bool
) -> None:
    try:
        if give_back:
            give_back_freed_blocks()
        send.send((None, work(number)))
    except BaseException:
        send.send((traceback.format_exc(), None))
        raise
    finally:
        send.close()
