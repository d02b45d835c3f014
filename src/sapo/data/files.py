"""Read one data file: JSON, JSON lines, CSV, Parquet or Arrow, compressed or not.

JSON is not read with `datasets`: its type inference refuses rows with different fields, and its errors name neither
file nor line.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow
import pyarrow.parquet

from sapo.data.json_text import InvalidJson, load_json
from sapo.errors import DatasetError, brief
from sapo.network import is_lfs_pointer

Rows: TypeAlias = "datasets.Dataset | datasets.IterableDataset | list[dict[str, Any]]"

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_MISSING = frozenset({"nan", "NaN", "None", "null", "NULL", "<NA>"})
"""Cells of CSV that programs write for a missing value, and pandas and `datasets` read as one."""
SUFFIXES = JSON_SUFFIXES + CSV_SUFFIXES + TABLE_SUFFIXES


class Unreadable(dict[str, Any]):
    """An empty row in place of a line that cannot be read.

    Attributes:
        error: names the line.
        reason: the same without the line.
    """

    def __init__(self, place: str, error: DatasetError) -> None:
        super().__init__()
        self.error = error
        # The column says where in this line, which is not what another line has in common with it.
        self.reason = re.sub(r", column \d+\)", ")", str(error).removeprefix(f"{place}: "))


def plain_name(file: Path) -> Path:
    """The name of a file without its compression suffix."""
    return file.with_suffix("") if file.suffix.lower() in COMPRESSED else file


def is_data(file: Path) -> bool:
    """Whether a file with this name is data: not one that is hidden, as editors and macOS leave them."""
    return plain_name(file).suffix.lower() in SUFFIXES and not file.name.startswith(".")


def read_file(file: Path, split: str | None = None, *, tolerant: bool = False) -> Rows:
    """All rows of a file.

    Args:
        file: its suffix determines the file type.
        split: split to read from a JSON document with several; None for "train".
        tolerant: return `Unreadable` for a line that is not valid instead of raising.

    Raises:
        DatasetError: the file cannot be read; the message names the line if there is one.
    """
    suffix = plain_name(file).suffix.lower()
    _check_pointer(file)
    if suffix == ".json":
        return _json_document(_bytes(file), file, split or "train", tolerant=tolerant)
    if split not in (None, "train"):
        raise _one_split(file, str(split))
    if suffix in (".jsonl", ".ndjson"):
        raw = _bytes(file)
        # One list of objects is never a line with a row: it is a document in spite of its name.
        read = _json_lines if re.match(rb"\s*\[\s*[{\]]", raw) is None else _json_document
        return read(raw, file, tolerant=tolerant)
    if suffix in CSV_SUFFIXES:
        return _csv(_bytes(file), file, "\t" if suffix == ".tsv" else ",", tolerant=tolerant)
    try:
        if suffix in TABLE_SUFFIXES:
            packed = io.BytesIO(_bytes(file)) if plain_name(file) != file else file
            table = pyarrow.parquet.read_table(packed) if suffix == ".parquet" else _arrow_table(packed)
            return datasets.Dataset.from_dict({name: table.column(name) for name in table.column_names})
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DatasetError(f"{file}: not readable as {suffix[1:]} ({one_line(error)}). Export it again.") from error
    raise DatasetError(
        f"{file}: unsupported file type; supported are {', '.join(SUFFIXES)}, also with {', '.join(COMPRESSED)}."
    )


def _check_pointer(file: Path) -> None:
    """Refuse the file that a clone without Git LFS has in place of the data."""
    try:
        pointer = is_lfs_pointer(file)
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read ({error.strerror}). Check its permissions.") from error
    if pointer:
        raise DatasetError(f"{file}: is a pointer of Git LFS, not the data. Run in its folder: git lfs pull")


def _arrow_table(file: Path | io.BytesIO) -> pyarrow.Table:
    """`datasets` writes the streaming form of Arrow, other programs the file form."""
    with pyarrow.memory_map(str(file)) if isinstance(file, Path) else pyarrow.PythonFile(file, "r") as source:
        if source.read(6) == b"ARROW1":
            source.seek(0)
            return pyarrow.ipc.open_file(source).read_all()
        source.seek(0)
        return pyarrow.ipc.open_stream(source).read_all()


def _bytes(file: Path) -> bytes:
    suffix = file.suffix.lower()
    raw = file.read_bytes()
    if suffix in COMPRESSED:
        raw = _unpacked(raw, file, suffix)
    return raw.removeprefix(b"\xef\xbb\xbf")


def _unpacked(raw: bytes, file: Path, suffix: str) -> bytes:
    readers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.decompress,
        ".xz": lzma.decompress,
        ".bz2": bz2.decompress,
        ".zst": _zstandard,
    }
    try:
        return readers[suffix](raw)
    except ImportError as error:
        raise DatasetError(f"{file}: reading .zst requires zstandard. Run: pip install zstandard") from error
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError) as error:
        raise DatasetError(f"{file}: cannot be decompressed ({one_line(error)}). Copy or export it again.") from error


def _zstandard(raw: bytes) -> bytes:
    import zstandard  # type: ignore[import-not-found, unused-ignore]

    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw), read_across_frames=True) as reader:
            found: bytes = reader.read()
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return found


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


def _csv(raw: bytes, file: Path, delimiter: str, *, tolerant: bool) -> list[dict[str, Any]]:
    """Rows of text, with the first line as column names; cells in `_MISSING` are None.

    Where the first line has no `delimiter`, a semicolon or tab in it is taken for one: spreadsheets export so in
    countries with a decimal comma.
    """
    text = _decode(raw, file, 1)
    names = text.partition("\n")[0]
    if delimiter not in names:
        delimiter = next((other for other in ";\t," if other in names), delimiter)
    limit = csv.field_size_limit(len(raw) + 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DatasetError(f"{file}, line 1: duplicate column name. Rename one of the columns.")
        rows: list[dict[str, Any]] = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                place = f"{file}, line {reader.line_num}"
                error = DatasetError(
                    f"{place}: has {len(cells)} cells, but the first line names {len(header)} columns. Quote cells "
                    "that contain the separator or a line break."
                )
                if not tolerant:
                    raise error
                rows.append(Unreadable(place, error))
                continue
            found = (None if cell in _MISSING else cell for cell in cells)
            rows.append(dict(zip(header, found, strict=True)))
    except csv.Error as error:
        raise DatasetError(
            f"{file}, line {reader.line_num}: not valid CSV ({one_line(error)}). Quote its cells."
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _parse(text: str, file: Path, line: int) -> object:
    try:
        return load_json(text)
    except InvalidJson as error:
        place = file if error.line is None else f"{file}, line {line + error.line - 1}"
        column = "" if error.column is None else f", column {error.column}"
        raise DatasetError(f"{place}: not valid JSON ({error.reason}{column}).") from error


def _json_lines(raw: bytes, file: Path, *, tolerant: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            text = _decode(line, file, number)
            if text.strip():
                rows.append(_object(_parse(text, file, number), f"{file}, line {number}"))
        except DatasetError as error:
            if not tolerant:
                raise
            rows.append(Unreadable(f"{file}, line {number}", error))
    return rows


def _one_split(file: Path, split: str) -> DatasetError:
    return DatasetError(
        f'{file}: a single file is the split "train"; there is no "{split}". Use a folder with train.jsonl and '
        f"{split}.jsonl, or the path of the other file."
    )


def _json_document(raw: bytes, file: Path, split: str = "train", *, tolerant: bool) -> list[dict[str, Any]]:
    """A list of objects, an object that holds one (as `data`, or by split), or JSON lines despite its name."""
    text = _decode(raw, file, 1)
    if not text.strip():
        return []
    if text.lstrip().startswith("{") and _is_json_lines(text):
        if split != "train":
            raise _one_split(file, split)
        return _json_lines(raw, file, tolerant=tolerant)
    document = _parse(text, file, 1)
    listed = [name for name, value in document.items() if isinstance(value, list)] if isinstance(document, dict) else []
    if split != "train" and split not in listed:
        raise _one_split(file, split)
    if isinstance(document, dict):
        # Without a list of rows it is one row, on as many lines as its indentation takes.
        document = document[split if split in listed else "data"] if {split, "data"} & {*listed} else [document]
    if not isinstance(document, list):
        raise DatasetError(f"{file}: is {_kind(document)}; expected a list of objects.")
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(document, 1):
        try:
            rows.append(_object(row, f"{file}, row {number}"))
        except DatasetError as error:
            if not tolerant:
                raise
            rows.append(Unreadable(f"{file}, row {number}", error))
    return rows


def _is_json_lines(text: str) -> bool:
    """Whether the first line is a row: an object that is not the only one, or holds no list of rows."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        row = load_json(first)
    except InvalidJson:
        return False
    return isinstance(row, dict) and (
        bool(rest.strip()) or not any(isinstance(row.get(name), list) for name in ("data", "train"))
    )


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: is {_kind(value)}; each row must be an object with named fields.")
    return value


def _kind(value: object) -> str:
    known = {str: "text", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else known.get(type(value), "an object")


def one_line(error: BaseException) -> str:
    """The message of an error on one line, to quote in another error."""
    return brief(error).rstrip(".") or type(error).__name__
