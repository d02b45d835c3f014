"""Finished parts of an evaluation, saved so that nothing is computed or paid for twice."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sapo.errors import EvaluationError
from sapo.runs.files import append_line, read_json_lines, write_atomically

PART = "part"
"""Field with the key of a part."""


class FinishedParts:
    """A JSONL file of finished parts by key, made with the first of them, appended as they finish; thread-safe.

    A line is valid once its line break is on the disk. The rest of an interrupted write is removed when the file is
    opened again, so that the part is computed again.
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

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._parts[key]

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a finished part, or None."""
        return self._parts.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Save `record` as the result of part `key`, and return it as saved."""
        kept = {**record, PART: key}
        line = json.dumps(kept, ensure_ascii=False)
        with self._lock:
            with _disk_errors(self.file):
                append_line(self.file, line)
            self._parts[key] = kept
        return kept

    def complete(
        self,
        keys: Sequence[str],
        size: int,
        compute: Callable[[list[int]], Iterable[Mapping[str, Any]]],
        say: Callable[[int], None],
    ) -> list[dict[str, Any]]:
        """The records of all parts, those that are missing computed and saved, at most `size` at a time.

        Args:
            keys: of the parts.
            size: parts computed together.
            compute: the records of the parts at these indices.
            say: told after each computation how many parts of the list are done.
        """
        for first in range(0, len(keys), size):
            span = range(first, min(first + size, len(keys)))
            missing = [place for place in span if keys[place] not in self]
            if missing:
                for place, record in zip(missing, compute(missing), strict=True):
                    self.add(keys[place], record)
                say(span.stop)
        return [self._parts[key] for key in keys]

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
    """Write a complete file or nothing."""
    with _disk_errors(file):
        write_atomically(file, text)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other evaluations from writing between a read and a write of this one, where the file system has locks."""
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = "Free disk space and rerun the same command." if full else "Give another --output_dir."
        raise EvaluationError(
            f"{file} cannot be written ({error.strerror}); finished parts are kept. {way_out}"
        ) from error
