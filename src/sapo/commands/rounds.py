"""Self-play in rounds, as SPIN does it (arXiv 2401.01335): one run a round, each from the last one's policy.

Within a round nothing moves but the policy: the model that it starts from writes the pairs of the whole dataset
and is the reference. So a round is a run on paired data, with the same trainer, checkpoints and metrics.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from rich.console import Console
from trl.scripts.utils import DatasetConfig

from sapo.commands.arguments import RunArguments, as_recipe
from sapo.commands.generate import write_pairs
from sapo.commands.inputs import Inputs, load_inputs, load_texts
from sapo.errors import CheckpointError, ConfigurationError
from sapo.runs.files import write_atomically
from sapo.runs.folder import check_output_dir
from sapo.runs.layout import RECIPE_FILE, ROUND_EVAL_PAIRS_FILE, ROUND_FILE, ROUND_FOLDER, ROUND_PAIRS_FILE
from sapo.runs.lock import locked
from sapo.text.terminal import say
from sapo.training.pair_files import PairsReport, read_pairs
from sapo.weights.loading import check_model, load_policy


@dataclass(frozen=True, slots=True)
class Round:
    """One round, ready to be trained.

    Attributes:
        run: what to train: from the policy of the round before, on pairs, into a folder of its own.
        inputs: tokenizer and pairs.
        adapter: with LoRA, the folder of the adapter to continue; None for a new one.
        recipe: gives all rounds again.
    """

    run: RunArguments
    inputs: Inputs
    adapter: Path | None
    recipe: Path

    def policy(self) -> tuple[Any, Any]:
        """The model to train and the configuration of a new adapter (or None)."""
        return load_policy(self.run.model, self.run.config, self.adapter)


def rounds(run: RunArguments, console: Console) -> Iterator[Round]:
    """The rounds that are still to be trained; to ask for the next says that the last one came to its end.

    Args:
        run: with `num_rounds`. `resume_from_checkpoint` true or auto continues in the middle of any part.
        console: for what the user should see.

    Raises:
        ConfigurationError: options that rounds do not have, or a folder that is not empty.
        CheckpointError: nothing to resume, or a round that was begun from something else.
    """
    config = run.config
    root = Path(config.output_dir or "")
    _begin(run, root)
    check_model(run.model, config)
    inputs = load_inputs(run)
    say(console, *inputs.lines())
    with locked(root) if config.process_index == 0 else nullcontext():
        yield from _rounds(run, inputs, root, console)


def _rounds(run: RunArguments, inputs: Inputs, root: Path, console: Console) -> Iterator[Round]:
    config, state = run.config, PartialState()
    for number in range(config.num_rounds or 0):
        folder = root / ROUND_FOLDER.format(number=number)
        if (folder / ROUND_FILE).is_file():
            continue
        # The models of the round before are held by cycles; two rounds' would not fit.
        gc.collect()
        console.rule(f"Round {number} of {config.num_rounds}")
        started_from, adapter = run, None
        if number:
            started_from, adapter = _from(run, root / ROUND_FOLDER.format(number=number - 1))
        written = _write_files(started_from, inputs, folder, number, adapter, console)
        yield _round(started_from, inputs, folder, number, adapter)
        if state.is_main_process:
            done = {"round": number, "policy_from": str(adapter or started_from.model.model_name_or_path)}
            write_atomically(folder / ROUND_FILE, json.dumps(done | {"pairs": asdict(written)}, indent=1))
        state.wait_for_everyone()


def _begin(run: RunArguments, root: Path) -> None:
    config = run.config
    if run.model.load_in_4bit or run.model.load_in_8bit:
        raise ConfigurationError(
            "num_rounds with a quantized model is not supported: leave load_in_4bit and load_in_8bit out, or write "
            "pairs with sapo generate and train on them with pair_source=paired."
        )
    if any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED")):
        raise ConfigurationError(
            "num_rounds with sharded weights is not supported: each process holds a whole model while it writes. "
            "Use --accelerate_config multi_gpu."
        )
    if config.suffix == "mask" and config.segment_length is not None:
        raise ConfigurationError(
            "suffix=mask with num_rounds: files of pairs do not keep where a segment ended. Set suffix to drop."
        )
    wanted = config.resume_from_checkpoint
    if wanted not in (None, "true", "True", "auto", "false", "False"):
        raise ConfigurationError(
            f"resume_from_checkpoint={wanted} with num_rounds: give true or auto; the newest part is continued."
        )
    begun = sorted(root.glob(ROUND_FOLDER.format(number="*")))
    if wanted in ("true", "True") and not begun:
        raise CheckpointError(f"{root}: no round to resume. Leave resume_from_checkpoint out to start afresh.")
    if wanted in (None, "false", "False") and config.process_index == 0:
        check_output_dir(root, overwrite=config.overwrite_output_dir)
        for folder in begun:
            shutil.rmtree(folder)
    if config.process_index == 0:
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / RECIPE_FILE, yaml.safe_dump(as_recipe(run), sort_keys=True, allow_unicode=True))
    PartialState().wait_for_everyone()


def _from(run: RunArguments, earlier: Path) -> tuple[RunArguments, Path | None]:
    """The run that starts from the policy of `earlier`: its folder, or with LoRA the same base and its adapter."""
    if run.model.use_peft:
        return run, earlier
    started = copy.copy(run)
    started.model = copy.copy(run.model)
    started.model.model_name_or_path, started.model.model_revision = str(earlier), "main"
    return started, None


def _write_files(
    run: RunArguments, inputs: Inputs, folder: Path, number: int, adapter: Path | None, console: Console
) -> PairsReport:
    texts, eval_texts = load_texts(run, inputs)
    files = [(ROUND_PAIRS_FILE, inputs.train, texts, number)]
    if inputs.eval is not None and eval_texts is not None:
        # Epoch -1: no round has these seeds.
        files.append((ROUND_EVAL_PAIRS_FILE, inputs.eval, eval_texts, -1))
    reports = []
    for name, dataset, text, epoch in files:
        report = write_pairs(
            run, dataset, text, inputs.tokenizer, folder / name, epoch=epoch, console=console, adapter=adapter
        )
        say(console, f"{folder / name}: {report.line()}")
        reports.append(report)
    gc.collect()
    return reports[0]


def _round(run: RunArguments, inputs: Inputs, folder: Path, number: int, adapter: Path | None) -> Round:
    files = [folder / ROUND_PAIRS_FILE]
    if number and run.config.mix_previous_round:
        files.append(folder.with_name(ROUND_FOLDER.format(number=number - 1)) / ROUND_PAIRS_FILE)
    config = copy.copy(run.config)
    config.output_dir = str(folder)
    config.pair_source, config.num_rounds, config.mix_previous_round = "paired", None, False
    config.opponent_system_prompt = None
    config.generation_backend = "transformers"
    # The pairs are in the folder already, and whatever else is there is of this very round.
    config.overwrite_output_dir, config.resume_from_checkpoint = True, "auto"
    train = read_pairs(files, max_length=config.max_length)
    evaluation = None
    if inputs.eval is not None:
        evaluation = read_pairs([folder / ROUND_EVAL_PAIRS_FILE], max_length=config.max_length)
    data, mixture = copy.copy(run.data), copy.copy(run.mixture)
    data.dataset_name, data.dataset_config, data.dataset_train_split = str(files[0]), None, "train"
    data.eval_dataset_name = str(folder / ROUND_EVAL_PAIRS_FILE) if evaluation is not None else None
    mixture.datasets = [DatasetConfig(path=str(file)) for file in files] if len(files) > 1 else []
    own = RunArguments(data=data, mixture=mixture, config=config, model=run.model)
    return Round(
        own,
        Inputs(inputs.tokenizer, train, evaluation, [], []),
        adapter,
        folder.parent / RECIPE_FILE,
    )
