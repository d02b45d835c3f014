"""Which curves the report shows, and how long ones are thinned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

POINTS = 500
"""Beyond this many log lines a curve is shown as the mean, least and greatest of as many groups of lines."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of one or more metrics.

    Attributes:
        title: what is shown.
        unit: of its values; "share" is shown in percent.
        reading: how to read it, in a sentence.
        metrics: name in metrics.jsonl and in the legend.
        tone: colours by meaning ("pair": chosen and rejected) or by order.
    """

    title: str
    unit: str
    reading: str
    metrics: dict[str, str]
    tone: str = "order"


CHARTS = [
    Chart(
        "Loss",
        "nats",
        "What is minimised. The evaluation loss is on fixed pairs and comparable over the run.",
        {"loss": "training", "eval_loss": "evaluation", "nll_loss": "likelihood term"},
    ),
    Chart(
        "Rewards",
        "",
        "Both falling together: the margin is won by sinking the rejected responses. Set a guard.",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        "pair",
    ),
    Chart(
        "Margin",
        "",
        "Reward of the chosen less that of the rejected response.",
        {"rewards/margins": "training", "eval_rewards/margins": "evaluation"},
    ),
    Chart(
        "Chosen preferred",
        "share",
        "Share of pairs with a positive margin.",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"},
    ),
    Chart(
        "Log-probabilities",
        "nats",
        "Of the scored tokens; they vary with the lengths drawn.",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
        "pair",
    ),
    Chart(
        "Likelihood of good answers",
        "nats",
        "Change on the same examples since the start. Below 0 the good answers became less likely.",
        {"self_play/chosen_logp_change": "change since the start"},
    ),
    Chart(
        "Identical and ended",
        "share",
        "New pairs in which the opponent wrote the original, and segments that end the response.",
        {"self_play/identical_fraction": "identical", "self_play/eos_fraction": "with an end token"},
    ),
    Chart(
        "Lengths",
        "tokens",
        "A drift of the rejected length is a warning: preferences can be won by length.",
        {"self_play/rejected_length": "rejected", "self_play/segment_length": "segment"},
    ),
    Chart(
        "Replay buffer: age",
        "steps",
        "Mean age of the stored pairs; it rises until the buffer is full.",
        {"replay/mean_age": "mean age"},
    ),
    Chart(
        "Replay buffer: draws",
        "draws",
        "How often a stored pair has been learnt from, on average.",
        {"replay/mean_draws": "draws a pair"},
    ),
    Chart(
        "Distance of opponent and policy",
        "",
        "Norm of their difference over the norm of the policy: how far the opponent is behind.",
        {"opponent/distance": "relative distance"},
    ),
    Chart("Gradient norm", "", "Before clipping.", {"grad_norm": "gradient norm"}),
    Chart("Learning rate", "", "The schedule as it was.", {"learning_rate": "learning rate"}),
    Chart(
        "Time by part",
        "seconds",
        "Of a micro-batch, and the optimizer of a step.",
        {
            "time/generate": "opponent writes",
            "time/reference": "reference",
            "time/policy": "policy",
            "time/optimizer": "optimizer",
        },
    ),
    Chart("Throughput", "tokens/s", "Tokens of the pairs learnt from, without padding.", {"tokens_per_second": "all"}),
    Chart(
        "Memory",
        "MB",
        "Of the first process; on the device the most since the start.",
        {"memory/process_mb": "process", "memory/device_peak_mb": "device, peak"},
    ),
    Chart(
        "Steps that changed nothing",
        "share",
        "Their loss or gradient was not finite.",
        {"nonfinite_step_fraction": "share of steps"},
    ),
]


def thin(rows: list[dict[str, Any]], names: list[str], points: int = POINTS) -> dict[str, Any]:
    """Series of `names` over the steps of `rows`, as columns.

    Returns:
        `steps`, and for each name that was logged `mean`; where groups of rows were merged also `low` and `high`, so
        that no peak is lost. A value that is missing or not finite is None.
    """
    size = max(1, math.ceil(len(rows) / points))
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    found: dict[str, Any] = {"steps": [group[-1]["step"] for group in groups], "group": size, "series": {}}
    for name in names:
        columns = [[row[name] for row in group if _is_number(row.get(name))] for group in groups]
        if not any(columns):
            continue
        series = {"mean": [_short(sum(values) / len(values)) if values else None for values in columns]}
        if size > 1:
            series["low"] = [_short(min(values)) if values else None for values in columns]
            series["high"] = [_short(max(values)) if values else None for values in columns]
        found["series"][name] = series
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
