"""The part of a checkpoint that Trainer does not save: opponent, reference, replay buffers, facts about the run.

Tensors as safetensors (see `tensors`), the rest as JSON. A manifest with the SHA-256 of every file in the folder is
written last, so that a damaged or incomplete checkpoint is detected before it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from sapo.errors import CheckpointError, brief
from sapo.runs.files import file_digest, write_atomically
from sapo.runs.layout import MANIFEST_FILE, STATE_FILE

FORMAT = 5
REMOVING = ".removing-"

_READ_BY_LIBRARIES = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata", ".json")
"""Suffixes of files that a library may load by itself."""


def write_json(folder: Path, name: str, content: Any) -> None:
    """Write a JSON file."""
    write_atomically(folder / name, json.dumps(content, indent=1, sort_keys=True))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; a `CheckpointError` if it is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: not a complete checkpoint of this trainer ({name} is missing). "
            "Use a checkpoint-N folder of the run."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name}: damaged ({error}). Resume from another checkpoint.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name}: damaged (not an object). Resume from another checkpoint.")
    return content


def read_state(folder: Path) -> dict[str, Any]:
    """Read the run's facts; a `CheckpointError` if they are of something else, or of another version's format."""
    state = read_json(folder, STATE_FILE)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: format {brief(state.get('format'), 40)}, this version reads {FORMAT}.")
    return state


def seal(folder: Path) -> None:
    """Write the manifest: the SHA-256 and size of every file below `folder`."""
    write_json(
        folder,
        MANIFEST_FILE,
        {str(file.relative_to(folder)): [file.stat().st_size, file_digest(file)] for file in _files(folder)},
    )


def verify(folder: Path) -> None:
    """Refuse a folder that differs from its manifest: a file is missing, truncated, changed, outside, or not listed."""
    manifest = read_json(folder, MANIFEST_FILE)
    for name, noted in manifest.items():
        file = folder / name
        if not (isinstance(noted, list) and len(noted) == 2):
            raise CheckpointError(f"{folder / MANIFEST_FILE}: damaged. Resume from another checkpoint.")
        size, digest = noted
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder}: {name} is outside this folder. Do not use this checkpoint.")
        if not file.is_file():
            raise CheckpointError(f"{folder}: lacks {name}. Resume from another checkpoint.")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: {file.stat().st_size} bytes, {size} when it was saved. Resume from another checkpoint."
            )
        if file_digest(file) != digest:
            raise CheckpointError(
                f"{file}: its content has changed since it was saved. Resume from another checkpoint."
            )
    for file in _files(folder):
        if str(file.relative_to(folder)) not in manifest and file.name.endswith(_READ_BY_LIBRARIES):
            raise CheckpointError(f"{file}: is not part of the saved checkpoint. Move it elsewhere.")


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints next to `newest` beyond `limit`, but never `newest` or `best`.

    Age is the time of sealing, not the step: after a resume from an earlier step they differ.
    """
    if not limit:
        return
    spared = {newest, Path(best)} if best else {newest}
    others = [file.parent for file in newest.parent.glob(f"checkpoint-*/{MANIFEST_FILE}")]
    others = sorted(set(others) - spared, key=lambda folder: (folder / MANIFEST_FILE).stat().st_mtime_ns)
    for folder in others[: max(0, len(others) + len(spared) - limit)]:
        # Renamed first, so that a kill leaves no partial checkpoint under its name.
        gone = folder.with_name(f"{REMOVING}{folder.name}")
        folder.rename(gone)
        shutil.rmtree(gone)


def compare_facts(
    folder: Path,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    words: Mapping[str, str] | None = None,
) -> None:
    """Refuse a checkpoint with other options or other data; the message names each difference with both values.

    Args:
        folder: folder named in the error.
        saved: facts of the checkpoint.
        current: facts of this run.
        free: names of facts that may differ.
        words: what to say of facts that differ, in place of their values.
    """
    words = words or {}
    different = [
        f"{name}: {words[name]}"
        if name in words
        else f"{name} was {brief(repr(saved.get(name)), 200)}, is {brief(repr(current[name]), 200)}"
        for name in current
        if saved.get(name) != current[name] and name not in free
    ]
    if different:
        raise CheckpointError(
            f"{folder}: has another configuration: {'; '.join(different)}. "
            "Resume with its original options, or start a new run in another output_dir."
        )


def _files(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_FILE)
