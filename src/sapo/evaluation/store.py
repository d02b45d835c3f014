"""Finished parts of an evaluation, kept so that nothing is computed or paid for twice."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sapo.errors import EvaluationError
from sapo.runs.files import append_line, read_json_lines, write_atomically

PART = "part"
"""The field of a line that says what it is the result of."""


def part_key(**settings: Any) -> str:
    """A key that depends on all that a part's result depends on, and on nothing else."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class FinishedParts:
    """A JSONL file of finished parts by key, appended to as they finish; safe to use from several threads.

    A line counts once its line break is on the disk. What an interrupted write has left behind is cut off when the file
    is opened again, so that the part is done anew.

    Args:
        file: created at the first part.

    Raises:
        EvaluationError: a line before the last is damaged; what follows could otherwise be taken for lost.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._parts: dict[str, dict[str, Any]] = {}
        if file.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, key: str) -> bool:
        return key in self._parts

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a finished part, or None."""
        return self._parts.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Keep `record` as the result of part `key`, and return it as it is kept.

        Raises:
            EvaluationError: the disk does not take it.
        """
        kept = {**record, PART: key}
        line = json.dumps(kept, ensure_ascii=False)
        with self._lock:
            with _disk_errors(self.file):
                append_line(self.file, line)
            self._parts[key] = kept
        return kept

    def _read(self) -> None:
        remedy = "Fix or remove the line, or evaluate into another --output_dir."
        for record in read_json_lines(self.file, {PART: str}, error=EvaluationError, remedy=remedy):
            self._parts[record[PART]] = record
        content = self.file.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            with self.file.open("r+b") as stream:
                stream.truncate(complete)


def write_result(file: Path, text: str) -> None:
    """Write a complete file or nothing.

    Raises:
        EvaluationError: the disk does not take it.
    """
    with _disk_errors(file):
        write_atomically(file, text)


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EvaluationError(
            f"{file} cannot be written ({error.strerror}); finished parts are kept. Make room and give the same "
            "command again."
        ) from error
