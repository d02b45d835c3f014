"""One cell of the matrix: a run of `sapo train`, then its measures; done once, and continued where it was killed."""

import contextlib
import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measures import measure
from methods import Method

from sapo.commands.main import main
from sapo.runs.cost import cost_of
from sapo.runs.reading import expand_rounds, read_run


def supervised(model: Path, rows: Path, folder: Path, **options: str) -> None:
    """Make a base by SFT of `model` on `rows`, unless it is there."""
    if (folder / "recipe.yaml").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_name_or_path": str(model), "dataset_name": str(rows), "output_dir": str(folder), "objective": "sft",
        "save_strategy": "no", "use_cpu": "true", "report_to": "none", "gradient_checkpointing": "false",
        "dtype": "float32", "overwrite_output_dir": "true", "logging_steps": "50", **options,
    }  # fmt: skip
    arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
    with folder.with_suffix(".log").open("a") as log, contextlib.redirect_stdout(log):
        if main(["train", *arguments]) != 0:
            raise SystemExit(f"{folder}: sapo train failed; see {folder.with_suffix('.log')}")


BEST = {"right": max, "nll": min, "distance2": min, "distance4": min}
"""Which way each measure that runs may be chosen by is better."""
FOLLOWED = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "self_play/chosen_logp_change",
    "self_play/eos_fraction",
    "self_play/identical_fraction",
    "self_play/rejected_length",
)
"""Metrics of the run itself whose course a cell keeps."""


@dataclass(frozen=True)
class Cell:
    """What one run is: everything that its outcome depends on."""

    folder: Path
    task: Any
    base: Path
    train_file: Path
    method: Method
    options: dict[str, str]
    seed: int
    steps: int

    def result(self) -> dict[str, Any] | None:
        file = self.folder / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def run(self, validation: dict, test: dict | None = None) -> dict[str, Any]:
        """Train, stop early by the validation split, and measure, unless all of it is done.

        Args:
            validation: split that the policies along the run are measured on; the best of them is what the cell gives.
            test: split to measure that policy on; None for a trial.
        """
        found = self.result()
        if found is not None:
            if (found["options"], found["steps"]) != (self.options, self.steps):
                raise SystemExit(f"{self.folder} was run with other settings. Delete it or name another --work.")
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            status = main(self._command())
        if status != 0:
            raise SystemExit(f"{self.folder}: sapo train ended with status {status}; see log.txt")
        runs = [read_run(folder) for folder in expand_rounds([self.folder / "run"])]
        if sum(run.last_step for run in runs) < self.steps // self.method.iterations * self.method.iterations:
            # A signal ends a run with a checkpoint and without an error.
            raise SystemExit(f"{self.folder}: stopped before its last step; the same command goes on.")
        policies = self._policies()
        curve = [
            {"step": step, **measure(folder, **validation, temperatures=self.task.ALONG, room=self.task.ROOM)}
            for step, folder in sorted(policies.items())
        ]
        stopped = BEST[self.task.CHOOSE.split("@")[0]](curve, key=lambda point: point[self.task.CHOOSE])
        costs = [cost_of(run) for run in runs]
        found = {
            "options": self.options,
            "seed": self.seed,
            "steps": self.steps,
            "stopped": stopped["step"],
            "validation": stopped,
            "validation_curve": curve,
            "cpu_seconds": sum(cost.cpu_seconds or 0 for cost in costs),
            "tokens": sum(cost.tokens or 0 for cost in costs),
            "peak_mb": max(cost.peak_mb or 0 for cost in costs),
            "courses": [{name: run.curve(name) for name in FOLLOWED if run.curve(name)} for run in runs],
            "pairs": [run.round for run in runs if run.round],
        }
        if test is not None:
            likeliest = min(curve, key=lambda point: point["nll"])["step"]
            found["test"] = self._test(policies[stopped["step"]], test) | {
                "nll, own stop": self._test(policies[likeliest], test, temperatures=())["nll"]
            }
        partial = self.folder / ".result.json.partial"
        partial.write_text(json.dumps(found, indent=1))
        partial.replace(self.folder / "result.json")
        # What is left is an ordinary run folder; its checkpoints are large and have been measured.
        for checkpoint in self.folder.glob("run/**/checkpoint-*"):
            shutil.rmtree(checkpoint)
        gc.collect()
        return found

    def _test(self, folder: Path, test: dict, temperatures=None) -> dict[str, float]:
        temperatures = self.task.TEMPERATURES if temperatures is None else temperatures
        return measure(folder, **test, temperatures=temperatures, room=self.task.ROOM)

    def _command(self) -> list[str]:
        task, method = self.task, self.method
        each = self.steps // method.iterations
        options = {
            "model_name_or_path": str(self.base),
            "dataset_name": str(self.train_file),
            "output_dir": str(self.folder / "run"),
            "seed": str(self.seed),
            "max_steps": str(each),
            "per_device_train_batch_size": str(task.BATCH),
            "gradient_accumulation_steps": "1",
            "ref_model_sync_steps": str(max(1, self.steps // 4)),
            "save_steps": str(max(1, self.steps // self.task.POINTS)),
            "logging_steps": str(max(1, self.steps // 12)),
            "resume_from_checkpoint": "auto",
            "use_cpu": "true",
            "gradient_checkpointing": "false",
            "dtype": "float32",
            "log_pairs_steps": "0",
            "report_to": "none",
            **task.flags(),
            **self.options,
        }
        recipe = method.recipe().read_text()
        if "segment_length: null" not in recipe:
            options.setdefault("segment_length", task.SEGMENT)
        if method.preset == "no-buffer":
            options["replay_buffer_size"] = str(task.BATCH)
        if method.iterations > 1:
            # As published: plain sampling, and what the opponent writes may be longer than the data.
            options |= {"max_new_tokens": str(task.ROOM), "temperature": "1", "top_k": "0", "top_p": "1"}
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        return ["train", "--config", str(method.recipe()), *flags]

    def _policies(self) -> dict[int, Path]:
        """Folders of the policy along the run by step; the last is the end."""
        run, method = self.folder / "run", self.method
        if method.iterations > 1:
            each = self.steps // method.iterations
            parts = [(each * n, each, run / f"round-{n}") for n in range(method.iterations)]
        else:
            parts = [(0, self.steps, run)]
        found = {}
        for before, steps, folder in parts:
            for checkpoint in folder.glob("checkpoint-*"):
                if (checkpoint / "config.json").is_file():
                    found[before + int(checkpoint.name.split("-")[1])] = checkpoint
            found[before + steps] = folder
        return found
