"""`sapo generate`: the pairs of a model for a data set, as a preference data set for this or any other tool."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sapo.commands.arguments import RunArguments, build
from sapo.commands.inputs import load_inputs, load_texts, quiet_libraries
from sapo.commands.parser import Parsed
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import dataset_digest
from sapo.data.texts import PromptTexts
from sapo.errors import CheckpointError, ConfigurationError
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.protocol import Generator
from sapo.generation.sampling import Sampling
from sapo.generation.vllm.servers import VLLMServers
from sapo.options import pair_options
from sapo.preference.self_play import self_play
from sapo.runs.files import folder_digest
from sapo.runs.pair_files import PairsReport, PairWriter
from sapo.training.generators import checked_servers
from sapo.weights.embeddings import fit_model, refuse_new_rows
from sapo.weights.loading import check_model, generation_eos_ids, load_config, load_generating
from sapo.weights.policy import padding_token_id
from sapo.weights.source import find_source

FLAG = "--output_file"
DEFAULT_BATCH = 32
"""Rows written together unless `generation_batch_size` says otherwise; a whole data set at once would not fit."""

ROWS_A_PART = 256
"""Examples written between two points at which a killed run can go on."""


def run_generate(given: Parsed) -> None:
    """Write the pairs of `--model_name_or_path` for `--dataset_name` to `--output_file`; flags as of `sapo train`.

    Raises:
        SapoError: what is wrong with the options, the model or the data; or a file that exists already.
    """
    file: Path = given.own.output_file
    quiet_libraries()
    run = build(given.values() | {"report_to": ["none"]})
    if run.config.pair_source != "self_play":
        raise ConfigurationError(f"pair_source={run.config.pair_source}: sapo generate writes pairs by self-play.")
    if run.config.generation_backend == "vllm_colocate":
        raise ConfigurationError("generation_backend=vllm_colocate: sapo generate writes here or on vllm_server.")
    if file.suffix != ".parquet" or file.is_dir():
        raise ConfigurationError(f"{FLAG} {file}: name a file that ends in .parquet.")
    if file.exists():
        raise ConfigurationError(f"{FLAG} {file} exists already. Name another, or remove it.")
    console = Console(quiet=run.config.process_index > 0)
    check_model(run.model, run.config)
    inputs = load_inputs(run)
    for report in inputs.train_reports:
        for line in report.lines():
            console.print(line, markup=False, highlight=False)
    texts, _ = load_texts(run, inputs)
    written = write_pairs(run, inputs.train, texts, inputs.tokenizer, file, epoch=0, console=console)
    console.print(f"{file}: {written.line()}", markup=False, highlight=False, soft_wrap=True)


def write_pairs(
    run: RunArguments,
    dataset: datasets.Dataset,
    texts: PromptTexts,
    tokenizer: Any,
    file: Path,
    *,
    epoch: int,
    console: Console,
    adapter: Path | None = None,
) -> PairsReport:
    """Let the model of `run` write the rejected responses of `dataset`, all of them or what a killed run left.

    Args:
        run: names the model, and how pairs are made.
        dataset: prepared rows.
        texts: of the same rows.
        tokenizer: the model's.
        file: the result. If it is there and was written from the same, nothing is done.
        epoch: seeds differ from epoch to epoch.
        console: for progress.
        adapter: folder of an adapter on the model.

    Raises:
        CheckpointError: the file, or a part of it, was written from something else.
        DatasetError: the model wrote nothing but the chosen responses.
    """
    config, state = run.config, PartialState()
    name = str(run.model.model_name_or_path)
    batch = config.generation_batch_size or DEFAULT_BATCH
    facts = {option: getattr(config, option) for option in pair_options()} | {
        "model": _identity(name if adapter is None else str(adapter), run.model.model_revision),
        "dtype": str(run.model.dtype),
        "dataset": dataset_digest(dataset),
        "epoch": epoch,
        "generation_batch_size": batch,
    }
    ends = eos_token_ids(tokenizer, generation_eos_ids(name, run.model.model_revision, load_config(run.model)))
    writer = PairWriter(
        file,
        facts,
        ends,
        rows_a_part=ROWS_A_PART,
        process=state.process_index,
        processes=state.num_processes,
        wait=state.wait_for_everyone,
    )
    report = writer.report()
    if report is not None:
        return report
    if config.generation_backend == "vllm_server":
        generator: Generator = _servers(run, tokenizer, ends, adapter, f"{facts['model'][:12]}-{epoch}")
    else:
        model = load_generating(run.model, config, adapter)
        if config.chat_template_path is not None:
            fit_model(model, tokenizer, seed=config.seed)
        generator = TransformersGenerator(
            lambda: nullcontext(model),
            Sampling(config.temperature, config.top_k, config.top_p),
            eos_ids=ends,
            pad_token_id=padding_token_id(tokenizer, ends),
            batch_size=batch,
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(f"parts of {file.name}", total=writer.remaining(dataset))
        source = self_play(generator, config, eos_ids=ends)
        writer.write_parts(dataset, source, epoch=epoch, each=lambda: progress.advance(task))
    writer.join(dataset, tokenizer, texts, skip_identical=config.skip_identical)
    if isinstance(generator, VLLMServers):
        generator.close()
    written = writer.report()
    if written is None:
        raise CheckpointError(f"{file}: not there after it was written; do all processes see the same folder?")
    return written


def _servers(
    run: RunArguments, tokenizer: Any, ends: Collection[int], adapter: Path | None, version: str
) -> VLLMServers:
    """The servers of `run`, with the model's weights; all processes take part.

    Raises:
        ConfigurationError, GenerationError: no folder to give them, or what is wrong with them.
    """
    config, state = run.config, PartialState()
    source = find_source(str(run.model.model_name_or_path), run.model.model_revision)
    adapter = adapter or (Path(source.adapter) if source.adapter else None)
    folder = adapter or Path(source.base)
    if not folder.is_dir():
        raise ConfigurationError(
            f"model_name_or_path={folder} with generation_backend=vllm_server: the servers are given the weights as a "
            "folder. Name a local one."
        )
    refuse_new_rows(tokenizer, load_config(run.model).get_text_config().vocab_size, config.generation_backend)
    servers = checked_servers(config, tokenizer, load_config(run.model), eos_ids=ends, adapter=adapter is not None)
    state.wait_for_everyone()
    servers.load(folder, version)
    return servers


def _identity(name: str, revision: str) -> str:
    """A local model by its weights, wherever it lies; one of the hub by its name."""
    return folder_digest(Path(name), ("*.safetensors", "*.bin")) or f"{name}@{revision}"
