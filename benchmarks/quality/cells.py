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

from sapo.cli import main
from sapo.compare import read_runs

FOLLOWED = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "self_play/chosen_logp_change",
    "self_play/eos_fraction",
    "self_play/identical_fraction",
    "self_play/rejected_length",
)
"""Metrics of the run itself whose first and last value a cell keeps."""


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
    split: str

    def result(self) -> dict[str, Any] | None:
        file = self.folder / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def run(self, held_out: dict, validation: dict | None) -> dict[str, Any]:
        """Train and measure, unless both are done.

        Args:
            held_out: split to measure the final policy on.
            validation: split to measure the policies along the way on; None for none.
        """
        found = self.result()
        if found is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            status = main(self._command())
        if status != 0:
            raise SystemExit(f"{self.folder}: sapo train ended with status {status}; see log.txt")
        runs = read_runs([self.folder / "run"])
        if sum(run.cost().steps for run in runs) < self.steps // self.method.iterations * self.method.iterations:
            # A signal ends a run with a checkpoint and without an error.
            raise SystemExit(f"{self.folder}: stopped before its last step; the same command goes on.")
        policies = self._policies()
        settings = {"temperatures": self.task.TEMPERATURES, "room": self.task.ROOM}
        last = policies[max(policies)]
        curve = []
        for step, folder in sorted(policies.items()) if validation else ():
            curve.append({"step": step, **measure(folder, **validation, **settings)})
        costs = [run.cost() for run in runs]
        found = {
            "options": self.options,
            "seed": self.seed,
            "steps": self.steps,
            self.split: measure(last, **held_out, **settings),
            "validation_curve": curve,
            "cpu_seconds": sum(cost.cpu_seconds or 0 for cost in costs),
            "tokens": sum(cost.tokens or 0 for cost in costs),
            "peak_mb": max(cost.peak_mb or 0 for cost in costs),
            "first": {name: value[0][1] for name in FOLLOWED if (value := runs[0].curve(name))},
            "last": {name: runs[-1].last(name) for name in FOLLOWED if runs[-1].curve(name)},
            "pairs": [run.written for run in runs if run.written],
        }
        partial = self.folder / ".result.json.partial"
        partial.write_text(json.dumps(found, indent=1))
        partial.replace(self.folder / "result.json")
        # What is left is an ordinary run folder; its checkpoints are large and have been measured.
        for checkpoint in self.folder.glob("run/**/checkpoint-*"):
            shutil.rmtree(checkpoint)
        gc.collect()
        return found

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
            "reference_sync_steps": str(max(1, self.steps // 4)),
            "save_steps": str(max(1, self.steps // 3)),
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
            return {each * (n + 1): run / f"iteration-{n}" for n in range(method.iterations)}
        found = {int(f.name.split("-")[1]): f for f in run.glob("checkpoint-*") if (f / "config.json").is_file()}
        return found | {self.steps: run}
