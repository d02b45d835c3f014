"""Find and read rows: a local file or folder, or a dataset on the Hub.

Local data is read into memory; nothing is written to any cache.
"""

from __future__ import annotations

import difflib
import glob
import re
from pathlib import Path
from typing import Any

import datasets

from sapo.data.files import COMPRESSED, SUFFIXES, Rows, one_line, read_file
from sapo.data.folders import join, read_folder, splits_of
from sapo.errors import DatasetError
from sapo.network import hub_fault, hub_or_cache

_FOREIGN_SUFFIXES = (*COMPRESSED, ".txt", ".zip", ".tar", ".yaml", ".yml", ".pkl")


def load_rows(
    name_or_path: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    tolerant: bool = False,
) -> Rows:
    """Read the rows of one dataset.

    Args:
        name_or_path: a file (JSONL, JSON, CSV, Parquet, Arrow, also compressed), a folder (such files, named by
            split; a snapshot of a Hub dataset; or the output of `Dataset.save_to_disk`), or the id of a Hub dataset.
        config: configuration of a Hub dataset or a snapshot.
        split: split name, optionally with a slice, as in `train_sft[:1000]` or `test[10%:20%]`. A single file or
            a saved `Dataset` is the split "train".
        streaming: stream a Hub dataset instead of downloading it; local data is always read into memory.
        tolerant: return `Unreadable` for a line of JSON or CSV that is not valid instead of raising.

    Returns:
        A list of rows for JSON and CSV, whose rows may have different fields; otherwise a `datasets.Dataset`.

    Raises:
        DatasetError: nothing was found, a file cannot be read, or there are no rows.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.exists():
        return _load_local(path, config, split, tolerant=tolerant)
    if _looks_like_path(name):
        raise DatasetError(_not_found(name, path))
    return load_hub(name, config, split, streaming)


def evaluation_split(name_or_path: str | Path, config: str | None, wanted: str) -> str:
    """The split to read from a dataset that is only for evaluation.

    All rows of a file, or of a folder whose files name no splits; of anything else, the split `wanted`.
    """
    path = Path(name_or_path).expanduser()
    _, part = _split_parts(wanted)
    whole = path.is_file() or (path.is_dir() and not splits_of(path, config))
    return f"train{part}" if whole else wanted


def load_files(files: list[Path], *, split: str = "train", tolerant: bool = False) -> Rows:
    """Read several files as one split; only the slice in `split` is used. `tolerant` is as for `load_rows`.

    Raises:
        DatasetError: as `load_rows`.
    """
    found: list[Path] = []
    for file in files:
        matches = sorted(Path(name) for name in glob.glob(str(file.expanduser())))
        if not matches:
            raise DatasetError(_not_found(str(file), file.expanduser()))
        found += matches
    where = ", ".join(map(str, files))
    return _part(join(found, where, tolerant=tolerant), split, where)


def load_hub(name: str, config: str | None, split: str, streaming: bool, **files: Any) -> Rows:
    """Read a Hub dataset with `datasets`; `files` are its `data_dir` and `data_files`.

    Raises:
        DatasetError: the dataset could not be loaded, or it has no rows.
    """
    try:
        with hub_or_cache(name):
            rows = datasets.load_dataset(name, config, split=split, streaming=streaming, **files)
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        wanted = f"{name}{f' ({config})' if config else ''}, split {split}"
        near = None if "/" in name else _similar(name, Path())
        missing = f"no such local file or folder{f' (did you mean {near!r}?)' if near else ''}"
        if (fault := hub_fault()) is not None:
            found = "" if isinstance(error, ConnectionError) else f" ({one_line(error)})"
            raise DatasetError(
                f"{wanted}: {missing}, not in the cache of datasets on this machine{found}, and the Hub "
                f"cannot be reached ({fault}). Use a local file, or connect this machine."
            ) from error
        raise DatasetError(
            f"{wanted}: {missing}, and loading from the Hub failed ({one_line(error)}). Check "
            "the name, configuration and split; offline, use a local file; for private data "
            "run `hf auth login`."
        ) from error
    if not streaming and not len(rows):
        raise DatasetError(f"{name}: split {split} has no rows. Choose another split.")
    return rows


def _looks_like_path(name: str) -> bool:
    if name.startswith(("/", "~", "./", "../", "\\")) or "\\" in name or name.count("/") > 1:
        return True
    if Path(name).suffix.lower() in SUFFIXES + _FOREIGN_SUFFIXES:
        return True
    return "/" in name and Path(name).parent.is_dir()


def _not_found(name: str, path: Path) -> str:
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    # Compare with the siblings of the first missing part: the typo may be in a folder's name.
    wanted = path.relative_to(folder).parts[0]
    found = _similar(wanted, folder)
    if found is not None:
        return f"no file or folder {name!r}; did you mean {found!r}?"
    return f"no file or folder {name!r}; no similar name in {str(folder.absolute())!r}. Check the path."


def _similar(name: str, folder: Path) -> str | None:
    """The entry of a folder whose name is most like `name`; None if none is."""
    # By their stems: files of one folder often share an ending, which alone would make two names look alike.
    stems = {entry.name.partition(".")[0]: entry.name for entry in sorted(folder.iterdir())}
    near = difflib.get_close_matches(name.partition(".")[0], stems, n=1, cutoff=0.7)
    return str(folder / stems[near[0]]) if near else None


def _load_local(path: Path, config: str | None, split: str, *, tolerant: bool) -> Rows:
    base, _ = _split_parts(split)
    if path.is_dir():
        return _part(read_folder(path, config, base, tolerant=tolerant), split, path)
    if config is not None:
        raise DatasetError(
            f"{path}: is local, so it has no configuration {config!r}. Remove dataset_config, "
            "or use the path of the file itself."
        )
    return _part(read_file(path, base, tolerant=tolerant), split, path)


def _part(rows: datasets.Dataset | list[dict[str, Any]], split: str, where: Path | str) -> Rows:
    base, part = _split_parts(split)
    taken = _take(rows, base, split, where) if part else rows
    if not len(taken):
        raise DatasetError(f"{where}: has no rows{f' in {split}' if part else ''}. Use another file or split.")
    return taken


def _split_parts(split: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\w[\w.-]*)((?:\[[^\]]*\])?)", split)
    if match is None:
        raise DatasetError(f'split "{split}": not understood. Use a name, or a slice such as train[:1000].')
    return match[1], match[2]


def _take(
    rows: datasets.Dataset | list[dict[str, Any]], base: str, split: str, path: Path | str
) -> datasets.Dataset | list[dict[str, Any]]:
    try:
        (span,) = datasets.ReadInstruction.from_spec(split).to_absolute({base: len(rows)})
    except (ValueError, AssertionError) as error:
        raise DatasetError(
            f'{path}: split "{split}" does not fit its {len(rows)} rows ({one_line(error)}). '
            "Use a slice such as train[:1000] or train[10%:20%]."
        ) from error
    start, stop = span.from_ or 0, len(rows) if span.to is None else span.to
    if isinstance(rows, list):
        return rows[start:stop]
    return rows.select(range(start, max(start, stop)))
