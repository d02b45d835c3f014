"""What a run folder tells: its settings, its metrics, and what it has cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sapo.commands.rounds import DONE_FILE
from sapo.errors import ConfigurationError
from sapo.options import not_compared
from sapo.runs.folder import CONFIG_FILE, METRICS_FILE, RECIPE_FILE


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run has cost; None where it does not say.

    Attributes:
        steps: optimizer steps.
        wall_seconds: from the first step to the last, without the time between a stop and a resume; of a round,
            with the time to write its pairs.
        cpu_seconds: of all processes and threads.
        tokens: learnt from, without padding; of self-play the rejected responses are among them.
        generate_seconds: of `wall_seconds`, for segments, the opponent's text and the replay buffer.
        peak_mb: most resident memory of the first process.
        device_peak_mb: most memory on its accelerator.
    """

    steps: int
    wall_seconds: float | None
    cpu_seconds: float | None
    tokens: int | None
    generate_seconds: float | None
    peak_mb: float | None
    device_peak_mb: float | None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run.

    Attributes:
        name: its folder, as short as tells it from the others.
        folder: where it lies.
        settings: every option of the run, and model and data where the run has ended.
        rows: lines of its metrics, oldest first.
        written: of a round, what its pairs were and what it took to write them before the first step.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    written: dict[str, float] = field(default_factory=dict)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Step and value wherever the metric was logged as a number."""
        return [(row["step"], row[metric]) for row in self.rows if isinstance(row.get(metric), (int, float))]

    def last(self, metric: str) -> float | None:
        """The value logged last."""
        curve = self.curve(metric)
        return curve[-1][1] if curve else None

    def metrics(self) -> list[str]:
        """Names of all metrics."""
        return sorted({name for row in self.rows for name in row} - {"step"})

    def cost(self) -> Cost:
        """Add up what the lines tell."""
        lines = [row for row in self.rows if "loss" in row]
        if self.rows and "train_loss" in self.rows[-1]:
            # The steps after the last regular line; of an earlier start they are in the lines that follow.
            lines.append(self.rows[-1])
        steps = [line["step"] - before for line, before in zip(lines, [0, *(r["step"] for r in lines)], strict=False)]
        accumulation = self.settings.get("gradient_accumulation_steps", 1)

        def total(metric: str, weights: Sequence[float]) -> float | None:
            parts = [line[metric] * weight for line, weight in zip(lines, weights, strict=True) if metric in line]
            return sum(parts) if parts else None

        def with_writing(trained: float | None, kind: str) -> float | None:
            return None if trained is None else trained + self.written.get(f"{kind}_seconds", 0.0)

        once = [1.0] * len(lines)
        tokens = total("tokens", once)
        return Cost(
            steps=max((row["step"] for row in self.rows), default=0),
            wall_seconds=with_writing(total("time/step", steps), "wall"),
            cpu_seconds=with_writing(total("time/cpu", once), "cpu"),
            tokens=None if tokens is None else round(tokens),
            generate_seconds=with_writing(total("time/generate", [step * accumulation for step in steps]), "wall"),
            peak_mb=_most(self.curve("memory/peak_mb")),
            device_peak_mb=_most(self.curve("memory/device_peak_mb")),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, for other programs."""
        return {
            "folder": str(self.folder),
            "settings": self.settings,
            "cost": asdict(self.cost()),
            "last": {name: self.last(name) for name in self.metrics() if self.curve(name)},
            "curves": {name: curve for name in self.metrics() if (curve := self.curve(name))},
        }


def read_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """Read run folders; one that holds rounds stands for all of them.

    Raises:
        ConfigurationError: a folder that is not a run's, or a file in it that cannot be read.
    """
    found = []
    for folder in folders:
        rounds = sorted(folder.glob(f"round-*/{METRICS_FILE}"), key=lambda file: _number(file.parent))
        found += [file.parent for file in rounds] if rounds else [folder]
    names = _short_names(found)
    return [_read(folder, name) for folder, name in zip(found, names, strict=True)]


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, each with its value in each; None where a run does not say."""
    names = sorted({name for run in runs for name in run.settings} - not_compared())
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: value for name, value in values.items() if any(v != value[0] for v in value[1:])}


def _read(folder: Path, name: str) -> RunRecord:
    metrics = folder / METRICS_FILE
    if not metrics.is_file():
        raise ConfigurationError(f"{folder}: no {METRICS_FILE} here. Name a folder that sapo train has written.")
    settings: dict[str, Any] = {}
    for file in (folder / CONFIG_FILE, folder / RECIPE_FILE):
        if file.is_file():
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ConfigurationError(f"{file}: not valid YAML ({' '.join(str(error).split())}).") from error
            if members := content.pop("datasets", None):
                content["dataset_name"] = " + ".join(str(member["path"]) for member in members)
            settings |= {key: value for key, value in content.items() if key not in settings}
    rows = []
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{metrics}, line {number}: not a line of metrics ({error}).") from error
        rows.append(row)
    round = folder / DONE_FILE
    written = json.loads(round.read_text(encoding="utf-8"))["pairs"] if round.is_file() else {}
    return RunRecord(name, folder, settings, rows, written)


def _short_names(folders: Sequence[Path]) -> list[str]:
    """As few last parts of each path as tell all apart."""
    whole = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, whole), default=1)):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(folder) for folder in folders]


def _number(folder: Path) -> int:
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0


def _most(curve: list[tuple[int, float]]) -> float | None:
    return max((value for _, value in curve), default=None)
