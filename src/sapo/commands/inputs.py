"""What a command works on, before any weight is loaded: the tokenizer and the prepared rows.

A large model takes minutes to load, so everything that can be wrong with the data is found first.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import datasets
from transformers.utils import logging

from sapo.commands.arguments import RunArguments
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, DataReport
from sapo.data.loading import load_rows
from sapo.data.mixture import Member, load_mixture, prepare_mixture, split_rows
from sapo.data.texts import PromptTexts, prompt_texts
from sapo.errors import ConfigurationError, DatasetError
from sapo.weights.loading import generation_eos_ids, load_config, load_tokenizer


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tokenizer, prepared training and evaluation rows, and what became of them.

    Attributes:
        tokenizer: the model's.
        train: prepared rows.
        eval: prepared rows, or None if the run does not evaluate.
        train_reports: one for each data set that went into `train`.
        eval_reports: one for each that went into `eval` alone.
    """

    tokenizer: Any
    train: datasets.Dataset
    eval: datasets.Dataset | None
    train_reports: list[DataReport]
    eval_reports: list[DataReport]


def load_inputs(run: RunArguments) -> Inputs:
    """Load the tokenizer, read the rows and prepare them, for training and for `sapo data check` alike.

    Raises:
        ConfigurationError: no model or no data are named, or `max_length` is more than the model takes.
        ModelError, TokenizerError, DatasetError: what is wrong with them.
    """
    config, model_config = run.config, load_config(run.model)
    name, revision = str(run.model.model_name_or_path), run.model.model_revision
    config.check_positions(model_config)
    tokenizer = load_tokenizer(name, revision)
    options = DataOptions.of(config)
    eos_ids = eos_token_ids(tokenizer, generation_eos_ids(name, revision, model_config))
    train, train_reports = prepare_mixture(_training_rows(run), tokenizer, options, eos_ids=eos_ids)
    aside: datasets.Dataset | None = None
    if run.mixture.datasets and run.mixture.test_split_size is not None:
        train, aside = split_rows(train, run.mixture.test_split_size, config.seed)
    if config.eval_strategy == "no":
        return Inputs(tokenizer, train, None, train_reports, [])
    if aside is not None and not run.data.eval_dataset_name:
        return Inputs(tokenizer, train, aside, train_reports, [])
    evaluation, eval_reports = prepare_mixture([_evaluation_rows(run)], tokenizer, options, eos_ids=eos_ids)
    return Inputs(tokenizer, train, evaluation, train_reports, eval_reports)


def load_texts(run: RunArguments, inputs: Inputs) -> tuple[PromptTexts, PromptTexts | None]:
    """Read the prompts of the training and, if there are any, the evaluation rows of `inputs` as text."""
    chat = bool(inputs.tokenizer.chat_template)
    train = prompt_texts(_training_rows(run), chat=chat)
    if inputs.eval is None:
        return train, None
    # Without a report of their own, rows to evaluate on were put aside from the others.
    return train, prompt_texts([_evaluation_rows(run)], chat=chat) if inputs.eval_reports else train


def _training_rows(run: RunArguments) -> list[Member]:
    if run.mixture.datasets:
        return load_mixture(run.mixture)
    data = run.data
    if not data.dataset_name:
        raise ConfigurationError("dataset_name is missing: name a file, a folder or a hub id.")
    rows = load_rows(
        data.dataset_name,
        config=data.dataset_config,
        split=data.dataset_train_split,
        streaming=data.dataset_streaming,
    )
    return [Member(data.dataset_name, rows)]


def _evaluation_rows(run: RunArguments) -> Member:
    data, wanted = run.data, f"eval_strategy={run.config.eval_strategy.value} needs rows to evaluate on"
    if data.eval_dataset_name:
        return Member(data.eval_dataset_name, load_rows(data.eval_dataset_name, config=data.dataset_config))
    if run.mixture.datasets:
        raise DatasetError(f"{wanted}: name them with eval_dataset_name, or set test_split_size.")
    name, split = str(data.dataset_name), data.dataset_test_split
    try:
        return Member(f"{name} ({split})", load_rows(name, config=data.dataset_config, split=split))
    except DatasetError as error:
        raise DatasetError(f"{wanted}: name them with eval_dataset_name ({error})") from error


def quiet_libraries() -> None:
    """Keep the bars and notices of the libraries off the terminal."""
    # peft 0.21 reads a name that transformers 5.23 has deprecated: nothing that a user of a command can change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
