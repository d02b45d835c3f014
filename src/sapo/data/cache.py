"""Prepared rows on disk: a second start with the same rows, tokenizer and options does not prepare them again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow

from sapo.data.columns import ColumnUse
from sapo.data.examples import DataOptions
from sapo.data.report import DataReport
from sapo.errors import brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_REPORT = "report.json"
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_KEPT = 8
"""Prepared datasets kept; the one that was used the longest ago is removed."""
_KILLED = 24 * 3600
"""Seconds after which a dataset that is not complete was left by a process that was killed."""


def key(
    rows: list[dict[str, Any]] | datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    eos_ids: Collection[int],
    source: str,
    first_row: int,
) -> str:
    """SHA-256 of everything that prepared rows depend on: rows, tokenizer, options, and the code that prepares them."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    # Code that changes between two releases changes the tokens too, and so may the libraries that render and tokenize.
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    add([version(name) for name in _LIBRARIES])
    add([source, first_row, sorted(eos_ids), dataclasses.asdict(options), type(tokenizer).__name__])
    add([tokenizer.chat_template, tokenizer.special_tokens_map, None if backend is None else backend.to_str()])
    if isinstance(rows, list):
        for row in rows:
            digest.update(json.dumps(row, default=str).encode() + b"\n")
        return digest.hexdigest()
    for batch in rows.with_format("arrow").iter(batch_size=10_000):
        buffer = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(buffer, batch.schema) as writer:
            writer.write_table(batch)
        digest.update(buffer.getvalue())
    return digest.hexdigest()


def load(folder: Path, name: str) -> tuple[datasets.Dataset, DataReport] | None:
    """What was stored under a name; None if there is nothing, or it is damaged."""
    place = folder / name
    if not (place / _REPORT).is_file():
        return None
    try:
        report = _report(json.loads((place / _REPORT).read_text(encoding="utf-8")))
        prepared = datasets.load_from_disk(str(place / "rows"))
        (place / _REPORT).touch()
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        logger.warning(f"{place}: prepared rows cannot be read ({brief(error)}). They are prepared again.")
        return None
    return prepared, report


def store(folder: Path, name: str, prepared: datasets.Dataset, report: DataReport) -> None:
    """Keep prepared rows under a name. A disk that is full or read-only is said, and costs nothing but time."""
    place, partial = folder / name, folder / f"{name}.{socket.gethostname()}-{os.getpid()}.partial"
    try:
        prepared.save_to_disk(str(partial / "rows"))
        columns = {"unused": report.columns.unused, "texts": sorted(report.columns.texts)}
        stored = vars(report) | {"columns": columns, "faults": None}
        (partial / _REPORT).write_text(json.dumps(stored), encoding="utf-8")
        if load(folder, name) is None:
            shutil.rmtree(place, ignore_errors=True)
            try:
                partial.rename(place)
            except OSError:
                # Another process was faster; else the disk is at fault.
                if load(folder, name) is None:
                    raise
        killed = [left for left in folder.glob("*.partial") if time.time() - _last_used(left) > _KILLED]
        reports = sorted(folder.glob(f"*/{_REPORT}"), key=_last_used)
        for old in [*killed, *(report.parent for report in reports[:-_KEPT])]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        logger.warning(f"{folder}: prepared rows cannot be kept ({brief(error)}). The next start prepares them again.")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # another process has just removed it


def _report(stored: dict[str, Any]) -> DataReport:
    columns = stored.pop("columns")
    replies = Counter({int(count): rows for count, rows in stored.pop("replies").items()})
    return DataReport(**stored, columns=ColumnUse(columns["unused"], set(columns["texts"])), replies=replies)
