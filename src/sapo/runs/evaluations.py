"""Results of `sapo evaluate` in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.errors import ConfigurationError
from sapo.runs.files import read_object
from sapo.runs.layout import EVALUATION_FILES


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Results of one model on one suite.

    Attributes:
        suite: name of the suite.
        model: name or path of the model in the results.
        role: "policy", "opponent", "start" or "model".
        measures: `value` and perhaps `stderr` of each measure, by name.
        changes: the same of its paired change from the start model; empty without one.
    """

    suite: str
    model: str
    role: str
    measures: dict[str, dict[str, Any]]
    changes: dict[str, dict[str, Any]]


def read_evaluations(folder: Path) -> list[Evaluated]:
    """All results in a run folder, in the order of the files; a file with something else is refused."""
    found: list[Evaluated] = []
    for file in (folder / name for name in EVALUATION_FILES):
        if not file.is_file():
            continue
        content = read_object(file)
        try:
            for suite, results in content["suites"].items():
                for model, result in results["models"].items():
                    measures, changes = result["measures"], result.get("change_from_start", {})
                    for one in (*measures.values(), *changes.values()):
                        float(one["value"])
                    found.append(Evaluated(suite, model, result.get("role", "model"), measures, changes))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigurationError(f"{file}: not results of an evaluation ({error!r}). Move it away.") from error
    return found
