"""The study: methods times seeds, one ordinary run folder a cell.

    python benchmarks/quality/study.py toy --minutes 30              everything, as far as the time reaches; resumable
    python benchmarks/quality/study.py text --data FOLDER --minutes 30
    python benchmarks/quality/study.py toy --table                   the tables of what is done

In this order: the trials of each method on the validation split, from two bases; the chosen ones with five seeds,
each on one of the bases; the ablations likewise; with --turns 2, both again with seeds and bases paired otherwise.
Every run is measured on the validation split along its way and stopped early, where the measure that trials are chosen
by is best; the model of that step is measured on the test split.
"""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from cells import BEST, Cell
from methods import ABLATIONS, CENTRE, CONTINUED_SFT, Method, methods
from tables import tables

TUNING = ((0, 100), (1, 101))
"""Base and seed of each trial; a study of one base has its trials on that one."""
SPLITS = ("validation", "test")
SEEDS = (1, 2, 3, 4, 5)


class Study:
    """All cells of one task under one folder, and what is left of the time."""

    def __init__(self, task, work: Path, minutes: float, bases: int, rows: int | None, arms=None, choose=None) -> None:
        self.task, self.work = task, work
        self.ending = "" if choose is None else f"-by-{choose}"
        task.CHOOSE = choose or task.CHOOSE
        self.until = time.monotonic() + 60 * minutes
        tuned = methods(task.FEW_RATES if rows else task.RATES, task.WEIGHTS, task.BETAS, task.MILD, task.MORE)
        if unknown := sorted(set(arms or ()) - tuned.keys()):
            raise SystemExit(f"--arms {unknown[0]}: not one of {', '.join(tuned)}")
        self.methods = {name: method for name, method in tuned.items() if name in (arms or tuned)}
        self.bases = task.bases(self.work, bases, rows)
        self.train_file = task.train_file(self.work, rows)
        self._splits: dict[str, dict] = {}

    def split(self, name: str) -> dict:
        if name not in self._splits:
            self._splits[name] = self.task.split(name)
        return self._splits[name]

    def cell(self, stage: str, base: str, name: str, method: Method, options: dict, seed: int, steps: int) -> Cell:
        label = "".join(c if c.isalnum() or c in ".-" else "-" for c in name)
        settings = "_".join(f"{key}={value}" for key, value in sorted(options.items())) if stage == "tune" else ""
        stage += "" if stage == "tune" else self.ending
        folder = self.work / stage / base / f"{label}{'_' if settings else ''}{settings}" / f"seed-{seed}"
        options = dict(options) | dict(method.flags)
        return Cell(folder, self.task, self.bases[base], self.train_file, method, options, seed, steps)

    def run(self, cell: Cell, test: bool) -> dict | None:
        """The result of a cell, or None if the time is over."""
        found = cell.result()
        if found is None and time.monotonic() > self.until:
            return None
        began = time.process_time()
        new = found is None
        found = cell.run(self.split("validation"), self.split("test") if test else None)
        if new:
            measured = found["test" if test else "validation"]
            shown = " ".join(f"{name} {measured[name]:.3f}" for name in self.task.SHOWN if name in measured)
            place = f"{time.strftime('%H:%M:%S')} {cell.folder.relative_to(self.work)} at step {found['stopped']}"
            sys.stdout.write(f"{place}: {shown} ({time.process_time() - began:.0f} s CPU)\n")
            sys.stdout.flush()
        return found

    def tune(self) -> dict[str, dict[str, str]] | None:
        """The chosen options of each method; None while trials are missing."""
        task, names = self.task, list(self.bases)
        chosen, seconds = {}, {}
        for name, method in self.methods.items():
            trials = {}
            for options in method.trials:
                results = []
                for base, seed in TUNING:
                    cell = self.cell("tune", names[base % len(names)], name, method, options, seed, task.STEPS)
                    results.append(self.run(cell, test=False))
                    if results[-1] is None:
                        return None
                trials[json.dumps(options)] = results
            if trials:
                best = BEST[task.CHOOSE.split("@")[0]](trials, key=lambda key: self._level(trials[key]))
                chosen[name] = json.loads(best)
                seconds[name] = sum(result["cpu_seconds"] for result in trials[best]) / len(TUNING)
        ratio = max(seconds.values()) / seconds[CONTINUED_SFT]
        text = json.dumps({"chosen": chosen, "cpu_seconds": seconds, "compute_ratio": ratio}, indent=1)
        (self.work / f"chosen{self.ending}.json").write_text(text)
        return chosen

    def _level(self, trials: list[dict]) -> float:
        """Mean of the trials' best."""
        name, best = self.task.CHOOSE, BEST[self.task.CHOOSE.split("@")[0]]
        return sum(best(point[name] for point in trial["validation_curve"]) for trial in trials) / len(trials)

    def _steps(self, method: Method) -> int:
        ratio = json.loads((self.work / f"chosen{self.ending}.json").read_text())["compute_ratio"]
        return round(self.task.STEPS * ratio) if method.equal_compute else self.task.STEPS

    def matrix(self, stage: str, arms: dict[str, Method], chosen: dict, turn: int) -> bool:
        """All arms with all seeds, each seed on one of the bases: another one in each turn."""
        names = list(self.bases)
        for name, method in arms.items():
            for seed in SEEDS:
                options = chosen[method.like or name]
                base = names[(seed - 1 + turn) % len(names)]
                cell = self.cell(stage, base, name, method, options, seed, self._steps(method))
                if self.run(cell, test=True) is None:
                    return False
        return True

    def untrained(self) -> None:
        """The bases themselves."""
        from measures import measure

        for name, folder in self.bases.items():
            file = self.work / "bases" / f"{name}.json"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                room, temperatures = self.task.ROOM, self.task.TEMPERATURES
                found = {n: measure(folder, **self.split(n), temperatures=temperatures, room=room) for n in SPLITS}
                file.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("toy", "text"))
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--data", type=Path, help="folder of the data that the task text reads")
    parser.add_argument("--minutes", type=float, default=60, help="start no cell after so many")
    parser.add_argument("--bases", type=int, default=2, help="bases that the seeds are spread over")
    parser.add_argument("--turns", type=int, default=1, help="rounds of five seeds, each on other bases")
    parser.add_argument("--rows", type=int, help="train on the first so many rows only, the bases too")
    parser.add_argument("--ablations", nargs="*", help="only these ablations; none of them if nothing follows")
    parser.add_argument("--choose", help="measure to choose trials and stop runs by, instead of the task's own")
    parser.add_argument("--arms", nargs="+", help="only these methods of the comparison")
    parser.add_argument("--table", action="store_true", help="only show the tables of what is done")
    options = parser.parse_args()
    # So small a model is several times slower when two threads share its matrices.
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    task = importlib.import_module(options.task)
    if options.data is not None:
        task.DATA = options.data
    work = options.work / (f"{task.NAME}-{options.rows}" if options.rows else task.NAME)
    ablations = {name: ABLATIONS[name] for name in (ABLATIONS if options.ablations is None else options.ablations)}
    if not options.table:
        study = Study(task, work, options.minutes, options.bases, options.rows, options.arms, options.choose)
        study.untrained()
        chosen = study.tune()
        stages = [("compare", study.methods), ("ablations", ablations if CENTRE in study.methods else {})]
        turns = [(*stage, turn) for turn in range(options.turns) for stage in stages]
        finished = chosen is not None and all(study.matrix(stage, arms, chosen, turn) for stage, arms, turn in turns)
        sys.stdout.write("All cells are done.\n" if finished else "The time is over; the same command goes on.\n")
    text = tables(work, task)
    (work / "tables.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
