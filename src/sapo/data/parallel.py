"""Apply a function to blocks of rows, in this process or in several, in the order of the blocks."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Block = TypeVar("Block")
Result = TypeVar("Result")

ROWS_THAT_PAY = 20_000
"""From this many rows on, starting processes takes less time than they save."""
_MOST = 16

_function: Callable[[Any], Any] | None = None


def processes_for(rows: int) -> int:
    """How many processes prepare this many rows in the least time, on the cores that this process may use."""
    if rows < ROWS_THAT_PAY:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Each process of a run on this machine prepares the rows for itself.
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores // beside, _MOST, 2 * rows // ROWS_THAT_PAY))


def in_order(function: Callable[[Block], Result], blocks: Iterable[Block], processes: int) -> Iterator[Result]:
    """The results of `function`, which is sent to each of the processes once.

    Args:
        function: of one block; it and the blocks are pickled if there is more than one process.
        blocks: read a few ahead of the results.
        processes: 1 for this one.
    """
    if processes == 1:
        yield from map(function, blocks)
        return
    # A fork would copy the threads' locks of torch and tokenizers.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(function,)) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(_apply, block))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    # One thread each: the processes are as many as the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = function


def _apply(block: Any) -> Any:
    assert _function is not None
    return _function(block)
