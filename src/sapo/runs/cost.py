"""Cost of a run, summed over its log lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo.runs.metrics import (
    CPU_TIME,
    DEVICE_PEAK_MEMORY,
    FINAL_LOSS,
    GENERATE_TIME,
    OPTIMIZER_TIME,
    OVERHEAD_TIME,
    PEAK_MEMORY,
    RUNTIME,
    STEP_TIME,
    TOKENS,
    WORK,
    Metric,
)
from sapo.runs.reading import Run


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a run; None for values that were not logged.

    Attributes:
        steps: optimizer steps.
        wall_seconds: from the first step to the last, without the time between a stop and a resume; for a round,
            including the generation of its pairs.
        cpu_seconds: CPU time of all processes and threads.
        tokens: tokens trained on, without padding; with self-play, including the rejected responses.
        generate_seconds: part of `wall_seconds` for segments, generation and the replay buffer.
        peak_mb: maximum resident memory of the first process.
        device_peak_mb: maximum memory on its accelerator.
    """

    steps: int
    wall_seconds: float | None
    cpu_seconds: float | None
    tokens: int | None
    generate_seconds: float | None
    peak_mb: float | None
    device_peak_mb: float | None


def cost_of(run: Run) -> Cost:
    """Sum the log lines of a run."""
    lines, steps = _lines_and_steps(run)
    accumulation = run.settings.get("gradient_accumulation_steps", 1)

    def total(metric: Metric, weights: Sequence[float]) -> float | None:
        name = metric.name
        parts = [line[name] * weight for line, weight in zip(lines, weights, strict=True) if name in line]
        return sum(parts) if parts else None

    def with_pairs(trained: float | None, kind: str) -> float | None:
        return None if trained is None else trained + run.round.get(f"{kind}_seconds", 0.0)

    once = [1.0] * len(lines)
    tokens = total(TOKENS, once)
    work = [_work(line, accumulation).get(GENERATE_TIME.name) for line in lines]
    seconds = [one * count for one, count in zip(work, steps, strict=True) if one is not None]
    generated = sum(seconds) if seconds else None
    return Cost(
        steps=run.last_step,
        wall_seconds=with_pairs(total(STEP_TIME, steps), "wall"),
        cpu_seconds=with_pairs(total(CPU_TIME, once), "cpu"),
        tokens=None if tokens is None else round(tokens),
        generate_seconds=with_pairs(generated, "wall"),
        peak_mb=max(run.series(PEAK_MEMORY), default=None),
        device_peak_mb=max(run.series(DEVICE_PEAK_MEMORY), default=None),
    )


def time_shares(run: Run) -> dict[str, float]:
    """Share of each part of a run's wall time, by its name in the charts, "other" last; empty if it logged no times.

    Other: all that is no part of a step's work, before its first and after its last step too.
    """
    lines, steps = _lines_and_steps(run)
    accumulation = run.settings.get("gradient_accumulation_steps", 1)
    total = sum(line.get(STEP_TIME.name, 0.0) * count for line, count in zip(lines, steps, strict=True))
    # Of the last start alone; a run that was resumed is longer.
    total = max(total, run.rows[-1].get(RUNTIME.name, 0.0) if run.rows else 0.0)
    if not total:
        return {}
    work = [(_work(line, accumulation), count) for line, count in zip(lines, steps, strict=True)]
    shares = {
        metric.curve.legend: sum(seconds.get(metric.name, 0.0) * count for seconds, count in work) / total
        for metric in WORK
    }
    return shares | {OVERHEAD_TIME.curve.legend: max(0.0, 1 - sum(shares.values()))}


def _work(line: Mapping[str, Any], accumulation: int) -> dict[str, float]:
    """Seconds of a step's parts, as far as they were logged.

    Most are means over micro-batches. The last step of an epoch may have fewer of these than `accumulation`: the parts
    are never longer than the step.
    """
    parts = {
        metric.name: line[metric.name] * (1 if metric is OPTIMIZER_TIME else accumulation)
        for metric in WORK
        if metric.name in line
    }
    whole, step = sum(parts.values()), line.get(STEP_TIME.name)
    scale = min(1.0, step / whole) if step and whole else 1.0
    return {name: seconds * scale for name, seconds in parts.items()}


def _lines_and_steps(run: Run) -> tuple[list[Any], list[float]]:
    """The log lines of a run with the number of optimizer steps of each."""
    lines = list(run.train)
    if run.rows and FINAL_LOSS.name in run.rows[-1]:
        # Steps after the last regular log line; those of an earlier start are in the lines that follow.
        lines.append(run.rows[-1])
    return lines, [line["step"] - before for line, before in zip(lines, [0, *(r["step"] for r in lines)], strict=False)]
