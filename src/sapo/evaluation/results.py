"""Results of a suite, and results.json: models side by side, with standard errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sapo.errors import EvaluationError, brief
from sapo.evaluation.store import alone, write_result
from sapo.evaluation.targets import Target
from sapo.measures.intervals import Estimate, paired_change
from sapo.runs.origin import package_versions

RESULTS_FILE = "results.json"
FORMAT = 1


@dataclass
class SuiteResult:
    """Results of one model on one suite.

    Attributes:
        measures: estimates by name, in the order of the table.
        items: for measures that are means over examples: the value of each example by its name, for paired
            comparisons of two models.
        weights: for ratios of sums: the denominator of each example, equal for every model.
        notes: remarks for the reader: what was dropped or truncated, and departures from published numbers.
    """

    measures: dict[str, Estimate] = field(default_factory=dict)
    items: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def changes(after: SuiteResult, before: SuiteResult) -> dict[str, Estimate]:
    """Paired change of each measure on common examples, in which their difficulty cancels."""
    found = {}
    for name, values in after.items.items():
        common = sorted(values.keys() & before.items.get(name, {}).keys())
        weights = after.weights.get(name)
        if weights is not None and weights != before.weights.get(name):
            continue  # different tokenization: not comparable
        change = paired_change(
            [values[key] for key in common],
            [before.items[name][key] for key in common],
            weights=None if weights is None else [weights[key] for key in common],
        )
        if change is not None:
            found[name] = change
    return found


def changes_from_start(targets: Sequence[Target], results: Mapping[str, SuiteResult]) -> dict[str, dict[str, Estimate]]:
    """By name of the model, `changes` from the start model; empty for that itself, and where there is none."""
    start = next((target.name for target in targets if target.role == "start"), None)
    return {
        target.name: {} if start in (None, target.name) else changes(results[target.name], results[str(start)])
        for target in targets
    }


def as_json(
    settings: Mapping[str, Any],
    targets: Sequence[Target],
    fingerprints: Mapping[str, str],
    results: Mapping[str, SuiteResult],
) -> dict[str, Any]:
    """Everything about one suite, for results.json."""
    moved = changes_from_start(targets, results)
    return {
        "evaluated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "packages": package_versions(),
        "settings": dict(settings),
        "models": {
            target.name: {
                "path": target.path,
                "role": target.role,
                "base": target.base,
                "fingerprint": fingerprints[target.name],
                "measures": {name: one.as_dict() for name, one in results[target.name].measures.items()},
                "change_from_start": {name: one.as_dict() for name, one in moved[target.name].items()},
                "notes": results[target.name].notes,
            }
            for target in targets
        },
    }


def write(folder: Path, suite: str, found: Mapping[str, Any]) -> Path:
    """Write one suite's results into results.json; results of other suites, of this moment too, are kept."""
    file = folder / RESULTS_FILE
    with alone(folder):
        suites = _suites(file) if file.exists() else {}
        suites[suite] = found
        write_result(file, json.dumps({"format": FORMAT, "suites": suites}, indent=1, ensure_ascii=False) + "\n")
    return file


def _suites(file: Path) -> dict[str, Any]:
    try:
        suites = json.loads(file.read_text(encoding="utf-8"))["suites"]
        if not isinstance(suites, dict):
            raise TypeError("suites is no mapping")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{file} is not a results file ({brief(error)}). Move it away and rerun the same "
            "command: finished parts are kept."
        ) from error
    return suites
