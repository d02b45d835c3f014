"""The tables that `sapo compare` shows, on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.text import Text

from sapo.commands.parser import Parsed
from sapo.errors import ConfigurationError
from sapo.options import option
from sapo.runs.cost import Cost, cost_of
from sapo.runs.evaluations import read_evaluations
from sapo.runs.files import write_atomically
from sapo.runs.gain_curves import DISTANCES, common_gains, distance_at, gain_curve
from sapo.runs.metrics import Metric, compared_metrics, find_metric
from sapo.runs.reading import Run, differing_settings, expand_rounds, read_run, short_names
from sapo.text.numbers import error_text, number_text
from sapo.text.terminal import print_table, say, terminal

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 24
_LONGEST = 48
_LONGEST_NAME = 20
"""Characters of a run's name beyond which a column is too wide for two runs at 80 columns."""

Rows = list[list[str]]
_number = partial(number_text, digits=4)


def run_compare(given: Parsed) -> None:
    """`sapo compare RUN RUN ...`.

    Raises:
        ConfigurationError: a folder that is not a run's, or a metric that no run has.
    """
    options = given.own
    folders = expand_rounds(options.runs)
    names = short_names(folders)
    runs = dict(zip(_labels(names), map(read_run, folders), strict=True))
    metrics = options.metrics.split(",") if options.metrics else compared_metrics()
    known = {name for run in runs.values() for name in run.metrics()}
    unknown = [name for name in metrics if name not in known]
    if options.metrics and unknown:
        raise ConfigurationError(f"sapo compare: no run has {unknown[0]}; they have {', '.join(sorted(known))}.")
    metrics = [name for name in metrics if name in known]
    settings = _settings(runs)
    tables = {
        "settings that differ": settings,
        "evaluation of the policy (value ±standard error)": _evaluations(runs),
        "cost": _costs(runs),
        "at the last log line": _last(runs, metrics),
        "curves, first value to last, each metric on one scale": _curves(runs, metrics),
    }
    for distance in DISTANCES:
        rows = _at_equal_gain(runs, distance)
        if len(rows) > 1:
            tables[f"{distance.name}, nats per token, at equal gain"] = rows
    legend = [f"{label}  is  {name}" for label, name in zip(runs, names, strict=True) if label != name]
    console = terminal()
    say(console, *legend, *([""] if legend else []))
    if len(runs) > 1 and len(settings) == 1:
        console.print("The settings of these runs are the same.\n")
    for title, rows in tables.items():
        if len(rows) == 1:
            continue
        print_table(console, title, rows)
        if rows is settings:
            for line in _meanings(settings):
                console.print(Text(line, style="dim"))
            console.print()
    if options.json:
        content = {name: _to_json(run) for name, run in zip(names, runs.values(), strict=True)}
        write_atomically(options.json, json.dumps(content, indent=1, default=str) + "\n")
    if options.markdown:
        parts = ["".join(f"- {line}\n" for line in legend)] if legend else []
        parts += [_markdown(title, rows) for title, rows in tables.items() if len(rows) > 1]
        write_atomically(options.markdown, "\n".join(parts))


def _labels(names: Sequence[str]) -> list[str]:
    """Names that are too long for a column, without what all of them begin and end with."""
    for separators in ("/", "-_/"):
        if len(names) < 2 or max(map(len, names)) <= _LONGEST_NAME:
            break
        pieces = [re.findall(f"[^{separators}]*[{separators}]?", name)[:-1] for name in names]
        shortest = min(map(len, pieces))
        alike = [len(set(column)) == 1 for column in zip(*pieces, strict=False)]
        before = alike.index(False) if False in alike else shortest
        backwards = [len(set(column)) == 1 for column in zip(*map(reversed, pieces), strict=False)]
        after = backwards.index(False) if False in backwards else shortest
        # What stands just before the difference often says what differs: `seed-` of `seed-1`.
        before = max(0, min(before, shortest - 1) - (separators != "/"))
        labels = ["".join(one[before : max(before + 1, len(one) - after)]).rstrip(separators) for one in pieces]
        names = labels if len(set(labels)) == len(names) and all(labels) else names
    return list(names)


def _to_json(run: Run) -> dict[str, Any]:
    """Everything, for other programs."""
    curves = {name: curve for name in run.metrics() if (curve := run.curve(name))}
    return {
        "folder": str(run.path),
        "settings": run.settings,
        "cost": asdict(cost_of(run)),
        "last": {name: curve[-1][1] for name, curve in curves.items()},
        "curves": curves,
        "gain_curves": {one.name: points for one in DISTANCES if (points := gain_curve(run, one))},
    }


def _settings(runs: Mapping[str, Run]) -> Rows:
    rows = [[name, *map(_plain, values)] for name, values in differing_settings(list(runs.values())).items()]
    return [["setting", *runs], *rows]


def _meanings(settings: Rows) -> list[str]:
    """What each of the settings does: the first sentence of its help."""
    found = []
    for name, *_ in settings[1:]:
        declared = option(name)
        if declared is not None and declared.help:
            found.append(f"{name}: {re.split(r'(?<=[.:;]) ', declared.help)[0].rstrip(':;.')}.")
    return found


def _evaluations(runs: Mapping[str, Run]) -> Rows:
    """Results of `sapo evaluate` of each run's policy, and their change from the model it started from."""
    found = {
        name: {
            (one.suite, measure): one
            for one in read_evaluations(run.path)
            for measure in one.measures
            if one.role in ("policy", "model")
        }
        for name, run in runs.items()
    }
    rows = []
    for suite, measure in dict.fromkeys(key for one in found.values() for key in one):
        if measure.endswith("_data"):
            continue
        cells, changes = [], []
        for one in found.values():
            result = one.get((suite, measure))
            value = result.measures[measure] if result else None
            change = result.changes.get(measure) if result else None
            cells.append("-" if value is None else error_text(value["value"], value.get("stderr")))
            changes.append("" if change is None else error_text(change["value"], change.get("stderr"), signed=True))
        rows.append([f"{suite}: {measure}", *cells])
        if any(changes):
            rows.append(["  change from its start", *changes])
    return [["measure", *runs], *rows]


def _costs(runs: Mapping[str, Run]) -> Rows:
    costs = [cost_of(run) for run in runs.values()]
    wanted = {
        "steps": [str(cost.steps) for cost in costs],
        "wall time, s": [_number(cost.wall_seconds) for cost in costs],
        "of which generation, s": [_number(cost.generate_seconds) for cost in costs],
        "CPU time, s": [_number(cost.cpu_seconds) for cost in costs],
        "CPU time, first run = 1": [_ratio(cost, costs[0]) for cost in costs],
        "tokens trained on": ["-" if cost.tokens is None else f"{cost.tokens:,}" for cost in costs],
        "peak memory, MB": [_number(cost.peak_mb) for cost in costs],
        "peak on the device, MB": [_number(cost.device_peak_mb) for cost in costs],
    }
    rows = [[name, *values] for name, values in wanted.items() if set(values) != {"-"}]
    return [["", *runs], *rows]


def _ratio(cost: Cost, first: Cost) -> str:
    if not cost.cpu_seconds or not first.cpu_seconds:
        return "-"
    return f"{cost.cpu_seconds / first.cpu_seconds:.2f}"


def _last(runs: Mapping[str, Run], metrics: Sequence[str]) -> Rows:
    return [
        ["metric", *runs],
        *([_named(name), *(_number(run.last(name)) for run in runs.values())] for name in metrics),
    ]


def _named(name: str) -> str:
    """A metric's name with an arrow that shows which way is better."""
    metric = find_metric(name)
    arrow = {"higher": " ↑", "lower": " ↓"}.get(metric.better, "") if metric is not None else ""
    return f"{name}{arrow}"


def _curves(runs: Mapping[str, Run], metrics: Sequence[str]) -> Rows:
    rows = []
    for name in metrics:
        curves = [run.curve(name) for run in runs.values()]
        values = [value for curve in curves for _, value in curve if math.isfinite(value)]
        if values:
            rows.append([_named(name), *(_sparkline(curve, min(values), max(values)) for curve in curves)])
    return [["metric", *runs], *rows]


def _at_equal_gain(runs: Mapping[str, Run], distance: Metric) -> Rows:
    """The distance of each run at levels of gain that all of them reach, interpolated along the run."""
    curves = {name: gain_curve(run, distance) for name, run in runs.items()}
    measured = [curve for curve in curves.values() if curve]
    rows = [
        [f"{gain:.4f}", *(_number(distance_at(curve, gain)) if curve else "-" for curve in curves.values())]
        for gain in common_gains(measured)
    ]
    best = [f"{max(gain for _, gain, _ in curve):.4f}" if curve else "-" for curve in curves.values()]
    return [["gain, nats per token", *runs], *rows, *([["largest gain", *best]] if rows else [])]


def _sparkline(curve: list[tuple[int, float]], low: float, high: float) -> str:
    """The curve as a row of blocks between `low` and `high`, its first and last value beside it."""
    finite = [value for _, value in curve if math.isfinite(value)]
    if not finite:
        return "-"
    width = min(_WIDTH, len(finite))
    blocks = []
    for place in range(width):
        part = finite[place * len(finite) // width : (place + 1) * len(finite) // width]
        share = (sum(part) / len(part) - low) / (high - low) if high > low else 0.0
        blocks.append(_BLOCKS[min(len(_BLOCKS) - 1, int(share * len(_BLOCKS)))])
    return f"{''.join(blocks)} {_number(finite[0])} to {_number(finite[-1])}"


def _plain(value: Any) -> str:
    text = "-" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONGEST else f"...{text[3 - _LONGEST :]}"


def _markdown(title: str, rows: Rows) -> str:
    lines = [f"## {title[:1].upper()}{title[1:]}", ""]
    for number, row in enumerate(rows):
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
        if number == 0:
            lines.append("| --- " * len(row) + "|")
    return "\n".join([*lines, ""])
