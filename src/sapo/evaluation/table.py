"""What `sapo evaluate` shows: a verdict in one sentence, and models side by side, what decides first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from rich.console import Console

from sapo.evaluation.results import SuiteResult, changes_from_start
from sapo.evaluation.targets import Target
from sapo.measures.intervals import Estimate
from sapo.text.numbers import error_text, number_text
from sapo.text.terminal import print_table, say

Direction = Literal["lower", "higher", "data", ""]

DECISIVE = ("nll", "ended", "loops", "prefers_data_to_own")
"""Measures of the suite `local` that come first and of which the verdict is made."""
_LOCAL: dict[str, Direction] = {
    "nll": "lower", "ended": "higher", "loops": "lower", "length": "data", "length_ratio": "data",
    "seq_rep_4": "data", "prefers_data": "higher", "gap_to": "higher", "distinct": "data", "ngram_distance": "lower",
}  # fmt: skip
_ARROWS = {"lower": "↓", "higher": "↑", "data": "=", "": ""}
_MEANINGS = {"nll": "the likelihood of held-out responses", "ended": "the share of responses that end",
             "loops": "the share of responses that end in a loop",
             "prefers_data_to_own": "the preference for the data over the model's own samples"}  # fmt: skip
_NORMAL_95 = 1.96
_FEW = 30
"""Examples below which the errors themselves are rough."""
_TOO_FEW = 8
"""Examples below which no change is told from chance: their standard error is hardly known."""


def direction(suite: str, measure: str) -> Direction:
    """Which way a measure improves: "data" means towards the value of the data, "" that nothing is known."""
    if suite == "retention" and measure.startswith(("kl_", "nll_", "loops")):
        return "lower"
    if suite != "local":
        return "" if "length" in measure else "higher"
    return next((way for name, way in _LOCAL.items() if measure.startswith(name)), "")


def show(console: Console, suite: str, targets: Sequence[Target], results: Mapping[str, SuiteResult]) -> None:
    """Print the verdict, the table, and the notes.

    Of models that a start model is known for, the paired change from it stands below the value, with a star where its
    95% interval excludes 0.
    """
    moved = changes_from_start(targets, results)
    for target in targets:
        if moved[target.name]:
            text = verdict(suite, moved[target.name])
            say(console, f"Verdict on {target.name}: {text}", style="bold")
    rows, strong = _rows(console, suite, targets, results, moved)
    print_table(console, f"{suite} (value ±standard error)", rows, right=True, strong=strong)
    key = "↓ lower is better, ↑ higher is better, = closer to the data is better"
    star = "; * changed from the start, beyond chance (95%)" if any(moved.values()) else ""
    say(console, _spelled(console, f"{key}{star}"), style="dim")
    common = [note for note in results[targets[0].name].notes if all(note in one.notes for one in results.values())]
    say(console, *common)
    for target in targets:
        say(console, *(f"{target.name}: {note}" for note in results[target.name].notes if note not in common))


def verdict(suite: str, change: Mapping[str, Estimate]) -> str:
    """What changed from the start beyond chance, in one sentence; `change` has paired changes by measure."""
    moved = [
        f"{number_text(change[f'kl_{group}'].value)} nats per token {where}"
        for group, where in (("general", "on general prompts"), ("task", "on prompts of the task"))
        if suite == "retention" and f"kl_{group}" in change
    ]
    if moved:
        # A distance has no better or worse, and no chance in it.
        own = {name: one for name, one in change.items() if not name.startswith(("kl_", "nll_"))}
        return f"moved {_joined(moved)} from the start; its own replies: {verdict(suite, own)}"
    names = [name for name in DECISIVE if name in change] if suite == "local" else list(change)
    sides: dict[bool, list[str]] = {True: [], False: []}
    for name in names:
        way, one = direction(suite, name), change[name]
        if way in ("lower", "higher") and is_significant(one):
            improved = (one.value < 0) == (way == "lower")
            meaning = _MEANINGS.get(name, name) if suite == "local" else name
            shown = _cell(one, signed=True)
            sides[improved].append(f"{meaning} ({name} {shown})" if meaning != name else f"{name} ({shown})")
    count = min((one.count for one in change.values()), default=0)
    rough = f" With {count} examples the errors themselves are rough." if count < _FEW else ""
    if count < _TOO_FEW:
        return f"none, {count} example{' is' if count == 1 else 's are'} too few. Evaluate on {_FEW} rows or more."
    better, worse = sides[True], sides[False]
    if not better and not worse:
        return f"no change from the start beyond chance, on {count} examples.{rough}"
    if not worse:
        return f"better than the start: {_joined(better)} improved, nothing got worse beyond chance.{rough}"
    if not better:
        return f"worse than the start: {_joined(worse)} worsened.{rough}"
    return f"mixed: {_joined(better)} improved, but {_joined(worse)} worsened.{rough}"


def is_significant(change: Estimate) -> bool:
    """Whether the 95% interval of a change excludes 0, and there are enough examples to say so."""
    if change.stderr is None or change.count < _TOO_FEW:
        return False
    return abs(change.value) > _NORMAL_95 * change.stderr


def _rows(
    console: Console,
    suite: str,
    targets: Sequence[Target],
    results: Mapping[str, SuiteResult],
    moved: Mapping[str, Mapping[str, Estimate]],
) -> tuple[list[list[str]], int]:
    """Head and rows, and how many rows of them decide."""
    names = list(dict.fromkeys(name for target in targets for name in results[target.name].measures))
    of_data = {name.removesuffix("_data"): name for name in names if suite == "local" and name.endswith("_data")}
    names = [name for name in names if name not in of_data.values()]
    decisive = [name for name in DECISIVE if suite == "local" and name in names]
    # What is compared with the data stands beside it; the opponent may go below on a narrow terminal.
    shown = sorted(targets, key=lambda target: target.role == "opponent")
    place = sum(target.role != "opponent" for target in targets)
    empty = [""] if of_data else []

    def row(label: str, cells: Sequence[str], data: Sequence[str]) -> list[str]:
        return [label, *cells[:place], *data, *cells[place:]]

    rows = [row("measure", [target.name for target in shown], ["data"] if of_data else [])]
    for name in [*decisive, *(name for name in names if name not in decisive)]:
        label = f"{_spelled(console, _ARROWS[direction(suite, name)])} {name}".strip()
        data = [_cell(results[shown[0].name].measures.get(of_data.get(name, "")))] if of_data else []
        rows.append(row(label, [_cell(results[target.name].measures.get(name)) for target in shown], data))
        if any(name in one for one in moved.values()):
            changed = [moved[target.name].get(name) for target in shown]
            stars = ["*" if one is not None and is_significant(one) else "" for one in changed]
            cells = [_cell(one, signed=True) + star for one, star in zip(changed, stars, strict=True)]
            rows.append(row("  change", cells, empty))
    return rows, sum(1 + any(name in one for one in moved.values()) for name in decisive)


def _cell(estimate: Estimate | None, *, signed: bool = False) -> str:
    return "" if estimate is None else error_text(estimate.value, estimate.stderr, signed=signed)


def _spelled(console: Console, text: str) -> str:
    """Arrows in letters where the terminal has none."""
    try:
        text.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return text.replace("↓", "v").replace("↑", "^")
    return text


def _joined(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
