"""Averages of metrics between two log lines, exact across a resume, and what a process holds of the machine."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import psutil
import torch

from sapo.runs.metrics import DEVICE_PEAK_MEMORY, PEAK_MEMORY, TOTALS, WORK

_WORK = {metric.name for metric in WORK}


class MetricAverages:
    """Sums and counts by name, drained at each log line and kept in checkpoints in between."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self.worked = 0.0
        """Seconds of `WORK` that were ever added."""

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Observe `value`, the mean of `count` observations; of none, nothing."""
        if not count:
            return
        self._sums[name] = self._sums.get(name, 0.0) + value * count
        self._counts[name] = self._counts.get(name, 0.0) + count
        if name in _WORK:
            self.worked += value * count

    def drain(self) -> dict[str, float]:
        """The averages (of `TOTALS` the sums), and start again."""
        averages = {name: total if name in TOTALS else total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return averages

    def absorb(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Count in what another process observed, given as its `state()`.

        Raises:
            ValueError: a sum of no observations.
        """
        for name, total in state["sums"].items():
            if not state["counts"][name] > 0:
                raise ValueError(f"{name} was averaged over nothing")
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0.0) + state["counts"][name]

    def state(self) -> dict[str, dict[str, float]]:
        """For a checkpoint."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from `state()`."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


def clock(device: torch.device) -> float:
    """Seconds for differences, taken when `device` has finished what it was given so far."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def memory_use() -> dict[str, float]:
    """Memory of this process in MB: resident now, the most so far, and the most on its accelerator if it has one."""
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    used = {
        "memory/process_mb": psutil.Process().memory_info().rss / 1e6,
        PEAK_MEMORY.name: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6,
    }
    if torch.accelerator.is_available():
        # MPS does not count it.
        largest = getattr(torch.get_device_module(), "max_memory_allocated", None)
        if largest is not None:
            used[DEVICE_PEAK_MEMORY.name] = largest() / 1e6
    return used
