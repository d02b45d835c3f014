"""The replies of the start that a run replays: generated before its first step, or read from rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sapo.data.examples import DataOptions, collate_examples
from sapo.data.loading import load_rows
from sapo.data.prepare import prepare_dataset
from sapo.data.unanswered import general_prompts
from sapo.errors import ConfigurationError
from sapo.measures.retention import REPLY_SAMPLING, generate_replies
from sapo.preference.pairs import PairSource
from sapo.preference.self_replay import Reply, SelfReplay
from sapo.runs.checkpoint import read_json
from sapo.runs.files import write_atomically
from sapo.runs.folder import RunFolder
from sapo.runs.layout import SELF_REPLAY_FILE
from sapo.runs.reply_cache import start_replies
from sapo.training.context import RunContext
from sapo.weights.digest import weights_digest
from sapo.weights.embeddings import embedding_rows

logger = logging.get_logger(__name__)


def with_self_replay(
    source: PairSource, context: RunContext, folder: RunFolder, record: Callable[[str, float], None]
) -> PairSource:
    """`source`, with the share of self-replay that the options ask for.

    Raises:
        ConfigurationError: the start cannot reply in this process.
    """
    args, world = context.args, context.world
    if not args.replay_share:
        return source
    if context.roles.sharded and args.replay_dataset_name is None:
        raise ConfigurationError(
            f"replay_share={args.replay_share} with sharded weights: the start cannot generate here. Run sapo generate "
            "--self_replay shipped first, and name its file with replay_dataset_name."
        )
    return SelfReplay(
        source,
        partial(_replies, context, folder),
        share=args.replay_share,
        batch_size=args.per_device_train_batch_size,
        micro_batches=args.gradient_accumulation_steps,
        seed=args.seed,
        process=(world.process, world.size),
        record=record,
    )


def _replies(context: RunContext, folder: RunFolder, checkpoint: Path | None) -> list[Reply]:
    """All replies, the same on every process.

    Raises:
        CheckpointError: a run that is resumed did not keep them.
    """
    if context.args.replay_dataset_name is not None:
        return _of_rows(context, context.args.replay_dataset_name)
    found: dict[str, Any] = {}
    if context.world.first:
        found = _generated(context, folder) if checkpoint is None else _kept(folder, checkpoint)
    first = context.world.first_decides(found)
    return list(zip(first["prompts"], first["replies"], strict=True))


def _of_rows(context: RunContext, name: str) -> list[Reply]:
    options = DataOptions.of(context.args, embedding_rows(context.roles.policy()))
    options = replace(options, opponent_system_prompt=None)
    prepared, _ = prepare_dataset(load_rows(name), context.tokenizer, options, eos_ids=context.eos_ids, source=name)
    turns = [one.turns[-1] for one in collate_examples(list(prepared))["examples"]]
    return [(turn.prompt_ids, turn.response_ids) for turn in turns]


def _generated(context: RunContext, folder: RunFolder) -> dict[str, Any]:
    args = context.args
    prompts = general_prompts(context.tokenizer, context.eos_ids, DataOptions.of(args), "replay")
    kept = replies_of_start(context, folder, prompts, args.replay_max_new_tokens)
    found = {"prompts": [list(prompt) for prompt, _ in kept], "replies": [reply for _, reply in kept]}
    write_atomically(folder.path / SELF_REPLAY_FILE, json.dumps(found))
    return found


def replies_of_start(
    context: RunContext, folder: RunFolder, prompts: Iterable[Sequence[int]], max_new_tokens: int
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Prompts that leave room for it, with the policy's replies: kept ones, or generated now, before it is trained."""
    args = context.args
    batch_size = max(16, args.per_device_eval_batch_size)
    generator = context.generator(context.roles.policy_module, REPLY_SAMPLING, batch_size)
    limits = {"max_new_tokens": max_new_tokens, "max_length": args.max_length}

    def generate(fitting: list[tuple[int, ...]]) -> list[list[int]]:
        logger.info(f"The start replies to {len(fitting)} prompts, once for this model.")
        return generate_replies(generator, fitting, **limits)

    model = weights_digest(context.roles.policy())
    return start_replies(folder.path, prompts, generate, model=model, eos_ids=context.eos_ids, **limits)


def _kept(folder: RunFolder, checkpoint: Path) -> dict[str, Any]:
    otherwise = " with the replies that were replayed. Start the run afresh, or name rows with replay_dataset_name."
    return read_json(folder.home_of(SELF_REPLAY_FILE, checkpoint, otherwise), SELF_REPLAY_FILE)
