"""The command `sapo`: thin; every decision is in the modules below."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo._version import __version__
from sapo.errors import ConfigurationError, DatasetError, SapoError

if TYPE_CHECKING:
    from rich.console import Console

    from sapo.arguments import RunArguments
    from sapo.terminal.progress import TerminalProgress
    from sapo.trainer import SAPOTrainer

USAGE = """\
sapo: Self-Augmented Preference Optimization (arXiv 2405.20830)

  sapo train --config recipe.yaml [--flag value ...]   align a model; `sapo train --help` lists every flag
  sapo data check FILE --model_name_or_path MODEL      what the trainer will see, before any training
  sapo demo [--output_dir FOLDER]                      the whole method on a built-in task, in minutes on a CPU
  sapo --version

An error is one line and exit status 2; --debug adds the traceback.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        return _dispatch(given)
    except SapoError as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
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
        case ["train", *rest]:
            train(rest)
        case ["data", "check", *rest]:
            data_check(rest)
        case ["demo", *rest]:
            from sapo.demo.run import run_demo

            run_demo(rest)
        case _:
            raise ConfigurationError(f"unknown command {' '.join(given[:2])}. Run sapo --help.")
    return 0


def train(arguments: Sequence[str]) -> None:
    """`sapo train`."""
    from rich.console import Console

    from sapo.arguments import parse
    from sapo.models import load_policy, load_tokenizer
    from sapo.run_folder import check_output_dir
    from sapo.terminal.progress import TerminalProgress
    from sapo.trainer import SAPOTrainer
    from sapo.training_callbacks import StopOnSignal

    run = parse(arguments, "sapo train")
    console = Console()
    if not run.model.model_name_or_path:
        raise ConfigurationError("model_name_or_path is missing: name a model folder or a hub id.")
    if run.config.resume_from_checkpoint in (None, "false", "False"):
        check_output_dir(Path(run.config.output_dir or ""), overwrite=run.config.overwrite_output_dir)
    _quiet()
    train_rows, eval_rows = _rows(run)
    tokenizer = load_tokenizer(run.model.model_name_or_path, run.model.model_revision)
    model, peft_config = load_policy(run.model, run.config)
    config = run.config
    config.disable_tqdm = True
    with StopOnSignal() as stop:
        trainer = SAPOTrainer(
            model,
            config,
            train_rows,
            eval_rows,
            processing_class=tokenizer,
            peft_config=peft_config,
            data_names=_names(run),
            callbacks=[stop],
        )
        for report in trainer.data_reports.values():
            for line in report.lines():
                console.print(line, markup=False, highlight=False)
        progress = TerminalProgress(
            console, trainer, log_pairs_steps=config.log_pairs_steps, pairs=config.num_pairs_to_print
        )
        _only_own_progress(trainer, progress)
        try:
            trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        finally:
            progress.close()
        trainer.save_model()
        trainer.run_folder.write_recipe_and_card(_recipe(run), str(run.model.model_name_or_path))
    _closing_screen(console, trainer, progress, stopped=stop.received is not None)


def data_check(arguments: Sequence[str]) -> None:
    """`sapo data check FILE`."""
    from rich.console import Console
    from transformers import GenerationConfig

    from sapo.arguments import parse
    from sapo.data import DataOptions, end_token_ids, prepare_dataset
    from sapo.models import load_tokenizer
    from sapo.terminal.data_check import check_data

    arguments = list(arguments)
    if arguments and not arguments[0].startswith("--"):
        arguments = ["--dataset_name", *arguments]
    run = parse([*arguments, "--use_cpu", "--report_to", "none"], "sapo data check")
    name = run.model.model_name_or_path
    if not name:
        raise ConfigurationError("model_name_or_path is missing: the model's tokenizer decides what the trainer sees.")
    _quiet()
    rows, _ = _rows(run)
    tokenizer = load_tokenizer(name, run.model.model_revision)
    try:
        generation_eos = GenerationConfig.from_pretrained(name, revision=run.model.model_revision).eos_token_id
    except OSError:
        generation_eos = None  # a model without a generation config: the tokenizer's end token counts alone
    config = run.config
    prepared, report = prepare_dataset(
        rows,
        tokenizer,
        DataOptions.of(config),
        end_ids=end_token_ids(tokenizer, generation_eos),
        source=str(run.data.dataset_name or "mixture"),
    )
    check_data(
        prepared,
        report,
        tokenizer,
        segment_length=config.segment_length,
        tail_margin=config.tail_margin,
        seed=config.seed,
        console=Console(),
    )


def _rows(run: RunArguments) -> tuple[Any, Any]:
    """Training rows and, when the run evaluates, evaluation rows."""
    from sapo.data import load_mixture, load_rows

    data, evaluates = run.data, run.config.eval_strategy != "no"
    if run.mixture.datasets:
        mixture = load_mixture(run.mixture)
        train_rows = mixture[data.dataset_train_split]
        eval_rows = mixture.get(data.dataset_test_split)
    else:
        if not data.dataset_name:
            raise ConfigurationError("dataset_name is missing: name a file, a folder or a hub id.")
        train_rows = load_rows(
            data.dataset_name,
            config=data.dataset_config,
            split=data.dataset_train_split,
            streaming=data.dataset_streaming,
        )
        eval_rows = None
    if not evaluates:
        return train_rows, None
    if data.eval_dataset_name:
        eval_rows = load_rows(data.eval_dataset_name, config=data.dataset_config, split="train")
    elif eval_rows is None:
        try:
            eval_rows = load_rows(str(data.dataset_name), config=data.dataset_config, split=data.dataset_test_split)
        except DatasetError as error:
            raise DatasetError(
                f"eval_strategy={run.config.eval_strategy.value} needs rows to evaluate on: name them with "
                f"eval_dataset_name ({error})"
            ) from error
    return train_rows, eval_rows


def _names(run: RunArguments) -> tuple[str, str]:
    """What errors call the training and the evaluation rows."""
    name = run.data.dataset_name or "the mixture"
    return name, run.data.eval_dataset_name or f"{name} ({run.data.dataset_test_split})"


def _recipe(run: RunArguments) -> dict[str, Any]:
    from sapo.arguments import as_recipe

    return as_recipe(run)


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


def _closing_screen(console: Console, trainer: SAPOTrainer, progress: TerminalProgress, *, stopped: bool) -> None:
    """What happened, where it lies, what to run next."""
    state, folder, last = trainer.state, trainer.args.output_dir, progress.last
    head = "Stopped" if stopped or trainer.stop_reason else "Done"
    lines = ["", f"{head} after step {state.global_step} of {state.max_steps}."]
    if trainer.stop_reason:
        lines.append(trainer.stop_reason)
    if "loss" in last:
        lines.append(
            f"At the last log: loss {last['loss']:.4g}, the policy prefers the chosen response in "
            f"{last['rewards/accuracies']:.0%} of pairs, margin {last['rewards/margins']:.3g}."
        )
    change = last.get("self_play/chosen_logp_change")
    if change is not None:
        fell = " The chosen responses became less likely: see chosen_nll_weight." if change < 0 else ""
        lines.append(f"Log-probability of chosen training responses since the start: {change:+.3g} nats each.{fell}")
    lines.append(f"Policy: {folder}    metrics: {folder}/metrics.jsonl    every option: {folder}/recipe.yaml")
    if trainer.opponent is not None:
        lines.append(f"Opponent (the moving average): {folder}/opponent")
    lines.append("")
    if stopped or state.global_step < state.max_steps:
        lines.append(f"Continue:  sapo train --config {folder}/recipe.yaml --resume_from_checkpoint true")
    else:
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
