"""`sapo train`: one run from its command line to the closing screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback

from sapo.commands.arguments import RunArguments, as_recipe, build
from sapo.commands.inputs import Inputs, load_inputs, quiet_libraries
from sapo.commands.parser import Parsed
from sapo.commands.rounds import rounds
from sapo.hub.card import write_card
from sapo.runs.folder import check_output_dir
from sapo.runs.metrics import ACCURACY, CHOSEN_CHANGE, LOSS, MARGIN
from sapo.training.callbacks import StopOnSignal
from sapo.training.progress import TerminalProgress
from sapo.training.trainer import SAPOTrainer
from sapo.weights.loading import check_model, load_policy
from sapo.weights.sharding import shutdown_process_group


def run_train(given: Parsed) -> None:
    """Train as the command line says, in this process.

    Raises:
        SapoError: what is wrong with options, data or model; or why the run ended.
    """
    train(build(given.values()), quiet=given.own.quiet)
    shutdown_process_group()


def train(run: RunArguments, *, quiet: bool = False) -> None:
    """Train `run`, or each of its rounds.

    Args:
        run: the options.
        quiet: print warnings and errors only.
    """
    config = run.config
    # Of several processes the first prints.
    console = Console(quiet=quiet or config.process_index > 0)
    if config.num_rounds is not None:
        quiet_libraries()
        for round in rounds(run, console):
            if not _train(round.run, round.inputs, *round.policy(), console, recipe=round.recipe):
                return
        return
    if config.resume_from_checkpoint in (None, "false", "False") and config.process_index == 0:
        check_output_dir(Path(config.output_dir or ""), overwrite=config.overwrite_output_dir)
    quiet_libraries()
    check_model(run.model, config)
    inputs = load_inputs(run)
    for report in [*inputs.train_reports, *inputs.eval_reports]:
        for line in report.lines():
            console.print(line, markup=False, highlight=False)
    _train(run, inputs, *load_policy(run.model, config), console)


def _train(
    run: RunArguments, inputs: Inputs, model: Any, peft_config: Any, console: Console, *, recipe: Path | None = None
) -> bool:
    """One run, or the round of the one that `recipe` gives again; whether it came to its end."""
    config = run.config
    config.disable_tqdm = True
    with StopOnSignal() as stop:
        trainer = SAPOTrainer(
            model,
            config,
            inputs.train,
            inputs.eval,
            processing_class=inputs.tokenizer,
            peft_config=peft_config,
            callbacks=[stop],
        )
        progress = TerminalProgress(
            console,
            inputs.tokenizer,
            trainer.last_pairs,
            log_pairs_steps=config.log_pairs_steps,
            pairs=config.num_pairs_to_print,
        )
        _only_own_progress(trainer, progress)
        try:
            trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        finally:
            progress.close()
        trainer.save_model()
        trainer.run_folder.write_recipe(as_recipe(run))
        if config.push_to_hub:
            trainer.push_to_hub()
        elif trainer.is_world_process_zero():
            write_card(trainer.run_folder.path, str(config.output_dir))
    stopped = stop.received is not None
    _closing_screen(console, trainer, progress, stopped=stopped, recipe=recipe)
    return not (stopped or trainer.stop_reason)


def _only_own_progress(trainer: SAPOTrainer, progress: TerminalProgress) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)


def _closing_screen(
    console: Console, trainer: SAPOTrainer, progress: TerminalProgress, *, stopped: bool, recipe: Path | None
) -> None:
    """What happened, where it lies, what to run next."""
    state, folder, last = trainer.state, trainer.args.output_dir, progress.last
    head = "Stopped" if stopped or trainer.stop_reason else "Done"
    lines = ["", f"{head} after step {state.global_step} of {state.max_steps}."]
    if trainer.stop_reason:
        lines.append(trainer.stop_reason)
    if LOSS.name in last:
        line = f"At the last log: loss {last[LOSS.name]:.4g}"
        if ACCURACY.name in last:
            line += (
                f", the policy prefers the chosen response in {last[ACCURACY.name]:.0%} of pairs, margin "
                f"{last[MARGIN.name]:.3g}"
            )
        lines.append(f"{line}.")
    change = last.get(CHOSEN_CHANGE.name)
    if change is not None:
        fell = " The chosen responses became less likely: see chosen_nll_weight." if change < 0 else ""
        lines.append(f"Log-probability of chosen training responses since the start: {change:+.3g} nats each.{fell}")
    lines.append(f"Policy: {folder}    metrics: {folder}/metrics.jsonl    every option: {folder}/recipe.yaml")
    if trainer.opponent is not None:
        lines.append(f"Opponent (the moving average): {folder}/opponent")
    lines.append("")
    if stopped or trainer.stop_reason or state.global_step < state.max_steps:
        again = recipe or f"{folder}/recipe.yaml"
        lines.append(f"Continue:  sapo train --config {again} --resume_from_checkpoint true")
    elif recipe is None:
        longer = 2 * state.max_steps
        lines.append(
            f"Longer:    sapo train --config {folder}/recipe.yaml --resume_from_checkpoint true --max_steps {longer}"
        )
    load = "AutoPeftModelForCausalLM" if trainer.is_adapter() else "AutoModelForCausalLM"
    package = "peft" if trainer.is_adapter() else "transformers"
    lines.append(f'Use it:    from {package} import {load}; model = {load}.from_pretrained("{folder}")')
    lines.append(f"Export it: sapo export {folder} OUT    (one model folder for vLLM, llama.cpp, Ollama, ...)")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
