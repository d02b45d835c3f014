"""`sapo train`: one run from its command line to the closing screen."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from sapo.commands.arguments import RunArguments, as_recipe, build
from sapo.commands.closing import Ending, closing_lines, quoted
from sapo.commands.data_arguments import all_values
from sapo.commands.inputs import Inputs, load_inputs, quiet_libraries
from sapo.commands.notices import held_notices
from sapo.commands.parser import Parsed
from sapo.commands.rounds import rounds
from sapo.commands.starting import check_libraries, check_packages, library_errors
from sapo.errors import SapoError, TrainingError
from sapo.hub.card import card, write_card
from sapo.options.idle import idle
from sapo.report.page import render, report_data
from sapo.runs.folder import RunFolder, check_output_dir
from sapo.runs.layout import CARD_FILE
from sapo.runs.reading import read_run
from sapo.runs.world import World
from sapo.text.terminal import say
from sapo.training.callbacks import KeepRecipe, StopOnSignal
from sapo.training.progress import TerminalProgress, showing
from sapo.training.trainer import SAPOTrainer
from sapo.weights.loading import check_model, load_policy
from sapo.weights.sharding import shutdown_process_group, will_shard_weights

logger = logging.get_logger(__name__)


def run_train(given: Parsed) -> None:
    """Train as the command line says, in this process.

    Raises:
        SapoError: what is wrong with options, data or model; or why the run ended.
    """
    run = build(given.values())
    config = run.config
    notes = idle(given.chosen(), all_values(run), device=config.device.type, processes=config.world_size)
    train(run, quiet=given.own.quiet, notes=notes)
    if shutdown_process_group():
        # All is written. A thread of a connection that is alive while Python shuts down may abort the process, which
        # the launcher would report as a run that failed.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def train(run: RunArguments, *, quiet: bool = False, notes: Sequence[str] = ()) -> None:
    """Train `run`, or each of its rounds.

    Args:
        run: the options.
        quiet: print warnings and errors only.
        notes: lines about the options, to print before those about the data.
    """
    config = run.config
    # Of several processes the first prints.
    console = Console(quiet=quiet or config.process_index > 0)
    begun = False

    def begin() -> None:
        nonlocal begun
        begun = True
        notices.release()

    with held_notices() as notices, library_errors(as_recipe(run), lambda: begun):
        notices.dropped = config.process_index > 0 and config.log_level_replica == "warning"
        check_packages(run)
        for note in notes if config.process_index == 0 else ():
            logger.warning(note)
        if config.num_rounds is not None:
            quiet_libraries()
            check_libraries(config)
            for round in rounds(run, console):
                if not _train(round.run, round.inputs, *round.policy(), console, begin=begin, recipe=round.recipe):
                    return
            return
        # Nothing here communicates: what is wrong in one process, or in all of them, is said once.
        with World.current().agreeing(), library_errors(as_recipe(run), lambda: False):
            if config.process_index == 0:
                afresh = config.resume_from_checkpoint in (None, "false", "False")
                path = Path(config.output_dir or "")
                check_output_dir(path, overwrite=config.overwrite_output_dir or not afresh)
            quiet_libraries()
            check_libraries(config)
            check_model(run.model, config)
            inputs = load_inputs(run)
        say(console, *inputs.lines())
        # Sharded weights are spread while they are loaded, by all processes together.
        with nullcontext() if will_shard_weights() else World.current().agreeing():
            policy = load_policy(run.model, config)
        _train(run, inputs, *policy, console, begin=begin)


def _train(
    run: RunArguments,
    inputs: Inputs,
    model: Any,
    peft_config: Any,
    console: Console,
    *,
    begin: Callable[[], None],
    recipe: Path | None = None,
) -> bool:
    """One run, or the round of the one that `recipe` gives again; whether it came to its end.

    Args:
        run: what to train.
        inputs: tokenizer and rows.
        model: the policy.
        peft_config: of a new adapter, or None.
        console: to print on.
        begin: called after the first step.
        recipe: of all rounds.

    Raises:
        SapoError: why the run cannot begin or go on, or what of its results could not be written.
    """
    config = run.config
    config.disable_tqdm = True
    with StopOnSignal(begin) as stop:
        trainer = SAPOTrainer(
            model,
            config,
            inputs.train,
            inputs.eval,
            processing_class=inputs.tokenizer,
            peft_config=peft_config,
            callbacks=[stop],
        )
        folder = trainer.run_folder
        progress = TerminalProgress(
            console,
            inputs.tokenizer,
            trainer.last_pairs,
            log_pairs_steps=0 if config.objective == "sft" else config.log_pairs_steps,
            pairs=config.num_pairs_to_print,
        )
        trainer.add_callback(KeepRecipe(folder, as_recipe(run), lambda: _rehearse(folder.path)))
        say(console, f"Follow this run: sapo report {quoted(folder.path.absolute())} --serve")
        with folder.locked():
            with showing(progress, trainer):
                trainer.train(resume_from_checkpoint=_checkpoint(folder, config.resume_from_checkpoint, console))
            _save(trainer)
        # Also one that came after the last step, to whichever process: all go on to another round, or none does.
        stopped = stop.is_told(config)
    ending = Ending(
        folder.path, trainer.state, stopped, trainer.stop_reason,
        opponent=trainer.opponent is not None, adapter=trainer.is_adapter(), plain=not inputs.tokenizer.chat_template,
    )  # fmt: skip
    say(console, *closing_lines(run, ending, recipe))
    return not (stopped or trainer.stop_reason)


def _checkpoint(folder: RunFolder, wanted: str | None, console: Console) -> str | None:
    """Find out where the run resumes from, and say so."""
    found = folder.find_checkpoint(wanted)
    if found is None:
        if wanted == "auto":
            say(console, f"No checkpoint in {folder.path}: starting afresh.")
        return wanted
    say(console, f"Resuming from {found}.")
    return str(found)


def _rehearse(folder: Path) -> None:
    """Make card and report of a run that begins: what of an earlier one is damaged in the folder shows now."""
    card(read_run(folder), folder.name, picture=False)
    render(report_data([folder]), live=False)


def _save(trainer: SAPOTrainer) -> None:
    """Save models, card and what else there is, each whatever becomes of the others.

    Raises:
        SapoError: what could not be saved.
    """
    folder, error = trainer.run_folder, None
    try:
        trainer.save_model()
    except SapoError as raised:
        error = raised
    if trainer.args.push_to_hub and error is None:
        trainer.push_to_hub()
    elif trainer.is_world_process_zero():
        folder.attempt(CARD_FILE, lambda: write_card(folder.path, str(trainer.args.output_dir)))
    with World.current().agreeing():
        if error is not None:
            raise error
        if folder.failed:
            raise TrainingError(
                f"the run is complete and its models are in {folder.path}, but not {' and '.join(folder.failed)}. "
                f"`sapo report {quoted(folder.path)}` writes the report again."
            )
