"""The study: methods times seeds, one ordinary run folder a cell.

    python benchmarks/quality/study.py toy --minutes 30              everything, as far as the time reaches; resumable
    python benchmarks/quality/study.py text --data FOLDER --minutes 30
    python benchmarks/quality/study.py toy --table                   the tables of what is done

In this order: the trials of each method on the validation split; the chosen ones on the test split with five seeds,
each on one of the bases; the ablations likewise; both again with seeds and bases paired otherwise. The test split is
read when a cell's settings are fixed, and a cell measures it once.
"""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from cells import Cell
from methods import ABLATIONS, CENTRE, CONTINUED_SFT, Method, methods
from tables import tables

TUNING_SEED = 100
SEEDS = (1, 2, 3, 4, 5)


class Study:
    """All cells of one task under one folder, and what is left of the time."""

    def __init__(self, task, work: Path, minutes: float, bases: int, arms: list[str] | None = None) -> None:
        self.task, self.work = task, work / task.NAME
        self.until = time.monotonic() + 60 * minutes
        tuned = methods(task.RATES, task.WEIGHTS, task.BETAS)
        if unknown := sorted(set(arms or ()) - tuned.keys()):
            raise SystemExit(f"--arms {unknown[0]}: not one of {', '.join(tuned)}")
        self.methods = {name: method for name, method in tuned.items() if name in (arms or tuned)}
        self.bases = task.bases(self.work, bases)
        self.train_file = task.train_file(self.work)
        self._splits: dict[str, dict] = {}

    def split(self, name: str) -> dict:
        if name not in self._splits:
            self._splits[name] = self.task.split(name)
        return self._splits[name]

    def cell(self, stage: str, base: str, name: str, method: Method, options: dict, seed: int, steps: int) -> Cell:
        label = "".join(c if c.isalnum() or c in ".-" else "-" for c in name)
        settings = "_".join(f"{key}={value}" for key, value in sorted(options.items())) if stage == "tune" else ""
        folder = self.work / stage / base / f"{label}{'_' if settings else ''}{settings}" / f"seed-{seed}"
        split = "validation" if stage == "tune" else "test"
        return Cell(folder, self.task, self.bases[base], self.train_file, method, dict(options), seed, steps, split)

    def run(self, cell: Cell) -> dict | None:
        """The result of a cell, or None if the time is over."""
        found = cell.result()
        if found is not None:
            return found
        if time.monotonic() > self.until:
            return None
        began = time.process_time()
        along = self.split("validation") if cell.split == "test" and cell.seed == 1 else None
        found = cell.run(self.split(cell.split), along)
        measured = found[cell.split]
        shown = " ".join(f"{name} {measured[name]:.3f}" for name in self.task.SHOWN)
        place = cell.folder.relative_to(self.work)
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {place}: {shown} ({time.process_time() - began:.0f} s CPU)\n")
        sys.stdout.flush()
        return found

    def tune(self) -> dict[str, dict[str, str]] | None:
        """The chosen options of each method; None while trials are missing."""
        task, base = self.task, next(iter(self.bases))
        chosen, trials = {}, {}
        for name, method in self.methods.items():
            found = {}
            for options in method.trials:
                result = self.run(self.cell("tune", base, name, method, options, TUNING_SEED, task.STEPS))
                if result is None:
                    return None
                found[json.dumps(options)] = result
            if found:
                trials[name] = found
                best = task.BEST(found, key=lambda key: found[key]["validation"][task.CHOOSE])
                chosen[name] = json.loads(best)
        seconds = {name: found[json.dumps(chosen[name])]["cpu_seconds"] for name, found in trials.items()}
        ratio = max(seconds.values()) / seconds[CONTINUED_SFT]
        text = json.dumps({"chosen": chosen, "cpu_seconds": seconds, "compute_ratio": ratio}, indent=1)
        (self.work / "chosen.json").write_text(text)
        return chosen

    def _steps(self, method: Method) -> int:
        ratio = json.loads((self.work / "chosen.json").read_text())["compute_ratio"]
        return round(self.task.STEPS * ratio) if method.equal_compute else self.task.STEPS

    def matrix(self, stage: str, arms: dict[str, Method], chosen: dict, turn: int) -> bool:
        """All arms with all seeds, each seed on one of the bases: another one in each turn."""
        names = list(self.bases)
        for name, method in arms.items():
            for seed in SEEDS:
                options = chosen[method.like or name] | dict(method.flags)
                base = names[(seed - 1 + turn) % len(names)]
                if self.run(self.cell(stage, base, name, method, options, seed, self._steps(method))) is None:
                    return False
        return True

    def untrained(self) -> None:
        """The bases themselves."""
        from measures import measure

        for name, folder in self.bases.items():
            file = self.work / "bases" / f"{name}.json"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                settings = {"temperatures": self.task.TEMPERATURES, "room": self.task.ROOM}
                file.write_text(json.dumps(measure(folder, **self.split("test"), **settings)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("toy", "text"))
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--data", type=Path, help="folder of the data that the task text reads")
    parser.add_argument("--minutes", type=float, default=60, help="start no cell after so many")
    parser.add_argument("--bases", type=int, default=2, help="bases that the seeds are spread over")
    parser.add_argument("--arms", nargs="+", help="only these methods of the comparison")
    parser.add_argument("--table", action="store_true", help="only show the tables of what is done")
    options = parser.parse_args()
    # So small a model is several times slower when two threads share its matrices.
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    task = importlib.import_module(options.task)
    if options.data is not None:
        task.DATA = options.data
    if not options.table:
        study = Study(task, options.work, options.minutes, options.bases, options.arms)
        study.untrained()
        chosen = study.tune()
        stages = [("compare", study.methods), ("ablations", ABLATIONS if CENTRE in study.methods else {})]
        turns = [(*stage, turn) for turn in range(len(study.bases)) for stage in stages]
        finished = chosen is not None and all(study.matrix(stage, arms, chosen, turn) for stage, arms, turn in turns)
        sys.stdout.write("All cells are done.\n" if finished else "The time is over; the same command goes on.\n")
    text = tables(options.work / task.NAME, task)
    (options.work / task.NAME / "tables.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
