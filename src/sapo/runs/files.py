"""Atomic writes, and reading of JSON and YAML files."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from sapo.errors import ConfigurationError, SapoError, brief, yaml_fault

_BLOCK = 1 << 20


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path next to `file`, which replaces `file` when the block ends.

    It is flushed to disk before the rename, so a kill or a power failure leaves the old file or the new one. After an
    error the old one stays. Missing folders are created.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Of this process: two may write the same file of a cache at once, on two machines too.
    partial = file.with_name(f".{file.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file atomically; text is encoded as UTF-8."""
    with replacing(file) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def append_line(file: Path, line: str) -> None:
    """Append `line` and a line break to a file, and flush to disk. Missing folders are created."""
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


def facts_digest(**facts: Any) -> str:
    """Hash of everything that a result depends on, as JSON: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def folder_digest(folder: Path, patterns: Sequence[str], *, without: Collection[str] = ()) -> str | None:
    """SHA-256 over names and contents of the files directly in `folder` that match; None if no file does."""
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
    """Read one JSON object per line; a missing file has none. Text after the last line break is ignored as incomplete.

    Args:
        file: read as UTF-8.
        fields: required fields of each object, with the types of their values.
        error: exception class for an invalid line; the message has file and line.
        remedy: end of its message.
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
            raise error(f"{file}, line {number}: `{wrong}` is not of type {fields[wrong].__name__}. {remedy}")
        rows.append(row)
    return rows


def keep_json_lines(file: Path, keep: Callable[[list[dict[str, Any]]], Iterable[dict[str, Any]]]) -> None:
    """Leave of a file of JSON lines, each with a `step`, what `keep` returns; a missing file stays missing.

    A last line that a crash or a full disk has cut off is dropped: what is appended would end up in it.
    """
    if file.exists():
        rows = read_json_lines(file, {"step": int})
        write_atomically(file, "".join(f"{json.dumps(row)}\n" for row in keep(rows)))


def read_object(file: Path) -> dict[str, Any]:
    """Read a file with one object, JSON if its name ends in .json, else YAML; a missing file is empty."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except yaml.MarkedYAMLError as found:
        raise ConfigurationError(f"{file}{yaml_fault(found)}. Restore the file.") from found
    except (ValueError, yaml.YAMLError, RecursionError) as found:
        raise ConfigurationError(f"{file}: cannot be read ({brief(found)}). Restore the file.") from found
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file}: does not contain names with values. Restore the file.")
    return content


def _reason(found: Exception) -> str:
    return f"no {found}" if isinstance(found, KeyError) else brief(found)
