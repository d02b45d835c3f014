"""Files that are complete or absent, read and written in one place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sapo.errors import ConfigurationError, SapoError, brief

_BLOCK = 1 << 20


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path to write to, beside `file`; what is there when the block ends becomes `file`.

    It is on the disk before it gets its name: a kill or a power cut leaves the earlier file or the new one. After an
    error the earlier one stays. Missing folders are made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a complete file, or leave the earlier one; text is encoded as UTF-8."""
    with replacing(file) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def append_line(file: Path, line: str) -> None:
    """Add `line` and its line break to a file, and return once they are on the disk. Missing folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def folder_digest(folder: Path, patterns: Sequence[str], *, without: Collection[str] = ()) -> str | None:
    """SHA-256 over the names and contents of the files directly in `folder` that match, in hexadecimal.

    Args:
        folder: wherever it lies; its own name does not count.
        patterns: of file names, such as `*.safetensors`.
        without: names of files to leave out.

    Returns:
        None if no file matches.
    """
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.name not in without})
    if not files:
        return None
    return hashlib.sha256("".join(f"{file.name}\n{file_digest(file)}\n" for file in files).encode()).hexdigest()


def read_json_lines(
    file: Path,
    fields: Mapping[str, type],
    *,
    error: type[SapoError] = ConfigurationError,
    remedy: str = "Restore the file, or remove it.",
) -> list[dict[str, Any]]:
    """Read a JSON object a line; no file reads as none. What follows the last line break is still being written.

    Args:
        file: read as UTF-8.
        fields: that each object has, with the types of their values.
        error: raised for a line that is something else.
        remedy: the end of its message.

    Raises:
        SapoError: as `error`, with the file and the line.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line.decode("utf-8"))
            wrong = next((name for name, kind in fields.items() if not isinstance(row[name], kind)), None)
        except (ValueError, KeyError, TypeError, RecursionError) as found:
            raise error(f"{file}, line {number}: cannot be read ({_reason(found)}). {remedy}") from found
        if wrong is not None:
            raise error(f"{file}, line {number}: `{wrong}` is no {fields[wrong].__name__}. {remedy}")
        rows.append(row)
    return rows


def read_object(file: Path) -> dict[str, Any]:
    """Read a file that holds one object, JSON if its name ends in .json and YAML otherwise; no file reads as empty.

    Raises:
        ConfigurationError: it holds something else.
    """
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as found:
        raise ConfigurationError(f"{file}: cannot be read ({brief(found)}). Restore the file.") from found
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file}: holds no object of names and values. Restore the file.")
    return content


def _reason(found: Exception) -> str:
    return f"no {found}" if isinstance(found, KeyError) else brief(found)
