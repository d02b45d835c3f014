"""Win rate adjusted for answer length, by logistic regression. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sapo.measures.intervals import Estimate

_RIDGE = 0.01
"""Ridge penalty: keeps the coefficients finite if one side always wins."""
_RESAMPLES = 400

DEPARTURES = (
    "length_adjusted_win_rate is not AlpacaEval's length-controlled win rate: it has no term for the difficulty of "
    "each instruction, no weighted games of the baseline against itself (both need files of that project), and a "
    "ridge instead of a cross-validated lasso. Compare it only with itself."
)


def length_adjusted_win_rate(
    preferences: Sequence[float], lengths: Sequence[int], baseline_lengths: Sequence[int], *, seed: int = 0
) -> Estimate | None:
    """Fit logit P(model preferred) = a + b tanh(difference of lengths / its standard deviation); give sigmoid(a).

    After Dubois et al. 2024 (arXiv 2404.04475), section 3, with the departures listed in `DEPARTURES`. None with fewer
    than 10 instructions.

    Args:
        preferences: probability that the model's answer is preferred, one per instruction, in [0, 1].
        lengths: characters of the model's answers.
        baseline_lengths: characters of the baseline's answers.
        seed: seed of the bootstrap over instructions.
    """
    wins = np.asarray(preferences, dtype=float)
    if len(wins) < 10:
        return None
    difference = np.subtract(lengths, baseline_lengths).astype(float)
    spread = difference.std(ddof=1)
    feature = np.tanh(difference / spread) if spread else np.zeros_like(difference)
    value = _at_equal_length(wins, feature)
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(len(wins), size=len(wins)) for _ in range(_RESAMPLES)]
    values = np.array([_at_equal_length(wins[places], feature[places]) for places in drawn])
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(value, float(values.std(ddof=1)), float(low), float(high), len(wins))


def _at_equal_length(wins: NDArray[np.float64], feature: NDArray[np.float64]) -> float:
    design = np.stack([np.ones_like(feature), feature], 1)
    coefficients = np.zeros(2)
    for _ in range(50):
        predicted = _sigmoid(design @ coefficients)
        gradient = design.T @ (predicted - wins) + _RIDGE * coefficients
        curvature = (design * (predicted * (1 - predicted))[:, None]).T @ design + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        # A full Newton step may overshoot where all predictions are near 0 or 1.
        coefficients -= step * min(1.0, 4.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return float(_sigmoid(coefficients[:1])[0])


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -x))
