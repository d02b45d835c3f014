"""Which part of a run's CPU time each part of it takes: the work of its steps, and all else.

    python benchmarks/overhead.py MODEL ROWS --steps 10 --svg docs/step.svg -- --use_peft --use_cpu

Runs `sapo train` in this process with default options and those after `--`, and prints CPU seconds: of all threads, so
that other work on the machine disturbs little. Parts that contain others are counted without them. "Other" is what
`time/overhead` is, and what is done before the first step and after the last; imports and loading are named apart.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sapo.commands import train as command
from sapo.commands.main import main as sapo
from sapo.preference.self_play import SelfPlay
from sapo.training.probes import ChosenProbe
from sapo.training.recorder import RunRecorder
from sapo.training.scorer import PairScorer
from sapo.training.trainer import SAPOTrainer
from sapo.weights.roles import Roles

PARTS = {
    "generation": [(SelfPlay, "pairs"), (SelfPlay, "prefetch"), (PairScorer, "passes")],
    "reference": [(PairScorer, "reference_logps")],
    "policy": [(SAPOTrainer, "training_step")],
    "optimizer": [(torch.optim.AdamW, "step"), (Roles, "follow")],
    "report": [(RunRecorder, "_take"), (RunRecorder, "_write_report")],
    "tracked examples": [(ChosenProbe, "begin"), (ChosenProbe, "change")],
    "other": [(SAPOTrainer, "train"), (command, "_save")],
}
"""Functions by part."""
WORK = ("generation", "reference", "policy", "optimizer")
COLOURS = ("#2a5fc4", "#14795a", "#a94117", "#8a6d00", "#7a3fa0", "#b0307a", "#777777")


class Clock:
    """CPU seconds by part, each without the parts that it calls; what the report calls is the report's."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[list[Any]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*given: Any, **named: Any) -> Any:
            outer = self._open[-1][0] if self._open else ""
            own = outer if outer in ("report", "tracked examples") else part
            self._open.append([own, 0.0])
            started = time.process_time()
            try:
                return function(*given, **named)
            finally:
                spent = time.process_time() - started
                self.seconds[own] += spent - self._open.pop()[1]
                if self._open:
                    self._open[-1][1] += spent

        return run


def bar(seconds: dict[str, float], title: str) -> str:
    """One horizontal bar as SVG."""
    total, width, x = sum(seconds.values()), 700.0, 10.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {62 + 18 * len(seconds)}" font-family="sans-serif" '
        'font-size="12"><style>text{fill:#333}@media(prefers-color-scheme:dark){text{fill:#ccc}}</style>',
        f'<text x="10" y="16">{title}</text>',
    ]
    for row, ((name, value), colour) in enumerate(zip(seconds.items(), COLOURS, strict=True)):
        size = width * value / total
        parts.append(f'<rect x="{x:.1f}" y="26" width="{size:.1f}" height="22" fill="{colour}"/>')
        parts.append(f'<rect x="10" y="{60 + 18 * row - 4}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="26" y="{65 + 18 * row}">{name}: {value:.1f} s, {value / total:.1%}</text>')
        x += size
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("rows", help="file or Hub id")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--svg", type=Path, default=None, help="file for the picture")
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:cut])
    clock = Clock()
    for part, functions in PARTS.items():
        for owner, name in functions:
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        flags = ["train", "--model_name_or_path", given.model, "--dataset_name", given.rows]
        flags += ["--output_dir", folder, "--overwrite_output_dir", "--max_steps", str(given.steps)]
        status = sapo([*flags, *arguments[cut + 1 :]])
    if status:
        sys.exit(status)
    total = sum(clock.seconds.values())
    for name, value in clock.seconds.items():
        print(f"{name:20}{value:10.2f} CPU s{value / total:9.1%}")
    rest = total - sum(clock.seconds[name] for name in WORK)
    print(f"{'outside the work':20}{rest:10.2f} CPU s{rest / total:9.1%}")
    print(f"{'process':20}{time.process_time():10.2f} CPU s")
    if given.svg is not None:
        title = f"CPU seconds of {given.steps} steps, {rest / total:.1%} outside the work of the steps"
        given.svg.write_text(bar(clock.seconds, title), encoding="utf-8")


if __name__ == "__main__":
    main()
