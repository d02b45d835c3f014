"""The command `sapo`: thin; every decision is in the modules below."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo._version import __version__
from sapo.commands.launch import is_asked_for, launch
from sapo.errors import ConfigurationError, SapoError, brief

if TYPE_CHECKING:
    from rich.console import Console

    from sapo.commands.arguments import RunArguments
    from sapo.commands.inputs import Inputs
    from sapo.training.progress import TerminalProgress
    from sapo.training.trainer import SAPOTrainer

USAGE = """\
sapo: Self-Augmented Preference Optimization (arXiv 2405.20830)

  sapo train --config recipe.yaml [--flag value ...]   align a model; `sapo train --help` lists every flag
      --quiet                                          show nothing but warnings and errors
      --accelerate_config NAME                         on all GPUs: multi_gpu, zero2, zero3, fsdp2, or a file
  sapo serve --config recipe.yaml [--train]            start the vLLM servers of a recipe, and its run if asked
      --vllm_python PYTHON --devices 1                 an interpreter that has vLLM; the GPUs of each server
  sapo estimate --config recipe.yaml --gpu h200        memory and seconds of a step, before any weights are read
      --num_gpus N --accelerate_config NAME            divided over N GPUs; --gpu here measures this machine
      --model_config FILE                              a config.json, where the model is not at hand
  sapo generate --output_file FILE [--flag value ...]  a model's pairs for a data set, as a preference data set
  sapo compare RUN RUN ... [--json FILE]               runs side by side: settings, curves, time, memory
  sapo data check FILE --model_name_or_path MODEL      what the trainer will see, before any training
  sapo recipes [NAME]                                  the shipped recipes, or one of them to read or copy
  sapo evaluate MODEL --suite NAME                     did it get better? local measures, benchmarks, judged chat
  sapo report RUN [RUN ...] [--serve]                  curves, pairs and warnings of runs, as one page
  sapo chat MODEL|RUN                                  talk to a model; of a run to start, opponent and policy
  sapo demo [--output_dir FOLDER]                      the whole method on a built-in task, in minutes on a CPU
  sapo --version

An error is one line and exit status 2; --debug adds the traceback.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    # It tells everybody without a GPU, at every start, that there is none.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    given = [argument for argument in given if argument != "--debug"]
    try:
        return _dispatch(given)
    except SapoError as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {brief(error, 2000)}\n")
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}. Make room, then --resume_from_checkpoint true.\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130


def _dispatch(given: list[str]) -> int:
    match given:
        case [] | ["--help"] | ["-h"] | ["help"]:
            sys.stdout.write(USAGE)
        case ["--version"]:
            sys.stdout.write(f"sapo {__version__}\n")
        case ["train", *rest] if is_asked_for(rest):
            launch("train", rest)
        case ["train", *rest]:
            from sapo.weights.sharding import shutdown_process_group

            train(rest)
            shutdown_process_group()
        case ["serve", *rest]:
            from sapo.commands.serve import run_serve

            return run_serve(rest)
        case ["generate", *rest]:
            from sapo.commands.generate import run_generate

            _quiet()
            run_generate(rest)
        case ["compare", *rest]:
            from sapo.commands.compare import run_compare

            run_compare(rest)
        case ["data", "check", *rest]:
            data_check(rest)
        case ["estimate", *rest]:
            from sapo.commands.estimate import run_estimate

            _quiet()
            run_estimate(rest)
        case ["recipes", *rest]:
            from sapo.commands.recipes import run_recipes

            run_recipes(rest)
        case ["evaluate", *rest]:
            from sapo.commands.evaluate import run_evaluate

            run_evaluate(rest)
        case ["report", *rest]:
            from sapo.commands.report import report

            report(rest)
        case ["chat", *rest]:
            from sapo.commands.chat import chat

            _quiet()
            chat(rest)
        case ["demo", *rest]:
            from sapo.demo.run import run_demo

            run_demo(rest)
        case _:
            raise ConfigurationError(f"unknown command {' '.join(given[:2])}. Run sapo --help.")
    return 0


def train(arguments: Sequence[str]) -> None:
    """`sapo train`."""
    from rich.console import Console

    from sapo.commands.arguments import parse
    from sapo.commands.inputs import load_inputs
    from sapo.commands.rounds import rounds
    from sapo.runs.folder import check_output_dir
    from sapo.weights.loading import check_model, load_policy

    quiet = "--quiet" in arguments
    run = parse([argument for argument in arguments if argument != "--quiet"], "sapo train")
    config = run.config
    # Of several processes the first speaks.
    console = Console(quiet=quiet or config.process_index > 0)
    if config.num_rounds is not None:
        _quiet()
        for round in rounds(run, console):
            if not _train(round.run, round.inputs, *round.policy(), console, recipe=round.recipe):
                return
        return
    if config.resume_from_checkpoint in (None, "false", "False") and config.process_index == 0:
        check_output_dir(Path(config.output_dir or ""), overwrite=config.overwrite_output_dir)
    _quiet()
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
    from sapo.commands.arguments import as_recipe
    from sapo.hub.card import write_card
    from sapo.training.callbacks import StopOnSignal
    from sapo.training.progress import TerminalProgress
    from sapo.training.trainer import SAPOTrainer

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
            console, trainer, log_pairs_steps=config.log_pairs_steps, pairs=config.num_pairs_to_print
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


def data_check(arguments: Sequence[str]) -> None:
    """`sapo data check FILE`."""
    from rich.console import Console

    from sapo.commands.arguments import parse
    from sapo.commands.data_check import check_data
    from sapo.commands.inputs import load_inputs

    arguments = list(arguments)
    if arguments and not arguments[0].startswith("--"):
        arguments = ["--dataset_name", *arguments]
    run = parse([*arguments, "--use_cpu", "--report_to", "none"], "sapo data check")
    _quiet()
    inputs = load_inputs(run)
    check_data(
        inputs.train,
        inputs.train_reports,
        inputs.tokenizer,
        segment_length=run.config.segment_length,
        tail_margin=run.config.tail_margin,
        seed=run.config.seed,
        console=Console(),
    )


def _quiet() -> None:
    """Leave the terminal to this program: no bars or notices of the libraries."""
    import warnings

    import datasets
    from transformers.utils import logging

    # peft 0.21 reads a name that transformers 5.23 has deprecated: nothing that a user of this command can change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _only_own_progress(trainer: SAPOTrainer, progress: TerminalProgress) -> None:
    from transformers import PrinterCallback

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
    if "loss" in last:
        line = f"At the last log: loss {last['loss']:.4g}"
        if "rewards/accuracies" in last:
            line += (
                f", the policy prefers the chosen response in {last['rewards/accuracies']:.0%} of pairs, margin "
                f"{last['rewards/margins']:.3g}"
            )
        lines.append(f"{line}.")
    change = last.get("self_play/chosen_logp_change")
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
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
