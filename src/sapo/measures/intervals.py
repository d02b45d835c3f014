"""Uncertainty by bootstrap over examples. Pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
"""Bootstrap resamples behind a standard error."""
HALVES = 40
"""Number of random halves for corpus statistics, which the repetitions of a bootstrap would bias."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: the estimate.
        stderr: its standard error; None if unknown.
        low: lower end of the 95 % interval.
        high: its upper end.
        count: number of examples.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    count: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Estimate:
        """From `as_dict()`."""
        return cls(**stored)

    @classmethod
    def normal(cls, value: float, stderr: float | None, count: int) -> Estimate:
        """With the interval of a normal distribution; without a standard error, with none."""
        low, high = (None, None) if stderr is None else (value - 1.96 * stderr, value + 1.96 * stderr)
        return cls(value, stderr, low, high, count)

    @classmethod
    def exact(cls, value: float, count: int) -> Estimate:
        """A number without uncertainty, such as a mean length of the data."""
        return cls.normal(float(value), None, count)


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """Ratio of sums, with a percentile bootstrap over examples; without denominators, a mean.

    Args:
        numerators: one per example.
        denominators: one per example, such as its number of tokens.
        seed: seed of the resampling.
        resamples: number of resamples; with 0 no error is estimated.

    Returns:
        None without examples, or when the denominators sum to 0.
    """
    above = np.asarray(numerators, dtype=float)
    below = np.ones_like(above) if denominators is None else np.asarray(denominators, dtype=float)
    if not len(above) or not below.sum():
        return None
    value = float(above.sum() / below.sum())
    if len(above) == 1 or not resamples:
        return Estimate.normal(value, None, len(above))
    drawn = np.random.default_rng(seed).multinomial(len(above), np.full(len(above), 1 / len(above)), size=resamples)
    totals = drawn @ below
    ratios = (drawn @ above)[totals != 0] / totals[totals != 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(value, float(ratios.std(ddof=1)), float(low), float(high), len(above))


def paired_change(
    after: Sequence[float], before: Sequence[float], *, weights: Sequence[float] | None = None
) -> Estimate | None:
    """Mean of after - before over the same examples, in which common effects cancel; `weights` are denominators."""
    return bootstrap_ratio(np.subtract(after, before).tolist(), weights)


def over_halves(
    size: int, statistic: Callable[[list[int], list[int]], float | None], *, seed: int = 0, halves: int = HALVES
) -> Estimate | None:
    """A statistic of two halves of the examples, given as indices, averaged over random halvings.

    The spread over halves estimates the standard error on all examples (delete-half jackknife, Shao and Wu 1989), and
    no response occurs twice, which would bias the variety of a corpus. None with fewer than 4 examples, or if the
    statistic is not defined.
    """
    if size < 4:
        return None
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(halves):
        order = rng.permutation(size)
        value = statistic(sorted(order[: size // 2].tolist()), sorted(order[size // 2 :].tolist()))
        if value is not None and math.isfinite(value):
            values.append(value)
    if len(values) < 2:
        return None
    return Estimate.normal(float(np.mean(values)), float(np.std(values, ddof=1)), size)
