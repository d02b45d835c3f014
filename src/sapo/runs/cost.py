"""Cost of a run, summed over its log lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sapo.runs.metrics import (
    CPU_TIME,
    DEVICE_PEAK_MEMORY,
    FINAL_LOSS,
    GENERATE_TIME,
    PEAK_MEMORY,
    STEP_TIME,
    TOKENS,
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
    lines = run.train
    if run.rows and FINAL_LOSS.name in run.rows[-1]:
        # Steps after the last regular log line; those of an earlier start are in the lines that follow.
        lines = [*lines, run.rows[-1]]
    steps = [line["step"] - before for line, before in zip(lines, [0, *(r["step"] for r in lines)], strict=False)]
    accumulation = run.settings.get("gradient_accumulation_steps", 1)

    def total(metric: Metric, weights: Sequence[float]) -> float | None:
        name = metric.name
        parts = [line[name] * weight for line, weight in zip(lines, weights, strict=True) if name in line]
        return sum(parts) if parts else None

    def with_pairs(trained: float | None, kind: str) -> float | None:
        return None if trained is None else trained + run.round.get(f"{kind}_seconds", 0.0)

    once = [1.0] * len(lines)
    tokens = total(TOKENS, once)
    return Cost(
        steps=run.last_step,
        wall_seconds=with_pairs(total(STEP_TIME, steps), "wall"),
        cpu_seconds=with_pairs(total(CPU_TIME, once), "cpu"),
        tokens=None if tokens is None else round(tokens),
        generate_seconds=with_pairs(total(GENERATE_TIME, [step * accumulation for step in steps]), "wall"),
        peak_mb=max(run.series(PEAK_MEMORY), default=None),
        device_peak_mb=max(run.series(DEVICE_PEAK_MEMORY), default=None),
    )
