"""report.html: one file with its data, style and script, which needs no network.

All text from models and datasets is in one JSON block, in which "<" is escaped, and the script inserts it as text only.
A content security policy allows only that script, so injected markup would have no effect.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from sapo.report.charts import CHARTS, curves
from sapo.report.pair_texts import BUDGET, pack
from sapo.report.summary import figures, sentences, unjudged, warnings
from sapo.runs.files import write_atomically
from sapo.runs.gain_curves import DISTANCES, gain_curve
from sapo.runs.reading import Run, read_run, short_names

_KEY_OPTIONS = ("objective", "beta", "learning_rate", "segment_length", "ema_decay", "reference", "max_length",
                "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "seed")  # fmt: skip
"""Options that are shown at their defaults too."""
_SCRIPTS = ["dom.js", "gain.js", "charts.js", "pairs.js", "tables.js", "main.js"]


def write_report(file: Path, runs: Sequence[Path]) -> None:
    """Write the report of one or several run folders atomically.

    Raises:
        ConfigurationError: a folder contains no run.
    """
    write_atomically(file, render(report_data(runs), live=False))


def report_data(folders: Sequence[Path]) -> dict[str, Any]:
    """All data of the page, as plain JSON."""
    runs = [read_run(folder) for folder in folders]
    names = short_names(folders)
    return {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "charts": [chart.to_json() for chart in CHARTS],
        "runs": [_run(run, name, BUDGET // len(runs)) for run, name in zip(runs, names, strict=True)],
    }


def _run(run: Run, name: str, budget: int) -> dict[str, Any]:
    return {
        "name": name,
        "path": str(run.path),
        "sentences": sentences(run),
        "figures": [dataclasses.asdict(figure) for figure in figures(run)],
        "warnings": [dataclasses.asdict(warn) for warn in warnings(run)],
        "unjudged": unjudged(run),
        "ended": bool(run.end) or run.broke_off,
        **curves(run, CHARTS),
        "gain": {one.curve.eval_legend: points for one in DISTANCES if (points := gain_curve(run, one))},
        "pairs": pack(run.pairs, budget),
        "options": [
            {
                "name": one.name,
                "value": one.value,
                "default": one.default,
                "help": one.help,
                "differs": one.differs,
                "key": one.name in _KEY_OPTIONS,
            }
            for one in run.options()
        ],
        "facts": run.facts,
    }


def render(data: dict[str, Any], *, live: bool) -> bytes:
    """The page as UTF-8.

    Args:
        data: result of `report_data`.
        live: whether the page polls its server for updates.
    """
    assets = files("sapo.report") / "assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = "\n".join((assets / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    page = (assets / "page.html").read_text(encoding="utf-8")
    parts = {
        "policy": "; ".join(
            [
                "default-src 'none'",
                f"script-src '{_digest(script)}'",
                f"style-src '{_digest(style)}'",
                "img-src data:",
                f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        "live": "true" if live else "false",
        "style": style,
        "script": script,
        "data": script_json(data),
    }
    # In this order, the data last, so that a placeholder inside the data is not replaced.
    for name, text in parts.items():
        head, tail = page.split(f"<!--{name}-->", 1)
        page = head + text + tail
    return page.encode("utf-8", "replace")


def script_json(data: Any) -> str:
    """JSON that is safe inside a script element: it cannot close the element or open another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
