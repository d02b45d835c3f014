"""`sapo generate`: the pairs of a model for a dataset, as a preference dataset for this or any other tool."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
from sapo.commands.starting import check_packages
from sapo.data.chat_template import use_chat_template
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, dataset_digest
from sapo.data.loading import load_rows
from sapo.data.texts import PromptTexts
from sapo.data.unanswered import encode_prompts, shipped_prompts
from sapo.errors import CheckpointError, ConfigurationError, DatasetError
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.protocol import Generator
from sapo.generation.sampling import Sampling
from sapo.generation.vllm.servers import VLLMServers
from sapo.options import pair_options
from sapo.runs.files import folder_digest, replacing
from sapo.seeds import derive_seed
from sapo.text.terminal import say
from sapo.training.generators import checked_servers, self_play
from sapo.training.pair_files import PairsReport, PairWriter, move_to_json_lines
from sapo.weights.description import (
    generation_eos_ids,
    load_config,
    load_template_tokenizer,
    load_tokenizer,
    vocabulary_of,
)
from sapo.weights.embeddings import fit_model, refuse_new_rows
from sapo.weights.loading import check_model, load_generating
from sapo.weights.policy import padding_token_id
from sapo.weights.source import find_source

FLAG = "--output_file"
DEFAULT_BATCH = 32
"""Rows written together unless `generation_batch_size` says otherwise; a whole dataset at once would not fit."""

ROWS_A_PART = 256
"""Examples written between two points at which a killed run can go on."""


SHIPPED = "shipped"
"""Value of `--self_replay` that names the prompts of the package."""
_REPLY_TOKENS = 128
_REPLAY_OPTIONS = {
    "segment_length": None,
    "max_new_tokens": _REPLY_TOKENS,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}
"""Replies of the start are its own distribution, unless the command line says otherwise."""


def run_generate(given: Parsed, begin: Callable[[], None]) -> None:
    """Write the pairs of `--model_name_or_path` for `--dataset_name` to `--output_file`; flags as of `sapo train`.

    With `--self_replay`, write the model's replies to prompts instead.

    Args:
        given: the command line.
        begin: called when the model is ready.

    Raises:
        SapoError: what is wrong with the options, the model or the data; or a file that exists already.
    """
    file: Path = given.own.output_file
    quiet_libraries()
    prompts: str | None = given.own.self_replay
    if prompts is not None:
        given_options = given.values()
        run = build({**_REPLAY_OPTIONS, **given_options, "dataset_name": prompts, "report_to": ["none"]})
        _check_output(run, file, (".parquet",))
        write_replies(run, prompts, file, begin)
        return
    run = build(given.values() | {"report_to": ["none"]})
    if run.config.pair_source != "self_play":
        raise ConfigurationError(f"pair_source={run.config.pair_source}: sapo generate writes pairs by self-play.")
    _check_output(run, file, (".parquet", ".jsonl"))
    console = Console(quiet=run.config.process_index > 0)
    check_packages(run)
    check_model(run.model, run.config, trains=False)
    inputs = load_inputs(run)
    say(console, *inputs.lines())
    texts, _ = load_texts(run, inputs)
    # Parquet first: it has the tokens, and what a killed run is continued by.
    pairs = file if file.suffix == ".parquet" else file.with_name(f".{file.name}.parquet")
    written = write_pairs(run, inputs.train, texts, inputs.tokenizer, pairs, epoch=0, console=console, begin=begin)
    if pairs != file and run.config.process_index == 0:
        move_to_json_lines(pairs, file)
    say(console, f"{file}: {written.line()}")


def _check_output(run: RunArguments, file: Path, suffixes: Sequence[str]) -> None:
    if run.config.generation_backend == "vllm_colocate":
        raise ConfigurationError("generation_backend=vllm_colocate: sapo generate writes here or on vllm_server.")
    if file.suffix not in suffixes or file.is_dir():
        raise ConfigurationError(f"{FLAG} {file}: name a file that ends in {' or '.join(suffixes)}.")
    if file.exists():
        raise ConfigurationError(f"{FLAG} {file} exists already. Name another, or remove it.")


def write_replies(run: RunArguments, prompts: str, file: Path, begin: Callable[[], None] = lambda: None) -> None:
    """Write the model's own replies to prompts as ordinary rows, for `replay_dataset_name` or any SFT data.

    Args:
        run: names the model, and how it samples; `max_new_tokens` limits a reply.
        prompts: rows with prompts, or "shipped".
        file: Parquet, with the prompt's columns and a reply.
        begin: called when the model is ready.

    Raises:
        DatasetError, TokenizerError: the prompts cannot be used.
        ConfigurationError: more than one process.
    """
    config, console = run.config, Console()
    if config.world_size > 1:
        raise ConfigurationError("sapo generate --self_replay runs in one process. Leave the launcher out.")
    if config.opponent_system_prompt is not None:
        raise ConfigurationError("opponent_system_prompt with --self_replay: no opponent replies. Leave it out.")
    check_packages(run)
    check_model(run.model, config, trains=False)
    name = str(run.model.model_name_or_path)
    tokenizer = load_tokenizer(name, run.model.model_revision)
    use_chat_template(tokenizer, config.chat_template_path, load_template_tokenizer)
    model_config = load_config(run.model)
    ends = eos_token_ids(tokenizer, generation_eos_ids(name, run.model.model_revision, model_config))
    rows = (
        [{"instruction": one.text} for one in shipped_prompts("replay")] if prompts == SHIPPED else load_rows(prompts)
    )
    options = DataOptions.of(config, vocabulary_of(model_config))
    asked, ids = encode_prompts(rows, tokenizer, options, eos_ids=ends, source=prompts)
    generator = _generator(run, tokenizer, ends, None, "self-replay")
    begin()
    limit = config.max_new_tokens or _REPLY_TOKENS
    seeds = [derive_seed(config.seed, "self-replay", place) for place in range(len(ids))]
    budgets = [max(0, min(limit, config.max_length - len(prompt))) for prompt in ids]
    replies = generator.generate(ids, budgets, seeds)
    if isinstance(generator, VLLMServers):
        generator.close()
    written, empty, cut = [], 0, 0
    for row, tokens in zip(asked, replies, strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        ended = bool(tokens) and tokens[-1] in ends
        if not text.strip():
            empty += 1
            continue
        cut += not ended
        if "messages" in row:
            written.append({"messages": [*row["messages"][:-1], {"role": "assistant", "content": text}]})
        else:
            written.append({"instruction": row["instruction"], "output": text})
    if not written:
        raise DatasetError(
            f"{prompts}: the model's replies are all empty. Raise max_new_tokens, or check the template."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        datasets.Dataset.from_list(written).to_parquet(str(partial))
    notes = f", {empty} empty ones left out" if empty else ""
    notes += f", {cut} cut off at {limit} tokens (as rows they end there)" if cut else ""
    say(console, f"{file}: {len(written)} replies{notes}")


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
    begin: Callable[[], None] = lambda: None,
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
        begin: called when the model is ready.

    Raises:
        CheckpointError: the file, or a part of it, was written from something else.
        ConfigurationError: another run writes the same file now.
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
    generator = _generator(run, tokenizer, ends, adapter, f"{facts['model'][:12]}-{epoch}")
    begin()
    with writer.locked():
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


def _generator(
    run: RunArguments, tokenizer: Any, ends: frozenset[int], adapter: Path | None, version: str
) -> Generator:
    """What generates for the command: the model in this process, or vLLM servers with its weights."""
    config = run.config
    if config.generation_backend == "vllm_server":
        return _servers(run, tokenizer, ends, adapter, version)
    model = load_generating(run.model, config, adapter)
    if config.chat_template_path is not None:
        fit_model(model, tokenizer, seed=config.seed)
    return TransformersGenerator(
        lambda: nullcontext(model),
        Sampling(config.temperature, config.top_k, config.top_p),
        eos_ids=ends,
        pad_token_id=padding_token_id(tokenizer, ends),
        batch_size=config.generation_batch_size or DEFAULT_BATCH,
    )


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
