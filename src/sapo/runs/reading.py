"""A run folder as the report sees it: metrics, pairs, options, environment."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError
from sapo.options import one_start, own_options
from sapo.runs.folder import CONFIG_FILE, METRICS_FILE, PAIRS_FILE, RUN_FILE


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a run.

    Attributes:
        name: as on the command line.
        value: what the run used.
        default: of the option; None where it is left to other options or to the machine.
        help: what it does, for the options that are this project's own.
    """

    name: str
    value: Any
    default: Any
    help: str

    @property
    def differs(self) -> bool:
        """Whether the run used another value than the default; what was left unset may have become no or none."""
        unset = self.default in (None, "none") and self.value in (None, False, "", [])
        return bool(self.value != self.default) and not unset


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run folder holds, in the order in which it was written.

    Attributes:
        path: of the folder.
        train: log lines of the training, each with `step`.
        eval: log lines of evaluations.
        end: the last line, with the whole run's figures; empty while it runs.
        pairs: rows of pairs.jsonl.
        options: of the run.
        facts: run.json: model, data, machine, versions.
    """

    path: Path
    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    end: dict[str, Any]
    pairs: list[dict[str, Any]]
    options: list[Option]
    facts: dict[str, Any]

    def series(self, name: str) -> list[float]:
        """The values of a metric of the training, where it was logged."""
        return [row[name] for row in self.train if isinstance(row.get(name), (int, float))]


def read_run(path: Path) -> RunData:
    """Read a run folder, finished or not.

    Raises:
        ConfigurationError: `path` holds no run, or a file of it cannot be read.
    """
    if not (path / METRICS_FILE).is_file() and not (path / CONFIG_FILE).is_file():
        raise ConfigurationError(f"{path}: no {METRICS_FILE} in it. Give the output folder of a run.")
    rows = _lines(path / METRICS_FILE)
    facts = path / RUN_FILE
    return RunData(
        path=path,
        train=[row for row in rows if "loss" in row],
        eval=[row for row in rows if any(name.startswith("eval_") for name in row)],
        end=next((row for row in reversed(rows) if "train_runtime" in row), {}),
        pairs=_lines(path / PAIRS_FILE),
        options=_options(path / CONFIG_FILE),
        facts=json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {},
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    # What follows the last line break is being written by the run.
    try:
        return [json.loads(line) for line in lines[:-1] if line]
    except ValueError as error:
        raise ConfigurationError(f"{file}: a line is not JSON ({error}). Restore the file, or remove it.") from error


def _options(file: Path) -> list[Option]:
    if not file.is_file():
        return []
    used = yaml.safe_load(file.read_text(encoding="utf-8"))
    own = {option.name for option in own_options()}
    options = []
    for field in dataclasses.fields(SAPOConfig):
        if not field.init or field.name in one_start() | {"output_dir"} or field.name not in used:
            continue
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        default = None if default is dataclasses.MISSING else default
        text = str(field.metadata.get("help", "")).replace("%%", "%") if field.name in own else ""
        options.append(Option(field.name, used[field.name], _plain(default), text))
    # What this project adds comes first: it is what a reader looks for.
    return sorted(options, key=lambda option: (option.name not in own, option.name))


def _plain(value: Any) -> Any:
    """A default as the options file spells it."""
    value = value.value if isinstance(value, Enum) else value
    return value if isinstance(value, (bool, int, float, str, list, dict)) or value is None else str(value)
