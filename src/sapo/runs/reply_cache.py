"""Replies that a model generated once, kept for every later run and evaluation of the same model.

They are small, and their key names everything they depend on. They lie in the run folder, so that a run is complete,
and in the user's cache; never beside the model, whose folder may be read-only or belong to the Hub's cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sapo.runs.files import write_atomically
from sapo.runs.user_cache import CACHE_VARIABLE, user_cache

logger = logging.get_logger(__name__)


def kept_replies(folder: Path | None, key: str, generate: Callable[[], list[list[int]]]) -> list[list[int]]:
    """The replies under `key`: read from `folder` or the user's cache, else generated; then in both.

    Args:
        folder: of a run or an evaluation; None to use the cache alone.
        key: `facts_digest` of everything that the replies depend on.
        generate: makes them; called at most once.
    """
    own = [] if folder is None else [folder / f"replies-{key}.json"]
    files = [*own, user_cache("replies") / f"{key}.json"]
    found = next((replies for file in files if (replies := _read(file)) is not None), None)
    replies = generate() if found is None else found
    for file in files:
        if file.is_file():
            continue
        try:
            write_atomically(file, json.dumps(replies))
        except OSError as error:
            if file in own:
                raise
            logger.warning(
                f"{file} cannot be written ({error.strerror}): the next run generates the start's replies again. Set "
                f"{CACHE_VARIABLE} to a folder that can be written."
            )
    return replies


def _read(file: Path) -> list[list[int]] | None:
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
