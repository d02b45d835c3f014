"""Write the table of docs/metrics.md again from the metrics' declarations: `python docs/metrics_table.py`."""

from pathlib import Path

from sapo.runs.metrics import EVAL, LOCAL, METRICS, Metric

PAGE = Path(__file__).with_name("metrics.md")


def with_table(page: str) -> str:
    """The page with the table as it should be, in place of the one that it has."""
    lines = page.splitlines()
    rows = [number for number, line in enumerate(lines) if line.startswith("|")]
    return "\n".join([*lines[: rows[0]], *documentation(), *lines[rows[-1] + 1 :]]) + "\n"


def documentation() -> list[str]:
    """The table of docs/metrics.md, line by line."""
    rows = [(f"`{metric.name}`", metric.unit, _sentence(metric), metric.reading, metric.better) for metric in METRICS]
    rows += [
        (f"`{LOCAL}*`", "", "with `eval_local`: the [local measures](evaluation.md#local) of the policy on "
         "`eval_local_size` evaluation rows", "`ended`, `loops`, `length_ratio` drifting from the data's: stop or "
         "guard", ""),
        (f"`{EVAL}*`", "", "with evaluation rows: the same on fixed pairs, made once from these rows by the initial "
         "opponent", "comparable over the run", ""),
    ]  # fmt: skip
    head = ("name", "unit, better", "meaning, *how to read it*")
    return [_row(head), _row(("---",) * len(head)), *(_row(_merged(*row)) for row in rows)]


def _merged(name: str, unit: str, meaning: str, reading: str, better: str) -> tuple[str, str, str]:
    """Three cells, so that the table fits a page beside its menus."""
    arrow = {"higher": "↑", "lower": "↓"}.get(better, "")
    return name, " ".join(filter(None, (unit, arrow))), f"{meaning}<br>*{reading}*" if reading else meaning


def _sentence(metric: Metric) -> str:
    return f"{metric.when}: {metric.meaning}" if metric.when else metric.meaning


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
