"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Write a text file under another name, and rename it: a kill leaves the earlier one, or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
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
