"""Find and read rows: a local file or folder, or a dataset on the hub.

JSON is read here and not by `datasets`, whose inference refuses rows that differ in their fields, and whose
errors name neither file nor line. Local data is read into memory; nothing is written to any cache.
"""

from __future__ import annotations

import difflib
import glob
import json
import re
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow
import pyarrow.parquet

from sapo.errors import DatasetError, brief

Rows: TypeAlias = "datasets.Dataset | datasets.IterableDataset | list[dict[str, Any]]"

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = JSON_SUFFIXES + TABLE_SUFFIXES
_FOREIGN_SUFFIXES = (".csv", ".tsv", ".txt", ".gz", ".zip", ".zst", ".xz", ".yaml", ".yml", ".pkl")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


def load_rows(
    name_or_path: str | Path, *, config: str | None = None, split: str = "train", streaming: bool = False
) -> Rows:
    """Read the rows of one dataset.

    Args:
        name_or_path: a file (JSONL, JSON, Parquet, Arrow), a folder (such files, named by split; or what
            `Dataset.save_to_disk` wrote), or the id of a dataset on the hub.
        config: which configuration of a hub dataset.
        split: which split, optionally a part of it, as in `train[:1000]` or `test[10%:20%]`. A single file or
            a saved `Dataset` is the split "train".
        streaming: fetch a hub dataset row by row and do not store it; local data is read into memory anyway.

    Returns:
        A list of rows for JSON, whose rows may differ in their fields; otherwise a `datasets.Dataset`.

    Raises:
        DatasetError: nothing is found, a file cannot be read, or there are no rows.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.exists():
        return _load_local(path, config, split)
    if _looks_like_path(name):
        raise DatasetError(_not_found(name, path))
    return load_hub(name, config, split, streaming)


def load_files(files: list[Path], *, split: str = "train") -> Rows:
    """Read several files as one split; of `split` only the part in brackets counts.

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
    return _part(_join(found, where), split, where)


def load_hub(name: str, config: str | None, split: str, streaming: bool, **files: Any) -> Rows:
    """Read a dataset on the hub through `datasets`; `files` are its `data_dir` and `data_files`.

    Raises:
        DatasetError: the hub does not give it, or it has no rows.
    """
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming, **files)
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        wanted = f"{name}{f' ({config})' if config else ''}, split {split}"
        raise DatasetError(
            f"{wanted}: no such file or folder here, and the hub did not give it ({_one_line(error)}). Check "
            "the name, the configuration and the split; without network give a local file; for private data "
            "run `hf auth login`."
        ) from error
    if not streaming and not len(rows):
        raise DatasetError(f"{name}: split {split} holds no rows. Choose another split.")
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
    # Compare with what stands where the first missing part should be: a folder may be misspelt, not the file.
    wanted = path.relative_to(folder).parts[0]
    near = difflib.get_close_matches(wanted, [entry.name for entry in folder.iterdir()], n=1)
    if near:
        found = str(folder / near[0])
        return f"no file or folder {name!r}; nearest here: {found!r}."
    return f"no file or folder {name!r}; nothing in {str(folder.absolute())!r} resembles it. Check the path."


def _load_local(path: Path, config: str | None, split: str) -> Rows:
    if config is not None:
        raise DatasetError(
            f"{path}: is local, so it has no configuration {config!r}. Leave dataset_config out, "
            "or give the path of the file itself."
        )
    base, _ = _split_parts(split)
    if path.is_dir():
        rows = _read_folder(path, base)
    elif base != "train":
        raise DatasetError(
            f'{path}: is one file, which is the split "train"; there is no "{base}". Give a folder with '
            f"train.jsonl and {base}.jsonl, or the other file's own path."
        )
    else:
        rows = _read_file(path)
    return _part(rows, split, path)


def _part(rows: datasets.Dataset | list[dict[str, Any]], split: str, where: Path | str) -> Rows:
    base, part = _split_parts(split)
    taken = _take(rows, base, split, where) if part else rows
    if not len(taken):
        raise DatasetError(f"{where}: holds no rows{f' in {split}' if part else ''}. Give a file that does.")
    return taken


def _split_parts(split: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\w[\w.-]*)((?:\[[^\]]*\])?)", split)
    if match is None:
        raise DatasetError(f'split "{split}": not understood. Write a name, or a part such as train[:1000].')
    return match[1], match[2]


def _take(
    rows: datasets.Dataset | list[dict[str, Any]], base: str, split: str, path: Path | str
) -> datasets.Dataset | list[dict[str, Any]]:
    try:
        (span,) = datasets.ReadInstruction.from_spec(split).to_absolute({base: len(rows)})
    except (ValueError, AssertionError) as error:
        raise DatasetError(
            f'{path}: split "{split}" does not fit its {len(rows)} rows ({_one_line(error)}). '
            "Write a part such as train[:1000] or train[10%:20%]."
        ) from error
    start, stop = span.from_ or 0, len(rows) if span.to is None else span.to
    if isinstance(rows, list):
        return rows[start:stop]
    return rows.select(range(start, max(start, stop)))


def _read_folder(folder: Path, split: str) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_saved(folder, split)
    places = [folder, folder / "data"]
    files = [
        file
        for place in places
        if place.is_dir()
        for file in sorted(place.iterdir())
        if file.is_file() and file.suffix.lower() in SUFFIXES and file.name not in _METADATA
    ]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    for sub in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if sub.name in _SPLIT_NAMES or sub.name == split:
            shards = [file for file in sorted(sub.iterdir()) if file.suffix.lower() in SUFFIXES]
            if shards:
                by_split.setdefault(sub.name, []).extend(shards)
    if not by_split:
        raise DatasetError(
            f"{folder}: holds no data. Put train.jsonl (or .json, .parquet, .arrow) there, or give a file."
        )
    if split not in by_split and split == "train" and set(by_split) == {""}:
        return _join(by_split[""], folder)  # a folder of nameless shards
    if split not in by_split:
        exact = [file for file in by_split.get("", ()) if file.stem == split]
        if not exact:
            known = sorted({*by_split, *(file.stem for file in by_split.get("", ()))} - {""})
            raise DatasetError(f'{folder}: has no split "{split}"; it has {", ".join(known)}.')
        return _join(exact, folder)
    return _join(by_split[split], folder)


def _split_of(file: Path) -> str:
    """The split a file name states (`train.jsonl`, `test-00000-of-00002.parquet`), or nothing."""
    first = re.split(r"[-_.]", file.name, maxsplit=1)[0]
    return first if first in _SPLIT_NAMES else ""


def _join(files: list[Path], folder: Path | str) -> Any:
    if len({file.suffix.lower() in JSON_SUFFIXES for file in files}) > 1 or (
        len({file.with_suffix("") for file in files}) < len(files)
    ):
        listing = ", ".join(file.name for file in files[:4])
        raise DatasetError(f"{folder}: {listing} would be read as one split. Keep one of them, or give its path.")
    parts: list[Any] = [_read_file(file) for file in files]
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], list):
        return [row for part in parts for row in part]
    try:
        return datasets.concatenate_datasets(parts)
    except (ValueError, TypeError, pyarrow.ArrowException) as error:
        raise DatasetError(
            f"{folder}: its {len(files)} files do not fit together ({_one_line(error)}). Give them the same columns."
        ) from error


def _read_saved(folder: Path, split: str) -> Rows:
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DatasetError(
            f"{folder}: was saved by datasets, but cannot be read ({_one_line(error)}). Save it again."
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        if split != "train":
            raise DatasetError(f'{folder}: holds one dataset without splits, so there is no "{split}".')
        return saved
    if split not in saved:
        raise DatasetError(f'{folder}: has no split "{split}"; it has {", ".join(saved)}.')
    return saved[split]


def _read_file(file: Path) -> Rows:
    suffix = file.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(_bytes(file), file)
    if suffix == ".json":
        return _json_document(_bytes(file), file)
    try:
        if suffix == ".parquet":
            return datasets.Dataset.from_dict(_columns(pyarrow.parquet.read_table(file)))
        if suffix == ".arrow":
            return datasets.Dataset.from_dict(_columns(_arrow_table(file)))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DatasetError(f"{file}: not readable as {suffix[1:]} ({_one_line(error)}). Write it anew.") from error
    raise DatasetError(f"{file}: is not of a supported kind; accepted are {', '.join(SUFFIXES)}.")


def _columns(table: pyarrow.Table) -> dict[str, pyarrow.ChunkedArray]:
    return {name: table.column(name) for name in table.column_names}


def _arrow_table(file: Path) -> pyarrow.Table:
    """`datasets` writes the streaming form of Arrow, other programs the file form."""
    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            return pyarrow.ipc.open_file(source).read_all()
        source.seek(0)
        return pyarrow.ipc.open_stream(source).read_all()


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read ({error.strerror}). Check its permissions.") from error


def _decode(raw: bytes, file: Path, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        byte = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise DatasetError(
            f"{file}, line {line}: not UTF-8 (byte {byte} of the line is 0x{raw[error.start]:02x}). "
            "Save the file as UTF-8."
        ) from error


def _parse(text: str, file: Path, line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{file}, line {line + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno})."
        ) from error
    except RecursionError as error:
        raise DatasetError(f"{file}, line {line}: JSON nested too deeply to be a conversation.") from error


def _json_lines(raw: bytes, file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        text = _decode(line, file, number)
        if text.strip():
            rows.append(_object(_parse(text, file, number), f"{file}, line {number}"))
    return rows


def _json_document(raw: bytes, file: Path) -> list[dict[str, Any]]:
    """A list of objects, an object whose `data` is such a list, or (in spite of the suffix) JSON lines."""
    text = _decode(raw, file, 1)
    if not text.strip():
        return []
    if text.lstrip().startswith("{") and _is_json_lines(text):
        return _json_lines(raw, file)
    document = _parse(text, file, 1)
    if isinstance(document, dict):
        if not isinstance(document.get("data"), list):
            raise DatasetError(
                f"{file}: is one object with the keys {', '.join(map(repr, document)) or '(none)'}; rows are "
                'expected as a list, under the key "data", or one object a line.'
            )
        document = document["data"]
    if not isinstance(document, list):
        raise DatasetError(f"{file}: is {_kind(document)}; expected a list of objects.")
    return [_object(row, f"{file}, row {number}") for number, row in enumerate(document, 1)]


def _is_json_lines(text: str) -> bool:
    first = next(line for line in text.split("\n") if line.strip())
    try:
        row = json.loads(first)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(row, dict) and not isinstance(row.get("data"), list)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: is {_kind(value)}; each row must be an object with named fields.")
    return value


def _kind(value: object) -> str:
    names = {str: "text", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), "an object")


def _one_line(error: BaseException) -> str:
    return brief(error).rstrip(".") or type(error).__name__
