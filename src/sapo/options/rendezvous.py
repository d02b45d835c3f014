"""What the environment says of the processes of a run, and what is told while one waits for the others."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Set by torchrun, accelerate and MPI."""
LEFT_OVER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Set by a launcher; one that is left over makes a run wait for processes that nobody has started."""
_PATIENCE = 20.0
"""Seconds of waiting before it is told; those of one launcher take about as long to import their libraries."""


def processes_told() -> int:
    """Number of processes that the environment tells of; 1 without a launcher."""
    sizes = [os.environ.get(name, "") for name in _SIZES]
    return max([1, *(int(size) for size in sizes if size.isdecimal())], default=1)


def waiting_line(environment: Mapping[str, str], processes: int) -> str:
    """What a process waits for, and which variables to unset if they are left over."""
    left = [name for name in LEFT_OVER if name in environment]
    place = f"{environment.get('MASTER_ADDR', 'localhost')}:{environment.get('MASTER_PORT', '29500')}"
    return (
        f"Waiting for the other processes: the environment says that this is process {environment.get('RANK', '0')} of "
        f"{processes}, which meet at {place}. If no launcher has set these variables, unset {' '.join(left)}."
    )


@contextmanager
def waiting_told(patience: float = _PATIENCE) -> Iterator[None]:
    """Say on standard error what is waited for, if the block takes longer than `patience` seconds.

    Of the processes of one launcher the first says it.
    """
    processes = processes_told()
    if processes == 1 or (os.environ.get("TORCHELASTIC_RUN_ID") and os.environ.get("RANK", "0") != "0"):
        yield
        return
    line = waiting_line(os.environ, processes)
    timer = threading.Timer(patience, lambda: sys.stderr.write(f"{line}\n"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
