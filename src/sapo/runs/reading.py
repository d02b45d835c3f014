"""The one reader of a run folder: metrics, pairs, options, recipe and facts of a run, finished or unfinished."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo import options as declared
from sapo.errors import ConfigurationError
from sapo.runs.files import read_json_lines, read_object
from sapo.runs.layout import (
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    PAIRS_FILE,
    RECIPE_FILE,
    ROUND_FILE,
    ROUND_FOLDER,
    RUN_FILE,
)
from sapo.runs.metrics import EVAL, LOSS, RUNTIME, Metric

_PAIR_FIELDS = {"step": int, "kind": str, "prompt": str, "chosen": list, "rejected": list}


_DERIVED = ("do_eval", "debug", "max_prompt_length", "dataloader_pin_memory", "eval_steps")
"""Options whose value follows from others where it is not set."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One option of a run.

    Attributes:
        name: name on the command line.
        value: value in the run.
        default: default of the option; None if it depends on other options or on the machine.
        help: help text, for this project's own options.
    """

    name: str
    value: Any
    default: Any
    help: str
    was_set: bool | None = None
    """Whether the recipe sets it; None if there is no recipe."""

    @property
    def differs(self) -> bool:
        """Whether the user set it or, of a run without recipe, its value differs from the default.

        An unset option may have become no or none, or what follows from others.
        """
        if self.was_set is not None:
            return self.was_set
        if self.name in _DERIVED:
            return False
        unset = self.default in (None, "none") and self.value in (None, False, "", [])
        return bool(self.value != self.default) and not unset


@dataclass(frozen=True, slots=True)
class Run:
    """Contents of a run folder.

    Attributes:
        path: path of the folder.
        rows: all lines of metrics, oldest first, each with `step`.
        pairs: pairs kept with their texts, oldest first.
        config: every option of the run; empty if it has not started.
        recipe: the options set by the user; empty if the run was not started from the command line.
        facts: model, data, machine and versions.
        round: for a finished round of `num_rounds`, statistics and cost of its pairs.
        broke_off: whether its process on this machine has gone without an end, as after a crash.
    """

    path: Path
    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    config: dict[str, Any]
    recipe: dict[str, Any]
    facts: dict[str, Any]
    round: dict[str, float]
    broke_off: bool = False

    @property
    def train(self) -> list[dict[str, Any]]:
        """Log lines of training."""
        return [row for row in self.rows if LOSS.name in row]

    @property
    def eval(self) -> list[dict[str, Any]]:
        """Log lines of evaluations."""
        return [row for row in self.rows if any(name.startswith(EVAL) for name in row)]

    @property
    def end(self) -> dict[str, Any]:
        """The last line, with the totals of the run; empty while it is running, also again after an earlier end."""
        found: dict[str, Any] = next((row for row in reversed(self.rows) if row.keys() & {RUNTIME.name, LOSS.name}), {})
        return found if RUNTIME.name in found else {}

    @property
    def last_step(self) -> int:
        """Optimizer steps so far."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def pairs_per_step(self) -> int:
        """Pairs (or examples) that an optimizer step trains on, over all processes; 1 if the options are unknown."""
        sizes = [self.config.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
        counts = [size for size in [*sizes, self.facts.get("processes")] if isinstance(size, int)]
        return math.prod(counts)

    @property
    def settings(self) -> dict[str, Any]:
        """Every option by name, including those of model and data; the names of a mixture's datasets are joined."""
        recipe = dict(self.recipe)
        if members := recipe.pop("datasets", None):
            recipe["dataset_name"] = " + ".join(str(member["path"]) for member in members)
        return recipe | self.config

    def options(self) -> list[Setting]:
        """The options of the run with their defaults: this project's own first, then by name."""
        hidden = {*declared.one_start(), "output_dir"}
        known = [one for one in declared.options() if one.name in self.config and one.name not in hidden]
        known.sort(key=lambda one: (one.kind != "own", one.name))
        return [
            Setting(
                one.name,
                self.config[one.name],
                one.default,
                one.help if one.kind == "own" else "",
                one.name in self.recipe if self.recipe else None,
            )
            for one in known
        ]

    def metrics(self) -> list[str]:
        """Names of all metrics that were logged."""
        return sorted({name for row in self.rows for name in row} - {"step"})

    def curve(self, metric: Metric | str) -> list[tuple[int, float]]:
        """Steps and values where the metric was logged as a number."""
        name = metric.name if isinstance(metric, Metric) else metric
        return [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), (int, float))]

    def series(self, metric: Metric | str) -> list[float]:
        """The values of `curve`."""
        return [value for _, value in self.curve(metric)]

    def last(self, metric: Metric | str) -> float | None:
        """The last logged value; None if there is none."""
        values = self.series(metric)
        return values[-1] if values else None


def is_run(folder: Path) -> bool:
    """Whether this is the output folder of a run, finished or unfinished."""
    return any((folder / name).is_file() for name in (METRICS_FILE, CONFIG_FILE, RECIPE_FILE))


def broke_off(folder: Path) -> bool:
    """Whether the process that holds the folder's lock ran on this machine and has gone."""
    try:
        owner = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        if owner["host"] == socket.gethostname():
            os.kill(owner["process"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pass  # no lock, one that is being written, or another user's process
    return False


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or unfinished.

    Raises:
        ConfigurationError: the folder contains no run, or a file cannot be read.
    """
    if not (folder / METRICS_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "no such folder"
            raise ConfigurationError(f"{folder}: {what}. Use the output folder of a run.")
        raise ConfigurationError(f"{folder}: contains no {METRICS_FILE}. Use the output folder of a run.")
    return Run(
        path=folder,
        rows=read_json_lines(folder / METRICS_FILE, {"step": int}),
        pairs=read_json_lines(folder / PAIRS_FILE, _PAIR_FIELDS),
        config=read_object(folder / CONFIG_FILE),
        recipe=read_object(folder / RECIPE_FILE),
        facts=read_object(folder / RUN_FILE),
        round=read_object(folder / ROUND_FILE).get("pairs", {}),
        broke_off=broke_off(folder),
    )


def expand_rounds(folders: Iterable[Path]) -> list[Path]:
    """Run folders; a folder with rounds is replaced by its started rounds, in order."""
    found: list[Path] = []
    for folder in folders:
        rounds = [file.parent for file in folder.glob(f"{ROUND_FOLDER.format(number='*')}/{METRICS_FILE}")]
        alone = (folder / METRICS_FILE).is_file() or not rounds
        found += [folder] if alone else sorted(rounds, key=_round_number)
    return found


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest distinct path suffixes of the folders; duplicates get a number."""
    paths = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({parts[-depth:] for parts in paths}) < len(set(paths)):
        depth += 1
    names = ["/".join(parts[-depth:]) for parts in paths]
    return [
        f"{name} ({names[:index].count(name) + 1})" if name in names[:index] else name
        for index, name in enumerate(names)
    ]


def start_of(folder: Path) -> str | None:
    """The model that a run started from, a folder or a Hub id; None if unknown."""
    named = recipe_option(folder, "model_name_or_path")
    return named if named is not None else read_object(folder / RUN_FILE).get("model")


def recipe_option(folder: Path, name: str) -> str | None:
    """An option of the run's recipe as text; None if unset."""
    value = read_object(folder / RECIPE_FILE).get(name)
    return None if value is None else str(value)


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that differ between runs, with their value in each run; None if unknown."""
    settings = [run.settings for run in runs]
    names = sorted({name for one in settings for name in one} - declared.not_compared())
    values = {name: [one.get(name) for one in settings] for name in names}
    return {name: value for name, value in values.items() if any(v != value[0] for v in value[1:])}


def _round_number(folder: Path) -> float:
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else math.inf
