"""What a command works on, before any weight is loaded: the tokenizer and the prepared rows.

A large model takes minutes to load, so everything that can be wrong with the data is found first.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from sapo.commands.data_arguments import RunDescription
from sapo.commands.notices import fit_messages
from sapo.data.chat_template import use_chat_template
from sapo.data.clock import forget_idle_date, parse_date, prints_date
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions
from sapo.data.fingerprints import trained_on
from sapo.data.loading import evaluation_split, load_rows
from sapo.data.mixture import Member, load_mixture, prepare_mixture, split_rows
from sapo.data.parallel import ROWS_THAT_PAY
from sapo.data.report import DataReport
from sapo.data.texts import PromptTexts, prompt_texts
from sapo.errors import CheckpointError, ConfigurationError, DatasetError
from sapo.options.rules import OptionRules
from sapo.runs.checkpoint import read_state
from sapo.runs.user_cache import user_cache
from sapo.text.interrupts import raise_swallowed
from sapo.weights.description import (
    generation_eos_ids,
    load_config,
    load_template_tokenizer,
    load_tokenizer,
    positions_of,
    vocabulary_of,
)

_ROWS_WITH_BAR = 5000


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tokenizer, prepared training and evaluation rows, and what became of them.

    Attributes:
        tokenizer: the model's, with the chat template that was asked for.
        train: prepared rows.
        eval: prepared rows, or None if the run does not evaluate.
        train_reports: one for each dataset that went into `train`.
        eval_reports: one for each that went into `eval` alone.
    """

    tokenizer: Any
    train: datasets.Dataset
    eval: datasets.Dataset | None
    train_reports: list[DataReport]
    eval_reports: list[DataReport]

    def lines(self) -> list[str]:
        """What became of the rows, for the terminal."""
        return [line for report in [*self.train_reports, *self.eval_reports] for line in report.lines()]

    def shared_rows(self) -> list[str]:
        """A warning if rows to evaluate on are trained on."""
        return [] if self.eval is None else trained_on(self.train, self.eval)


def load_inputs(run: RunDescription, *, count_faults: bool = False) -> Inputs:
    """Load the tokenizer, read the rows and prepare them, for training and for `sapo data check` alike.

    Where the chat template prints the date, `run.config.template_date` is set to the one that is printed.

    Args:
        run: what the command was asked for.
        count_faults: count malformed rows in the reports instead of stopping at the first.

    Raises:
        ConfigurationError: no model or no data are named, or `max_length` is more than the model takes.
        ModelError, TokenizerError, DatasetError: what is wrong with them.
        KeyboardInterrupt: see `raise_swallowed`.
    """
    raise_swallowed()
    config, model_config = run.config, load_config(run.model)
    name, revision = str(run.model.model_name_or_path), run.model.model_revision
    config.check_positions(positions_of(model_config))
    tokenizer = load_tokenizer(name, revision)
    new_tokens = use_chat_template(tokenizer, config.chat_template_path, load_template_tokenizer)
    if new_tokens:
        # The embeddings will grow to these when the model is loaded.
        text_config = model_config.get_text_config()
        text_config.vocab_size = max(text_config.vocab_size, new_tokens[-1] + 1)
    if prints_date(tokenizer):
        config.template_date = template_date(config)
    forget_idle_date(config, tokenizer)
    options = DataOptions.of(config, vocabulary_of(model_config))
    eos_ids = eos_token_ids(tokenizer, generation_eos_ids(name, revision, model_config))

    def prepare(members: list[Member]) -> tuple[datasets.Dataset, list[DataReport]]:
        with _bar(members) as progress:
            return prepare_mixture(
                members,
                tokenizer,
                options,
                eos_ids=eos_ids,
                count_faults=count_faults,
                num_proc=config.dataset_num_proc,
                cache_folder=user_cache("rows") if _rows(members) >= ROWS_THAT_PAY else None,
                progress=progress,
            )

    train, train_reports = prepare(_training_rows(run, tolerant=count_faults))
    aside: datasets.Dataset | None = None
    if run.mixture.datasets and run.mixture.test_split_size is not None:
        train, aside = split_rows(train, run.mixture.test_split_size, config.seed)
    if config.eval_strategy == "no":
        return Inputs(tokenizer, train, None, train_reports, [])
    if aside is not None and not run.data.eval_dataset_name:
        return Inputs(tokenizer, train, aside, train_reports, [])
    evaluation, eval_reports = prepare([_evaluation_rows(run, tolerant=count_faults)])
    return Inputs(tokenizer, train, evaluation, train_reports, eval_reports)


def _rows(members: list[Member]) -> int:
    """How many rows there are, of streams none."""
    return sum(0 if isinstance(member.rows, datasets.IterableDataset) else len(member.rows) for member in members)


@contextmanager
def _bar(members: list[Member]) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal while many rows are prepared; yields what is called with the number that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, total, before = Console(stderr=True), _rows(members), 0
    if total < _ROWS_WITH_BAR or not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield lambda rows: None
        return
    columns = (TextColumn("preparing rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task, last = progress.add_task("", total=total), 0

        def show(rows: int) -> None:
            nonlocal before, last
            # Each member counts from 0.
            before += last if rows < last else 0
            last = rows
            progress.update(task, completed=before + rows)

        yield show


def template_date(config: OptionRules) -> str:
    """The date that chat templates print: the one asked for; of a run that resumes, the one it began with; today's.

    Raises:
        ConfigurationError: `template_date` is not a date.
    """
    if config.template_date is not None:
        return parse_date(config.template_date).isoformat()
    return _date_of_checkpoint(config) or datetime.date.today().isoformat()


def _date_of_checkpoint(config: OptionRules) -> str | None:
    wanted = config.resume_from_checkpoint
    if wanted in (None, "false", "False"):
        return None
    named = Path(str(wanted))
    folders = [named] if named.is_dir() else sorted(Path(config.output_dir or ".").glob("checkpoint-*"), reverse=True)
    for folder in folders:
        try:
            found = dict(read_state(folder)["facts"]).get("template_date")
        except (CheckpointError, KeyError, TypeError, ValueError):
            continue  # the trainer tells what is wrong with a checkpoint
        if isinstance(found, str):
            return found
    return None


def load_texts(run: RunDescription, inputs: Inputs) -> tuple[PromptTexts, PromptTexts | None]:
    """Read the prompts of the training and, if there are any, the evaluation rows of `inputs` as text."""
    chat = bool(inputs.tokenizer.chat_template)
    train = prompt_texts(_training_rows(run), chat=chat)
    if inputs.eval is None:
        return train, None
    # Without a report of their own, rows to evaluate on were put aside from the others.
    return train, prompt_texts([_evaluation_rows(run)], chat=chat) if inputs.eval_reports else train


def _training_rows(run: RunDescription, *, tolerant: bool = False) -> list[Member]:
    if run.mixture.datasets:
        return load_mixture(run.mixture, tolerant=tolerant)
    data = run.data
    if not data.dataset_name:
        raise ConfigurationError("dataset_name is missing: name a file, a folder or a Hub id.")
    rows = load_rows(
        data.dataset_name,
        config=data.dataset_config,
        split=data.dataset_train_split,
        streaming=data.dataset_streaming,
        tolerant=tolerant,
    )
    return [Member(data.dataset_name, rows)]


def _evaluation_rows(run: RunDescription, *, tolerant: bool = False) -> Member:
    data, strategy = run.data, run.config.eval_strategy
    wanted = f"eval_strategy={getattr(strategy, 'value', strategy)} needs rows to evaluate on"
    if data.eval_dataset_name:
        name = data.eval_dataset_name
        # Its configuration is its own: that of the training data need not be there.
        config = data.dataset_config if name == data.dataset_name else None
        split = evaluation_split(name, config, data.dataset_test_split)
        label = name if split.startswith("train") else f"{name} ({split})"
        return Member(label, load_rows(name, config=config, split=split, tolerant=tolerant))
    if run.mixture.datasets:
        raise DatasetError(f"{wanted}: name them with eval_dataset_name, or set test_split_size.")
    name, split = str(data.dataset_name), data.dataset_test_split
    try:
        rows = load_rows(name, config=data.dataset_config, split=split, tolerant=tolerant)
    except DatasetError as error:
        raise DatasetError(f"{wanted}: name them with eval_dataset_name ({error})") from error
    return Member(f"{name} ({split})", rows)


def quiet_libraries() -> None:
    """Keep the bars and notices of the libraries off the terminal, and break what they report between words."""
    fit_messages()
    # peft 0.21 reads a name that transformers 5.23 has deprecated: nothing that a user of a command can change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # peft, of a base that is a merged adapter or a GGUF file: there is no configuration to compare the vocabulary with.
    warnings.filterwarnings("ignore", message="Could not find a config file in", category=UserWarning)
    # torch, on a machine without an accelerator; the option is Trainer's default, which no one there has chosen.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    # torch 2.13, of collectives that DeepSpeed calls by their older names.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
