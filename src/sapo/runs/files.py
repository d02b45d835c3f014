"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Write a text file under another name, and rename it: a kill leaves the earlier one, or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
