"""Gain against distance from the start, along a run: what two runs are compared by, instead of equal steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from sapo.runs.metrics import EVAL, RETENTION_GAIN, RETENTION_GENERAL, RETENTION_TASK, Metric
from sapo.runs.reading import Run

DISTANCES: tuple[Metric, ...] = (RETENTION_GENERAL, RETENTION_TASK)
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Levels of gain that runs are compared at, as shares of the largest gain that all of them reach."""

Point = tuple[int, float, float]
"""Step, gain and distance, both in nats per token."""


def gain_curve(run: Run, distance: Metric) -> list[Point]:
    """The run's evaluations, the start first: it has neither gained nor moved. Empty without evaluations."""
    names = (EVAL + RETENTION_GAIN.name, EVAL + distance.name)
    found = [
        (row["step"], row[names[0]], row[names[1]])
        for row in run.rows
        if row["step"] > 0 and all(is_number(row.get(name)) for name in names)
    ]
    return [(0, 0.0, 0.0), *found] if found else []


def distance_at(curve: Sequence[Point], gain: float) -> float | None:
    """Distance where the curve first reaches `gain`, between evaluations on a straight line; None if it never does."""
    for (_, low, near), (_, high, far) in pairwise(curve):
        if low < gain <= high:
            return near + (far - near) * (gain - low) / (high - low)
    return 0.0 if gain <= 0 else None


def common_gains(curves: Sequence[Sequence[Point]]) -> list[float]:
    """`SHARES` of the largest gain that every curve reaches; empty if one of them gained nothing."""
    reached = min((max(gain for _, gain, _ in curve) for curve in curves if curve), default=0.0)
    return [share * reached for share in SHARES] if reached > 0 else []


def is_number(value: object) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)
