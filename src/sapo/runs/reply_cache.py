"""Replies that a model generated once, kept for every later run and evaluation of the same model.

They are small, and their key names everything they depend on. They lie in the run folder, so that a run is complete,
and in the user's cache; never beside the model, whose folder may be read-only or belong to the Hub's cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sapo.runs.files import facts_digest, write_atomically
from sapo.runs.user_cache import CACHE_VARIABLE, user_cache

logger = logging.get_logger(__name__)


Replies = list[list[int]]


def start_replies(
    folder: Path,
    prompts: Iterable[Sequence[int]],
    generate: Callable[[list[tuple[int, ...]]], Replies],
    *,
    model: str,
    eos_ids: Collection[int],
    max_new_tokens: int,
    max_length: int,
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Prompts of fewer than `max_length` tokens with a model's replies: kept ones, or generated now and then kept.

    Args:
        folder: of a run or an evaluation; replies are kept in it and in the user's cache.
        prompts: token ids.
        generate: replies to prompts; called at most once.
        model: digest of its weights.
        eos_ids: tokens that end a reply.
        max_new_tokens: maximum tokens of a reply.
        max_length: maximum tokens of prompt and reply.
    """
    fitting = [tuple(prompt) for prompt in prompts if len(prompt) < max_length]
    key = facts_digest(
        model=model, prompts=list(map(list, fitting)), eos=sorted(eos_ids), limits=[max_new_tokens, max_length]
    )
    own = folder / f"replies-{key}.json"
    files = [own, user_cache("replies") / f"{key}.json"]
    found = next((replies for file in files if (replies := _read(file)) is not None), None)
    replies = generate(fitting) if found is None else found
    for file in files:
        if file.is_file():
            continue
        try:
            write_atomically(file, json.dumps(replies))
        except OSError as error:
            if file == own:
                raise
            logger.warning(
                f"{file} cannot be written ({error.strerror}): the next run generates the start's replies again. Set "
                f"{CACHE_VARIABLE} to a folder that can be written."
            )
    return list(zip(fitting, replies, strict=True))


def _read(file: Path) -> Replies | None:
    """The replies in a file; None without it, or if it holds something else."""
    if not file.is_file():
        return None
    try:
        replies = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        replies = None
    if not _are_replies(replies):
        logger.warning(f"{file} is damaged; the replies are generated again.")
        file.unlink()
        return None
    return list(replies)


def _are_replies(value: Any) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(one, list) and all(isinstance(token, int) for token in one) for one in value
    )
