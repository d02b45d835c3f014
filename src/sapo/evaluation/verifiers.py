"""Verifiers of responses: pure functions of text."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sapo.errors import ConfigurationError, DatasetError

Row: TypeAlias = Mapping[str, Any]
Verifier: TypeAlias = Callable[[str, Row], float]
"""Maps response and row to a score between 0 (wrong) and 1 (correct)."""

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


def exact_match(response: str, answer: str, *, ignore_case: bool = False) -> bool:
    """Whether response and answer are equal after normalizing white space."""
    ours, theirs = " ".join(response.split()), " ".join(answer.split())
    return ours.casefold() == theirs.casefold() if ignore_case else ours == theirs


def last_number(text: str) -> float | None:
    """The last number in a text, commas between thousands allowed; None without one."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def numeric(response: str, answer: str, *, tolerance: float = 1e-6) -> bool:
    """Whether the last numbers of response and answer agree within a relative tolerance.

    A worked answer such as GSM8K's ("... #### 18") can be used unchanged.
    """
    ours, theirs = last_number(response), last_number(answer)
    if ours is None or theirs is None:
        return False
    return abs(ours - theirs) <= tolerance * max(1.0, abs(theirs))


def regex(response: str, pattern: re.Pattern[str], answer: str | None) -> bool:
    """Whether the pattern occurs; with an answer, whether its last match (or first group) equals the answer."""
    found = list(pattern.finditer(response))
    if not found or answer is None:
        return bool(found)
    last = found[-1]
    return exact_match(last.group(1) if pattern.groups else last.group(0), answer)


def make_verifier(task: Mapping[str, Any], where: str, folder: Path) -> Verifier:
    """Create the verifier of a task, whose file lies in `folder`, as does the module of a callable."""
    name = str(task.get("verifier", "exact_match"))
    if name == "exact_match":
        ignore_case = bool(task.get("ignore_case", False))
        return lambda response, row: float(exact_match(response, str(row["answer"]), ignore_case=ignore_case))
    if name == "numeric":
        tolerance = float(task.get("tolerance", 1e-6))
        return lambda response, row: float(numeric(response, str(row["answer"]), tolerance=tolerance))
    if name == "regex":
        if "pattern" in task:
            _compiled(task["pattern"], where)

        def verify(response: str, row: Row) -> float:
            pattern = _compiled(row.get("pattern", task.get("pattern")), where)
            answer = row.get("answer")
            return float(regex(response, pattern, None if answer is None else str(answer)))

        return verify
    if ":" in name:
        return _imported(name, where, folder)
    raise ConfigurationError(
        f"{where}: verifier {name!r} is unknown; use exact_match, regex, numeric or module:function."
    )


def missing_field(task: Mapping[str, Any], row: Row) -> str | None:
    """The field that a row lacks for the verifier of its task; None if complete or if the verifier is a callable."""
    name = str(task.get("verifier", "exact_match"))
    if name in ("exact_match", "numeric") and row.get("answer") is None:
        return "answer"
    return "pattern" if name == "regex" and "pattern" not in task and "pattern" not in row else None


def _compiled(pattern: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(str(pattern), re.MULTILINE)
    except re.error as error:
        raise ConfigurationError(f"{where}: pattern {pattern!r} is not a regular expression ({error}).") from error


def _imported(path: str, where: str, folder: Path) -> Verifier:
    module_name, _, attribute = path.partition(":")
    # The user's own code: importing it runs it.
    sys.path.insert(0, str(folder.resolve()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigurationError(f"{where}: verifier {path}: cannot be imported ({error}).") from error
    finally:
        sys.path.remove(str(folder.resolve()))
    function = vars(module).get(attribute)
    if not callable(function):
        raise ConfigurationError(f"{where}: verifier {path}: {module_name} has no function {attribute}.")
    call: Callable[[str, Row], Any] = function

    def verify(response: str, row: Row) -> float:
        score = call(response, row)
        if isinstance(score, (bool, int, float)) and 0 <= score <= 1:
            return float(score)
        raise DatasetError(
            f"{where}: verifier {path} returned {score!r}; return true, false or a number between 0 and 1."
        )

    return verify
