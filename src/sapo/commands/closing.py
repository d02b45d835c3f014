"""What `sapo train` says when a run has ended: what happened, where it lies, and commands for what comes next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerState

from sapo.commands.arguments import RunArguments
from sapo.report.summary import ENOUGH_PAIRS, change_of, likelihood_text, warnings
from sapo.runs.cost import time_shares
from sapo.runs.layout import OPPONENT_FOLDER, RECIPE_FILE, REPORT_FILE
from sapo.runs.metrics import ACCURACY, CHOSEN_CHANGE_PER_TOKEN, LOSS, MARGIN
from sapo.runs.reading import Run, read_run
from sapo.text.numbers import number_text
from sapo.training.recorder import loaded_step


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended.

    Attributes:
        folder: of the run.
        state: of Trainer.
        stopped: whether a signal ended it.
        reason: why it ended by itself before its last step; None if it did not.
        opponent: whether there is one.
        adapter: whether the policy is an adapter.
        plain: whether the model has no chat template.
    """

    folder: Path
    state: TrainerState
    stopped: bool
    reason: str | None
    opponent: bool
    adapter: bool
    plain: bool


def closing_lines(run: RunArguments, ending: Ending, recipe: Path | None) -> list[str]:
    """The lines of the closing screen.

    Args:
        run: the options.
        ending: of the run, which has saved its models.
        recipe: of all rounds, where the run is one of them.
    """
    state, folder, config = ending.state, ending.folder.absolute(), run.config
    head = "Stopped" if ending.stopped or ending.reason else "Done"
    lines = ["", f"{head} after step {state.global_step} of {state.max_steps}."]
    if ending.reason:
        lines.append(ending.reason)
    best = loaded_step(config, state)
    if best is not None:
        measure = f"{config.metric_for_best_model} ({state.best_metric:.4g})"
        lines.append(f"Saved are the models of step {best}, the best by {measure}.")
    if config.process_index == 0:
        record = read_run(folder)
        lines += results(record)
        shares = [f"{name} {share:.0%}" for name, share in time_shares(record).items() if share >= 0.005]
        lines += [f"Time: {', '.join(shares)}."] if shares else []
    lines += ["", f"Policy:    {folder}"]
    if ending.opponent:
        lines.append(f"Opponent:  {folder / OPPONENT_FOLDER} (the moving average)")
    unfinished = ending.stopped or bool(ending.reason) or state.global_step < state.max_steps
    recipe, longer = recipe or folder / RECIPE_FILE, 2 * state.max_steps
    lines += next_commands(run, folder, recipe, unfinished, longer, plain=ending.plain)
    load = "AutoPeftModelForCausalLM" if ending.adapter else "AutoModelForCausalLM"
    package = "peft" if ending.adapter else "transformers"
    return [
        *lines,
        "In Python:",
        f"from {package} import {load}",
        f"model = {load}.from_pretrained({str(folder)!r})",
    ]


def results(run: Run) -> list[str]:
    """What the run logged, in lines: the same figures and warnings as in its report."""
    lines = []
    values = [
        f"{metric.label} {number_text(change.last)} (from {number_text(change.first)})"
        for metric in (LOSS, MARGIN)
        if (change := change_of(run, metric)) is not None
    ]
    if not values and (last := run.last(LOSS)) is not None:
        values = [f"{LOSS.label} {number_text(last)}"]
    if values:
        text = ", ".join(values)
        lines.append(f"{text[:1].upper()}{text[1:]}.")
    right = change_of(run, ACCURACY)
    if right is not None and right.is_certain:
        lines.append(
            f"Of the last {right.pairs:,} pairs the policy prefers the chosen response in {right.last:.0%} (of the "
            f"first: {right.first:.0%})."
        )
    elif run.last(ACCURACY) is not None:
        lines.append(f"Too few pairs for an accuracy, which takes {ENOUGH_PAIRS} at the start and at the end of a run.")
    likelihood = run.last(CHOSEN_CHANGE_PER_TOKEN)
    if likelihood is not None:
        lines.append(f"Since the start the chosen responses became {likelihood_text(likelihood)}.")
    lines += [f"Warning: {warn.title}. {warn.text}" for warn in warnings(run) if warn.title != "Early stop"]
    return lines


def next_commands(
    run: RunArguments, folder: Path, recipe: Path, unfinished: bool, longer: int, *, plain: bool
) -> list[str]:
    """What can be done with a run that has ended, each line a label and a command.

    Args:
        run: what was trained.
        folder: of the run.
        recipe: gives it again; of rounds, all of them.
        unfinished: whether it can be continued as it is.
        longer: steps of a longer run.
        plain: whether the model has no chat template.
    """
    name = quoted(folder)
    again = f"sapo train --config {quoted(recipe)} --resume_from_checkpoint true"
    evaluation = run.data.eval_dataset_name or run.data.dataset_name
    lines = [f"Page:      {folder / REPORT_FILE}", f"Report:    sapo report {name} --serve"]
    lines.append(f"Chat:      sapo chat {name}{' --plain' if plain else ''}")
    if evaluation:
        length = f" --max_length {run.config.max_length}"
        lines.append(f"Evaluate:  sapo evaluate {name} --suite local --dataset_name {quoted(evaluation)}{length}")
        if not run.data.eval_dataset_name:
            lines.append("           (better on rows that it was not trained on)")
    lines.append(f"Compare:   sapo compare {name}")
    # In front of a dash, which would begin a flag.
    here = "./" if folder.name.startswith("-") else ""
    lines.append(f"Export:    sapo export {name} {quoted(here + folder.name + '-export')}")
    if unfinished:
        lines.append(f"Continue:  {again}")
    elif recipe.parent == folder:
        lines.append(f"Longer:    {again} --max_steps {longer}")
    return lines


def quoted(path: str | Path) -> str:
    """For a shell in any folder; a name that is no file here, such as a Hub id, stays as it is."""
    there = Path(path).exists()
    return shlex.quote(str(Path(path).absolute() if there else path))
