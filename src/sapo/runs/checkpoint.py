"""The part of a checkpoint that Trainer does not know: opponent, reference, replay buffers, facts about the run.

Tensors as safetensors, the rest as JSON. A manifest with the SHA-256 of every file in the folder is written last, so
that a damaged or incomplete checkpoint is recognised before any of it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sapo.errors import CheckpointError
from sapo.preference.pairs import GeneratedPairs, Pair
from sapo.preference.replay_buffer import BufferEntry
from sapo.preference.segments import Segment
from sapo.runs.files import file_digest

FORMAT = 5
STATE_FILE = "sapo_state.json"
MANIFEST_FILE = "sapo_manifest.json"
REMOVING = ".removing-"

_READ_BY_LIBRARIES = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata", ".json")
"""Of files that a library may take up on its own."""

T = TypeVar("T")

_LENGTH_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def write_tensors(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Write `part`.safetensors."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / f"{part}.safetensors",
    )


def read_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """Read `part`.safetensors.

    Raises:
        CheckpointError: the part is missing or damaged.
    """
    file = folder / f"{part}.safetensors"
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: lacks {file.name}. Resume from another checkpoint, or with the options it was made with."
        ) from None
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged ({error}). Resume from another checkpoint.") from error


def write_json(folder: Path, name: str, content: Any) -> None:
    """Write a JSON file."""
    (folder / name).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: not a complete checkpoint of this trainer ({name} is missing). "
            "Name a checkpoint-N folder of the run."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name}: damaged ({error}). Resume from another checkpoint.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name}: damaged (no object). Resume from another checkpoint.")
    return content


def read_state(folder: Path) -> dict[str, Any]:
    """The run's facts.

    Raises:
        CheckpointError: not a checkpoint of this trainer, or of another version of its format.
    """
    state = read_json(folder, STATE_FILE)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: format {state.get('format')}, this version reads {FORMAT}.")
    return state


def entries_to_tensors(entries: Sequence[BufferEntry[Pair]]) -> dict[str, Tensor]:
    """A buffer's contents as flat integer tensors, oldest first."""
    pairs = [entry.item for entry in entries]
    tensors = {
        "steps": torch.tensor([entry.step for entry in entries], dtype=torch.int64),
        "draws": torch.tensor([entry.draws for entry in entries], dtype=torch.int64),
        "places": torch.tensor(
            [[p.row, p.turn, p.segment.start, p.segment.stop, p.rewritten.start, p.rewritten.stop] for p in pairs],
            dtype=torch.int64,
        ).reshape(len(pairs), 6),
    }
    for field in _LENGTH_FIELDS:
        values = [getattr(pair, field) for pair in pairs]
        tensors[field] = torch.tensor([token for value in values for token in value], dtype=torch.int64)
        tensors[f"{field}_lengths"] = torch.tensor([len(value) for value in values], dtype=torch.int64)
    return tensors


def entries_from_tensors(tensors: Mapping[str, Tensor]) -> list[BufferEntry[Pair]]:
    """The inverse of `entries_to_tensors`."""
    columns = [
        [tuple(part.tolist()) for part in torch.split(tensors[field], tensors[f"{field}_lengths"].tolist())]
        for field in _LENGTH_FIELDS
    ]
    entries = []
    for index, (place, step, draws) in enumerate(
        zip(tensors["places"].tolist(), tensors["steps"].tolist(), tensors["draws"].tolist(), strict=True)
    ):
        row, turn, start, stop, new_start, new_stop = place
        prompt, chosen, rejected = (column[index] for column in columns)
        pair = Pair(row, turn, prompt, chosen, rejected, Segment(start, stop), Segment(new_start, new_stop))
        entries.append(BufferEntry(pair, step, draws))
    return entries


def pool_to_tensors(pool: Mapping[tuple[int, int], GeneratedPairs]) -> dict[str, Tensor]:
    """Pairs written ahead: as a buffer's contents, and for each the step and micro-batch that it waits for."""
    waiting = [(place, pair, written.step) for place, written in sorted(pool.items()) for pair in written.pairs]
    tensors = entries_to_tensors([BufferEntry(pair, step, 0) for _, pair, step in waiting])
    tensors["waits_for"] = torch.tensor([place for place, _, _ in waiting], dtype=torch.int64).reshape(-1, 2)
    return tensors


def pool_from_tensors(tensors: Mapping[str, Tensor]) -> dict[tuple[int, int], GeneratedPairs]:
    """The inverse of `pool_to_tensors`."""
    pool: dict[tuple[int, int], GeneratedPairs] = {}
    for (step, micro_batch), entry in zip(tensors["waits_for"].tolist(), entries_from_tensors(tensors), strict=True):
        earlier = pool.get((step, micro_batch))
        pool[step, micro_batch] = GeneratedPairs((*(earlier.pairs if earlier else ()), entry.item), entry.step)
    return pool


def redistribute(parts: Sequence[Sequence[T]], processes: int, *, step: Callable[[T], int]) -> list[list[T]]:
    """Deal the contents of several processes' buffers out to `processes` others: nothing is lost, nothing doubled.

    The oldest first, in turn, so that each gets as many as the others (but one) and like ages.

    Args:
        parts: of each earlier process, oldest first.
        processes: how many there are now.
        step: at which optimizer step an entry was written.
    """
    everything = sorted((entry for part in parts for entry in part), key=step)
    return [everything[place::processes] for place in range(processes)]


def seal(folder: Path) -> None:
    """Write the manifest: the SHA-256 and size of every file below `folder`."""
    write_json(
        folder,
        MANIFEST_FILE,
        {str(file.relative_to(folder)): [file.stat().st_size, file_digest(file)] for file in _files(folder)},
    )


def verify(folder: Path) -> None:
    """Compare `folder` with its manifest.

    Raises:
        CheckpointError: no manifest, a file missing, cut short or changed, outside the folder, or not its own.
    """
    manifest = read_json(folder, MANIFEST_FILE)
    for name, noted in manifest.items():
        file = folder / name
        if not (isinstance(noted, list) and len(noted) == 2):
            raise CheckpointError(f"{folder / MANIFEST_FILE}: damaged. Resume from another checkpoint.")
        size, digest = noted
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder}: {name} lies outside this folder. Do not use this checkpoint.")
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
            raise CheckpointError(f"{file}: was not there when the checkpoint was saved. Move it elsewhere.")


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beside `newest` beyond `limit`; never that one, nor `best`.

    By the time at which they were sealed, not by their step: after a resume from an earlier step the two disagree.
    """
    if not limit:
        return
    spared = {newest, Path(best)} if best else {newest}
    others = [file.parent for file in newest.parent.glob(f"checkpoint-*/{MANIFEST_FILE}")]
    others = sorted(set(others) - spared, key=lambda folder: (folder / MANIFEST_FILE).stat().st_mtime_ns)
    for folder in others[: max(0, len(others) + len(spared) - limit)]:
        # Out of sight first: a kill must not leave half a checkpoint under its name.
        gone = folder.with_name(f"{REMOVING}{folder.name}")
        folder.rename(gone)
        shutil.rmtree(gone)


def compare_facts(
    folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any], *, free: Collection[str] = ()
) -> None:
    """Refuse a checkpoint of a run with other options or other data.

    Args:
        folder: named in the error.
        saved: facts of the checkpoint.
        current: facts of this run.
        free: names of facts that may differ.

    Raises:
        CheckpointError: naming each option with both values.
    """
    different = [
        f"{name} was {saved.get(name)!r}, is {current[name]!r}"
        for name in current
        if saved.get(name) != current[name] and name not in free
    ]
    if different:
        raise CheckpointError(
            f"{folder}: belongs to another configuration: {'; '.join(different)}. "
            "Resume with the options it was made with, or start afresh in another output_dir."
        )


def _files(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_FILE)
