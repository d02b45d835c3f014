"""The charts of the report and the model card, and the thinning of long curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sapo.runs.gain_curves import is_number
from sapo.runs.metrics import EVAL, LOCAL, METRICS, STEP_TIME, TOKENS
from sapo.runs.reading import Run

POINTS = 500
"""Maximum points of a curve; longer ones are shown as mean, minimum and maximum of this many groups of lines."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of one or more metrics.

    Attributes:
        title: heading of the chart.
        unit: unit of its values; "share" is shown in percent.
        reading: how to read it, in one sentence.
        tone: colours by meaning ("pair": chosen and rejected) or by order.
        on_card: whether the model card shows it.
        local: names of local measures (`eval_local/...`) that it shows, with their names in the legend.
    """

    title: str
    unit: str
    reading: str
    tone: str = "order"
    on_card: bool = False
    local: Mapping[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, str]:
        """Names in metrics.jsonl and in the legend; evaluation metrics come last."""
        own = [metric for metric in METRICS if metric.curve.chart == self.title]
        return (
            {metric.name: metric.curve.legend for metric in own}
            | {EVAL + metric.name: metric.curve.eval_legend for metric in own if metric.curve.eval_legend}
            | {LOCAL + name: legend for name, legend in self.local.items()}
        )

    def to_json(self) -> dict[str, Any]:
        """For the page's script."""
        return {
            "title": self.title,
            "unit": self.unit,
            "reading": self.reading,
            "metrics": self.metrics,
            "tone": self.tone,
        }


CHARTS = [
    Chart(
        "Loss",
        "nats",
        "What is minimised. The evaluation loss is on fixed pairs and comparable over the run.",
        on_card=True,
    ),
    Chart(
        "Rewards",
        "",
        "If both fall, the margin rises only because the rejected responses fall faster: set a guard.",
        "pair",
        on_card=True,
    ),
    Chart("Margin", "", "Reward of the chosen less that of the rejected response."),
    Chart("Accuracy", "share", "Share of pairs with a positive margin.", on_card=True),
    Chart("Log-probabilities", "nats", "Of the scored tokens; they vary with the lengths drawn.", "pair"),
    Chart(
        "Likelihood of the chosen responses",
        "nats per token",
        "Change on the same examples since the start. Below 0, the chosen responses became less likely.",
        on_card=True,
    ),
    Chart(
        "Samples at evaluations: likelihood",
        "nats",
        "With eval_local. Falling nll is good; the gap is that of the data's responses to the model's own samples.",
        local={"nll": "nll per token", "gap_to_own": "gap to own samples"},
    ),
    Chart(
        "Samples at evaluations: shares",
        "share",
        "With eval_local. Falling EOS or rising loops: the model is being harmed.",
        local={"ended": "with an EOS token", "loops": "ending in a loop", "prefers_data_to_own": "prefers data to own"},
    ),
    Chart(
        "Samples at evaluations: lengths",
        "tokens",
        "With eval_local. The model's samples against the data.",
        local={"length": "samples", "length_data": "data"},
    ),
    Chart(
        "Identical pairs and EOS tokens",
        "share",
        "New pairs in which the opponent generated the original, and segments that end the response.",
    ),
    Chart("Lengths", "tokens", "A drift of the rejected length is a warning: preferences can be won by length."),
    Chart("Replay buffer: age", "steps", "Mean age of the stored pairs; rises until the buffer is full."),
    Chart("Replay buffer: draws", "draws", "How often a stored pair has been trained on, on average."),
    Chart(
        "Distance between opponent and policy",
        "",
        "Norm of their difference over the norm of the policy: how far the opponent lags behind.",
    ),
    Chart(
        "Distance from the start",
        "nats per token",
        "What the policy moved by, on replies of the start. On general prompts it is what may be lost.",
    ),
    Chart("Gain on evaluation rows", "nats per token", "Rise of their log-likelihood since the start."),
    Chart("Gradient norm", "", "Norm before clipping."),
    Chart("Learning rate", "", "The schedule's value."),
    Chart("Time by part", "seconds", "Seconds per micro-batch; for the optimizer, per step."),
    Chart("Throughput", "tokens/s", "Tokens of the pairs trained on, without padding."),
    Chart("Memory", "MB", "Memory of the first process; on the device, the maximum since the start."),
    Chart("Steps that changed nothing", "share", "Steps with a non-finite loss or gradient."),
    Chart("Weights changed by a step", "share", "Near 0: the steps are rounded away; use float32 or a master."),
]


def curves(run: Run, charts: list[Chart], points: int = POINTS) -> dict[str, dict[str, Any]]:
    """The series of `charts`: "train" and "eval", each from `thin`."""
    names = [name for chart in charts for name in chart.metrics]
    train = thin(run.train, [name for name in names if not name.startswith(EVAL)], points)
    return {
        "train": train | {"axes": axes(run, points)},
        "eval": thin(run.eval, [name for name in names if name.startswith(EVAL)], points),
    }


def axes(run: Run, points: int = POINTS) -> dict[str, list[float]]:
    """What else curves can be drawn over, at the steps of `thin`: epochs, hours and millions of tokens so far."""
    rows = run.train
    steps = [0, *(row["step"] for row in rows)]
    sums: dict[str, list[float]] = {"epoch": [], "hours": [], "tokens": []}
    hours = tokens = 0.0
    for before, row in zip(steps, rows, strict=False):
        hours += row.get(STEP_TIME.name, 0.0) * (row["step"] - before) / 3600
        tokens += row.get(TOKENS.name, 0) / 1e6
        for name, value in (("epoch", row.get("epoch", 0.0)), ("hours", hours), ("tokens", tokens)):
            sums[name].append(value)
    size = max(1, math.ceil(len(rows) / points))
    ends = [min(first + size, len(rows)) - 1 for first in range(0, len(rows), size)]
    return {name: [_rounded(values[end]) for end in ends] for name, values in sums.items() if values and values[-1] > 0}


def thin(rows: list[dict[str, Any]], names: list[str], points: int = POINTS) -> dict[str, Any]:
    """Series of `names` over the steps of `rows`, as columns.

    Returns:
        `steps`, and for each logged name `mean`; for merged groups of rows also `low` and `high`, so that peaks stay
        visible; and `at`, the places of `steps` that have it, if not all do. Non-finite values are None.
    """
    size = max(1, math.ceil(len(rows) / points))
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    found: dict[str, Any] = {"steps": [group[-1]["step"] for group in groups], "group": size, "series": {}}
    for name in names:
        at = [place for place, group in enumerate(groups) if any(row.get(name) is not None for row in group)]
        columns = [[row[name] for row in groups[place] if is_number(row.get(name))] for place in at]
        if not any(columns):
            continue
        series: dict[str, Any] = {
            "mean": [_rounded(sum(values) / len(values)) if values else None for values in columns]
        }
        if size > 1:
            series["low"] = [_rounded(min(values)) if values else None for values in columns]
            series["high"] = [_rounded(max(values)) if values else None for values in columns]
        if len(at) < len(groups):
            series["at"] = at
        found["series"][name] = series
    return found


def _rounded(value: float) -> float:
    """Round to five digits, which keeps the page small."""
    return float(f"{value:.5g}")
