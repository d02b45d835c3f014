"""What is kept and what is gained: arms times seeds, on a chat model and a tiny one; docs/study.md says what for.

    python benchmarks/quality/keeping.py chat --model FOLDER --data FOLDER --minutes 70    as far as the time reaches
    python benchmarks/quality/keeping.py chat --table                                     the tables of what is done

Each cell is an ordinary run folder of `sapo train` with `eval_retention`, under WORK/TASK/STAGE/ARM/seed-N, and its
curve is kept in result.json there. Cells are run seed by seed, so that what is done at any time has the same seeds in
all arms of a stage, or all but the last.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sapo.commands.main import main as sapo
from sapo.data.encoding import eos_token_ids
from sapo.demo.house_style import heldout_rows, training_rows
from sapo.demo.style_score import StyleScorer
from sapo.runs.cost import cost_of
from sapo.runs.gain_curves import DISTANCES, common_gains, distance_at, gain_curve
from sapo.runs.reading import read_run
from sapo.weights.description import load_tokenizer
from sapo.weights.loading import load_frozen
from sapo.weights.policy import padding_token_id

SEEDS = (1, 2, 3)
ROLE_PLAY = ("stories", "roles-300")
"""Tasks on role play; the others are on GSM8K, or on rows that the package makes."""
COMMON = {
    "lr_scheduler_type": "linear", "warmup_steps": "0.1", "learning_rate": "1e-3",
    "per_device_train_batch_size": "4", "per_device_eval_batch_size": "8",
    "eval_strategy": "steps", "eval_retention": "true", "eval_retention_max_time_fraction": "1.0",
    "retention_kl_limit": "none", "logging_steps": "5", "save_strategy": "steps", "save_steps": "10",
    "save_total_limit": "1", "resume_from_checkpoint": "auto", "report_to": "none", "log_pairs_steps": "0",
    "report_pairs": "0", "chosen_probe_size": "0", "use_cpu": "true", "dtype": "float32",
    "gradient_checkpointing": "false",
}  # fmt: skip
SFT = {"objective": "sft"}
SAPO = {"objective": "dpo", "beta": "0.1", "segment_length": "32", "skip_identical": "false"}
REPLAY = {"replay_share": "0.1", "replay_max_new_tokens": "64"}
ANCHOR = {"kl_weight": "0.1"}


@dataclass(frozen=True)
class Stage:
    """Arms on the same rows for equally many steps; `sampled` where the models at the end reply too."""

    name: str
    rows: int
    steps: int
    evaluations: int
    arms: dict[str, dict[str, str]]
    sampled: bool = True


NARROW = {
    "SFT": SFT, "SFT, replay": SFT | REPLAY, "SFT, anchor": SFT | ANCHOR, "SAPO": SAPO, "SAPO, replay": SAPO | REPLAY,
}  # fmt: skip
MORE = {
    "ASFT": SFT | ANCHOR | {"token_weighting": "probability"},
    "SFT, anchor 1": SFT | {"kl_weight": "1.0"},
    "SAPO, frozen": SAPO | {"ema_decay": "1"},
    "SAPO, on-policy": SAPO | {"ema_decay": "0"},
    "NCE": SAPO | {"loss_type": "nce"},
    "SFT, anchor, replay": SFT | ANCHOR | REPLAY,
}
TOLD = {"SAPO, unhelpful": SAPO | {"opponent_system_prompt": "You are an unhelpful assistant."}}
STYLE = {"SFT, anchor": SFT | ANCHOR, "SFT, replay": SFT | REPLAY, "SAPO": SAPO, "SAPO, replay": SAPO | REPLAY}
TUNED = {"SFT": SFT, "SFT, anchor, replay": SFT | ANCHOR | REPLAY, "SAPO": SAPO}
RATES = {
    f"{arm}, {rate}": options | {"learning_rate": rate}
    for arm, options in TUNED.items()
    for rate in ("3e-4", "1e-3", "3e-3")
}
CHOSEN_RATES = {"SFT": "3e-3", "SFT, anchor, replay": "3e-3", "SAPO": "1e-3"}
"""By gain, of the stage *rates*: on GSM8K, and the same on role play."""
OVERTRAINED = {"SFT": SFT, "SAPO": SAPO, "SFT, replay": SFT | REPLAY, "SFT, anchor": SFT | ANCHOR}


@dataclass(frozen=True)
class Task:
    """A model's data and budget.

    Attributes:
        evaluated: general prompts, training prompts and evaluation rows that each evaluation measures on.
        longest: maximum characters of question and answer together; 0: the built-in house style, without a file.
        guard: `chosen_nll_weight` of self-play: about beta times the tokens of a response.
        samples: general prompts that the models at the end reply to, for loops and endings. On the
            house style: held-out questions that it replies to at temperature 1, for the share in style.
    """

    model: str
    evaluated: int
    longest: int
    guard: str
    samples: int
    options: dict[str, str]
    stages: tuple[Stage, ...]


AT_CHOSEN = {arm: TUNED[arm] | {"learning_rate": rate} for arm, rate in CHOSEN_RATES.items()}
AT_CHOSEN["SFT, 1e-3"] = RATES["SFT, 1e-3"]


LORA = {"use_peft": "true", "lora_r": "16", "lora_alpha": "32", "lora_target_modules": "all-linear"}
ON_GPU = {
    "use_cpu": "false", "dtype": "bfloat16", "bf16": "true", "save_strategy": "no",
    "per_device_train_batch_size": "8", "per_device_eval_batch_size": "16",
}  # fmt: skip
TASKS = {
    "chat": Task(
        "SmolLM2-135M-Instruct", 8, 260, "10", 32, LORA | {"max_length": "192"},
        (
            Stage("narrow", 80, 20, 2, NARROW),
            Stage("overtrained", 16, 40, 4, OVERTRAINED),
            Stage("more", 80, 20, 2, MORE | TOLD, sampled=False),
        ),
    ),
    "chat-300": Task(
        "SmolLM2-135M-Instruct", 16, 260, "10", 0, LORA | {"max_length": "192"},
        (
            Stage("rates", 100, 25, 1, RATES, sampled=False),
            Stage("tuned", 300, 75, 3, AT_CHOSEN, sampled=False),
        ),
    ),
    "roles-300": Task(
        "SmolLM2-135M-Instruct", 16, 520, "10", 0, LORA | {"max_length": "208"},
        (
            Stage("rates", 100, 25, 1, RATES, sampled=False),
            Stage("tuned", 300, 75, 3, AT_CHOSEN, sampled=False),
        ),
    ),
    "style": Task(
        "SmolLM2-135M-Instruct", 8, 0, "10", 96, LORA | {"max_length": "256"}, (Stage("style", 400, 30, 2, STYLE),)
    ),
    "chat-gpu": Task(
        "SmolLM2-135M-Instruct", 64, 420, "10", 64, LORA | ON_GPU | {"max_length": "224"},
        (
            Stage("narrow", 240, 60, 3, NARROW),
            Stage("overtrained", 64, 80, 4, OVERTRAINED),
            Stage("more", 240, 60, 3, MORE, sampled=False),
        ),
    ),
    "stories": Task(
        "stories260k", 32, 700, "20", 100, {"max_length": "384"},
        (
            Stage("narrow", 300, 150, 5, NARROW),
            Stage("overtrained", 60, 150, 5, OVERTRAINED),
            Stage("more", 300, 150, 5, MORE, sampled=False),
        ),
    ),
}  # fmt: skip


def rows_of(task: str, data: Path, work: Path, count: int) -> tuple[Path, Path]:
    """The first `count` short rows of the task's file, and rows to evaluate on from behind all of them."""
    train, test = work / f"train-{count}.jsonl", work / "evaluation.jsonl"
    if not (train.is_file() and test.is_file()):
        if not TASKS[task].longest:
            work.mkdir(parents=True, exist_ok=True)
            for file, part in ((train, training_rows(count)), (test, heldout_rows(TASKS[task].evaluated, seed=1))):
                file.write_text("".join(json.dumps(row.as_row()) + "\n" for row in part))
            return train, test
        if task not in ROLE_PLAY:
            lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [{"instruction": row["question"], "output": row["answer"]} for row in map(json.loads, lines)]
        else:
            rows = json.loads((data / "gpteacher_roleplay" / "roleplay.json").read_text(encoding="utf-8"))
        short = [row for row in rows if sum(map(len, row.values())) <= TASKS[task].longest]
        work.mkdir(parents=True, exist_ok=True)
        for file, part in ((train, short[:count]), (test, short[-TASKS[task].evaluated :])):
            file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return train, test


def run_cell(task: str, stage: Stage, arm: str, seed: int, model: Path, data: Path, work: Path) -> dict:
    """Train one cell, unless it is done, and keep its curves."""
    folder, what = cell_folder(work, stage, arm, seed), TASKS[task]
    file = folder / "result.json"
    if file.is_file():
        # Trained, and stopped before its samples, or from before the task had samples.
        found = json.loads(file.read_text())
        return keep(found | {"samples": sampled(folder, model, what)}, file)
    train, test = rows_of(task, data, work, stage.rows)
    guard = {"chosen_nll_weight": what.guard} if stage.arms[arm]["objective"] == "dpo" else {}
    options = COMMON | what.options | guard | stage.arms[arm] | {
        "eval_retention_size": str(what.evaluated),
        "model_name_or_path": str(model), "dataset_name": str(train), "eval_dataset_name": str(test),
        "output_dir": str(folder / "run"), "seed": str(seed), "max_steps": str(stage.steps),
        "eval_steps": str(stage.steps // stage.evaluations),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        status = sapo(["train", *(part for name, value in options.items() for part in (f"--{name}", value))])
    if status != 0:
        raise SystemExit(f"{folder}: sapo train ended with status {status}; see log.txt")
    run = read_run(folder / "run")
    if run.last_step < stage.steps:
        raise SystemExit(f"{folder}: stopped before its last step; the same command goes on.")
    found = {
        "arm": arm, "seed": seed, "steps": stage.steps, "rows": stage.rows, "options": stage.arms[arm],
        "cpu_seconds": cost_of(run).cpu_seconds,
        "step_seconds": sum(run.series("time/step")) / max(1, len(run.series("time/step"))),
        "curves": {one.name: gain_curve(run, one) for one in DISTANCES},
        "identical": run.last("self_play/identical_fraction"),
        "samples": None,
    }  # fmt: skip
    # A stop while samples are written leaves the curves.
    keep(found, file)
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return keep(found | {"samples": sampled(folder, model, what)}, file) if stage.sampled else found


def keep(found: dict, file: Path) -> dict:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(file)
    return found


def finished(file: Path, stage: Stage) -> bool:
    return file.is_file() and bool(json.loads(file.read_text())["samples"] or not stage.sampled)


def styled(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Share of the policy's replies to held-out questions that keep the house style, greedy and at temperature 1."""
    run = str(folder / "run")
    model, tokenizer = load_frozen(run, dtype="float32", device="cpu"), load_tokenizer(run)
    eos_ids = eos_token_ids(tokenizer, model.generation_config.eos_token_id)
    context, padding = partial(contextlib.nullcontext, model), padding_token_id(tokenizer, eos_ids)
    rows = heldout_rows(count)
    scorer = StyleScorer(None, tokenizer, eos_ids=eos_ids, pad_token_id=padding, rows=rows)
    shares = {f"in_style_{t:g}": scorer.replies(context, temperature=t).in_style / count for t in (0.0, 1.0)}
    return {"policy": shares}


def sampled(folder: Path, model: Path, what: Task) -> dict[str, dict[str, float]]:
    """What the model at the end replies: shares in house style, or loops, endings and lengths of start and policy."""
    if not what.longest:
        return styled(folder, what.samples)
    flags = {"start": model, "limit": what.samples, "max_length": what.options["max_length"], "max_new_tokens": 128}
    device = "cpu" if what.options.get("use_cpu", "true") == "true" else "cuda"
    flags |= {"suite": "retention", "output_dir": folder / "samples", "device": device}
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        status = sapo(["evaluate", str(folder / "run"), *(str(p) for n, v in flags.items() for p in (f"--{n}", v))])
    if status != 0:
        raise SystemExit(f"{folder}: sapo evaluate ended with status {status}; see log.txt")
    models = json.loads((folder / "samples" / "results.json").read_text())["suites"]["retention"]["models"]
    names = ("loops", "ended", "length", "kl_general", "kl_task")
    return {
        one["role"]: {name: one["measures"][name]["value"] for name in names if name in one["measures"]}
        for one in models.values()
    }


def results(work: Path, stage: Stage) -> dict[str, dict[int, dict]]:
    """What is done of a stage, by arm and seed."""
    found = {}
    for arm in stage.arms:
        files = [(seed, cell_folder(work, stage, arm, seed) / "result.json") for seed in SEEDS]
        found[arm] = {seed: json.loads(file.read_text()) for seed, file in files if file.is_file()}
    return {arm: cells for arm, cells in found.items() if cells}


def cell_folder(work: Path, stage: Stage, arm: str, seed: int) -> Path:
    label = "".join(c if c.isalnum() or c in ".-" else "-" for c in arm)
    return work / stage.name / label / f"seed-{seed}"


def spread_text(values: list[float]) -> str:
    """Mean and half width of the 95 % t-interval; the values alone where there are fewer than three."""
    if len(values) < 3:
        return " / ".join(f"{value:.4f}" for value in values)
    t = {3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return f"{statistics.mean(values):.4f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def tables(task: str, work: Path) -> str:
    """Markdown: last evaluation of each arm, distance at equal gain, and its ratio to SFT, paired by seed."""
    parts = []
    for stage in TASKS[task].stages:
        done = results(work, stage)
        if not done:
            continue
        if stage.name == "more":
            # The same rows and steps as in the first stage.
            beside = results(work, TASKS[task].stages[0])
            done = {arm: beside[arm] for arm in ("SFT", "SAPO") if arm in beside} | done
        parts += [f"### {stage.name}: {stage.rows} rows, {stage.steps} steps", ""]
        parts += ["| arm | seeds | gain | kl_general | kl_task | seconds a step | CPU seconds |", "| --- " * 7 + "|"]
        general, trained = (one.name for one in DISTANCES)
        for arm, cells in done.items():
            last = [cell["curves"][general][-1] for cell in cells.values()]
            far = [cell["curves"][trained][-1][2] for cell in cells.values()]
            cost = statistics.mean(cell["cpu_seconds"] for cell in cells.values())
            step = statistics.mean(cell["step_seconds"] for cell in cells.values())
            parts.append(
                f"| {arm} | {len(cells)} | {spread_text([one[1] for one in last])} | "
                f"{spread_text([one[2] for one in last])} | {spread_text(far)} | {step:.1f} | {cost:.0f} |"
            )
        samples = {
            arm: [cell["samples"] for cell in cells.values() if cell.get("samples")] for arm, cells in done.items()
        }
        if stage.name == "style":
            parts += ["", "| arm | in style, greedy | in style, temperature 1 |", "| --- " * 3 + "|"]
            for arm, found in samples.items():
                row = [spread_text([one["policy"][name] for one in found]) for name in ("in_style_0", "in_style_1")]
                parts.append(f"| {arm} | {' | '.join(row)} |")
        elif any(samples.values()):
            parts += ["", "| arm | loops | ended | length |", "| --- " * 4 + "|"]
            start = next(found for found in samples.values() if found)[0]["start"]
            parts.append(f"| start | {start['loops']:.4f} | {start['ended']:.4f} | {start['length']:.1f} |")
            for arm, found in samples.items():
                row = [spread_text([one["policy"][name] for one in found]) for name in ("loops", "ended", "length")]
                parts.append(f"| {arm} | {' | '.join(row)} |")
        parts += [
            "",
            "Distance at equal gain (the largest that all arms of a seed reach, and half of it), over SFT's:",
            "",
        ]
        parts += ["| arm | kl_general, half | kl_general, full | kl_task, half | kl_task, full |", "| --- " * 5 + "|"]
        for arm in done:
            row = []
            for distance in (general, trained):
                for level in (1, 3):
                    row.append(spread_text(ratios(done, arm, distance, level)) or "-")
            parts.append(f"| {arm} | {' | '.join(row)} |")
        if stage.name == "tuned":
            parts += ["", *paired(done)]
        parts.append("")
        for arm, cells in done.items():
            for seed, cell in cells.items():
                points = " ".join(f"{step}:{gain:.4f}/{kl:.4f}" for step, gain, kl in cell["curves"][general])
                parts.append(f"- {arm}, seed {seed}, step:gain/kl_general {points}")
        parts.append("")
    return "\n".join(parts) + "\n"


def paired(done: dict) -> list[str]:
    """Every arm against every other, by seed: gain after equal steps, distance at the largest gain of both."""
    names = [one.name for one in DISTANCES]
    lines = [f"| arm | against | gain, difference | {' | '.join(names)} |", "| --- " * 5 + "|"]
    for other, arm in itertools.permutations(done, 2):
        both = [(done[arm][seed]["curves"], done[other][seed]["curves"]) for seed in done[arm] if seed in done[other]]
        row = [spread_text([own[names[0]][-1][1] - its[names[0]][-1][1] for own, its in both])]
        for name in names:
            at = [(own[name], its[name], common_gains([own[name], its[name]])[-1]) for own, its in both]
            row.append(spread_text([distance_at(own, gain) / distance_at(its, gain) for own, its, gain in at]))
        lines.append(f"| {arm} | {other} | {' | '.join(row)} |")
    return lines


def ratios(done: dict, arm: str, distance: str, level: int) -> list[float]:
    """Distance of an arm over that of SFT at a level of gain that all arms of the seed reach."""
    found = []
    for seed, cell in done[arm].items():
        cells = [one[seed] for one in done.values() if seed in one]
        if seed not in done.get("SFT", {}):
            continue
        gains = common_gains([one["curves"][distance] for one in cells])
        if not gains:
            continue
        own, sft = (distance_at(one["curves"][distance], gains[level]) for one in (cell, done["SFT"][seed]))
        if own is not None and sft:
            found.append(own / sft)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--work", type=Path, default=Path("runs/keeping"))
    parser.add_argument("--model", type=Path, help="folder of the model")
    parser.add_argument(
        "--data", type=Path, help="folder that has gsm8k/train.jsonl or gpteacher_roleplay/roleplay.json"
    )
    parser.add_argument("--minutes", type=float, default=60, help="start no cell after so many")
    parser.add_argument("--stages", nargs="+", help="only these stages")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="only show the tables of what is done")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    until, work = time.monotonic() + 60 * options.minutes, options.work / options.task
    stages = [one for one in TASKS[options.task].stages if options.stages is None or one.name in options.stages]
    cells = [
        (stage, arm, seed)
        for stage in stages
        for seed in options.seeds
        for arm in stage.arms
        if options.arms is None or arm in options.arms
    ]
    for stage, arm, seed in [] if options.table else cells:
        if finished(cell_folder(work, stage, arm, seed) / "result.json", stage):
            continue
        if time.monotonic() > until:
            sys.stdout.write("The time is over; the same command goes on.\n")
            break
        found = run_cell(options.task, stage, arm, seed, options.model, options.data, work)
        step, gain, kl = found["curves"][DISTANCES[0].name][-1]
        place = f"{time.strftime('%H:%M:%S')} {stage.name} {arm} seed {seed} at step {step}"
        sys.stdout.write(f"{place}: gain {gain:.4f} kl_general {kl:.4f} ({found['cpu_seconds']:.0f} s CPU)\n")
        sys.stdout.flush()
        (work / "tables.md").write_text(tables(options.task, work))
    sys.stdout.write(tables(options.task, work))


if __name__ == "__main__":
    main()
