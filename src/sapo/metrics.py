"""Averages of metrics between two log lines, exact across a resume, and what a process holds of the machine."""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch


class MetricAverages:
    """Sums and counts by name, drained at each log line and kept in checkpoints in between."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Observe `value`, the mean of `count` observations; of none, nothing."""
        if not count:
            return
        self._sums[name] = self._sums.get(name, 0.0) + value * count
        self._counts[name] = self._counts.get(name, 0.0) + count

    def drain(self) -> dict[str, float]:
        """The averages, and start anew."""
        averages = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return averages

    def absorb(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Count in what another process observed, given as its `state()`."""
        for name, total in state["sums"].items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0.0) + state["counts"][name]

    def state(self) -> dict[str, dict[str, float]]:
        """For a checkpoint."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from `state()`."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


def memory_use() -> dict[str, float]:
    """Memory of this process now and, with CUDA, the most that its tensors have held on the device, in GB."""
    used = {"memory/process_gb": psutil.Process().memory_info().rss / 1e9}
    if torch.cuda.is_available():
        used["memory/device_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return used
