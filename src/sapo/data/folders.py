"""Find the files of a split in a folder: by file name, as in `datasets`, or by the README of a Hub snapshot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import yaml

from sapo.data.files import JSON_SUFFIXES, Rows, is_data, one_line, plain_name, read_file
from sapo.errors import DatasetError

_ALIASES = (("train", "training"), ("test", "testing", "eval", "evaluation"), ("validation", "valid", "val", "dev"))
_WORDS = tuple(word for words in _ALIASES for word in words)
_SPLIT = re.compile(rf"(?:^|(?<=[-_. ]))({'|'.join(_WORDS)})(\d*)(?=[-_. ]|$)", re.IGNORECASE)
_METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


def read_folder(folder: Path, config: str | None, split: str, *, tolerant: bool = False) -> Rows:
    """Read the rows of a split.

    Args:
        folder: saved by `datasets`, a snapshot of a Hub dataset, or files named by split.
        config: configuration of a snapshot.
        split: name of the split, such as `train` or `test_prefs`.
        tolerant: as for `read_file`.

    Raises:
        DatasetError: there is no such configuration or split, or its files cannot be combined.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        _no_configuration(folder, config)
        return _read_saved(folder, split)
    stated = _stated(folder, config)
    if stated is None and config is not None:
        if not (folder / config).is_dir():
            _no_configuration(folder, config)
        folder = folder / config
    by_split = _by_name(folder, split) if stated is None else stated
    if not by_split and config is None and (folder / "default").is_dir():
        by_split = _by_name(folder / "default", split)  # the Hub's own conversion to Parquet
    if stated is not None and not by_split:
        raise DatasetError(
            f"{folder}: the data_files of its README name no file that is here. Download them, or use a file's path."
        )
    if not by_split:
        raise DatasetError(
            f"{folder}: contains no data. Put train.jsonl (or .json, .csv, .parquet, .arrow) there, or use a file."
        )
    if split == "train" and set(by_split) == {""}:
        return join(by_split[""], folder, tolerant=tolerant)  # shards without a split name
    exact = [file for file in by_split.get("", ()) if plain_name(file).stem == split]
    found = by_split.get(split) or exact or _alias(by_split, split)
    if not found:
        known = sorted({*by_split, *(plain_name(file).stem for file in by_split.get("", ()))} - {""})
        raise DatasetError(f'{folder}: has no split "{split}"; it has {", ".join(known)}. Use one of these.')
    return join(found, folder, tolerant=tolerant)


def splits_of(folder: Path, config: str | None = None) -> list[str]:
    """The split names in a folder; empty if its files name no splits, or if `datasets` saved it without splits."""
    if (folder / "dataset_dict.json").is_file():
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if (folder / "state.json").is_file():
        return []
    stated = _stated(folder, config)
    place = folder / config if config is not None and (folder / config).is_dir() else folder
    return sorted({*(_by_name(place, "") if stated is None else stated)} - {""})


def _no_configuration(folder: Path, config: str | None) -> None:
    if config is not None:
        raise DatasetError(
            f"{folder}: is local and has no configuration {config!r}. Remove dataset_config, or use the path of "
            "the file itself."
        )


def _by_name(folder: Path, split: str) -> dict[str, list[Path]]:
    """Data files by the split in their names; files without a split under the empty name."""
    by_split: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.is_file() and is_data(file) and file.name not in _METADATA:
                by_split.setdefault(split_name(file), []).append(file)
    data = folder / "data"
    subs = [entry for place in (folder, data) if place.is_dir() for entry in place.iterdir() if entry.is_dir()]
    for sub in sorted(subs):
        if sub.name.split("_")[0] in _WORDS or sub.name == split:
            shards = [file for file in sorted(sub.iterdir()) if is_data(file)]
            if shards:
                by_split.setdefault(sub.name, []).extend(shards)
    return by_split


def split_name(file: Path) -> str:
    """The split in a file's name, or empty text.

    `test_prefs-00000-of-00002.parquet` is `test_prefs`, as written by `datasets`; `train_1M.jsonl` is `train_1M`;
    `train-3.jsonl`, `train2.jsonl`, `train_part2.jsonl` and `alpaca_train.jsonl` are parts of `train`.
    """
    stem = plain_name(file).stem
    # Older versions of `datasets` added a fingerprint.
    sharded = re.fullmatch(r"(\w[\w.-]*?)-\d+-of-\d+(?:-[0-9a-f]{8,})?", stem)
    name = sharded[1] if sharded else re.sub(r"(?:[-_.](?:part|shard|chunk)?[-_.]?\d+)+$", "", stem)
    found = _SPLIT.search(name)
    if found is None:
        return ""
    # What precedes it is the name of the dataset; digits at once after it are the number of a part.
    name = name[found.start() :] if found.end() < len(name) and not found[2] else found[1]
    return name.lower() if name.lower() in _WORDS else name


def _alias(by_split: dict[str, list[Path]], split: str) -> list[Path]:
    """The files of a split under an alias, such as `dev` for `validation`."""
    words = next((words for words in _ALIASES if split in words), ())
    found = [by_split[word] for word in words if word in by_split]
    return found[0] if len(found) == 1 else []


def _stated(folder: Path, config: str | None) -> dict[str, list[Path]] | None:
    """Files by split from `configs:` in the README of a Hub snapshot; None without one."""
    readme = folder / "README.md"
    try:
        text = readme.read_text(encoding="utf-8-sig", errors="replace") if readme.is_file() else ""
    except OSError:
        return None
    header = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    try:
        content = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return None  # a README without dataset metadata: splits follow from file names
    listed = content.get("configs") if isinstance(content, dict) else None
    configs = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    configs = [entry for entry in configs if "data_files" in entry or "data_dir" in entry]
    if not configs:
        return None
    by_name = {str(entry.get("config_name", "default")): entry for entry in configs}
    wanted = config
    if wanted is None:
        marked = [name for name, entry in by_name.items() if entry.get("default") is True or name == "default"]
        wanted = marked[0] if marked else next(iter(by_name)) if len(by_name) == 1 else None
    if wanted is None or wanted not in by_name:
        problem = "is required" if wanted is None else f"{wanted!r} does not exist"
        raise DatasetError(f"{folder}: dataset_config {problem}; its README has {', '.join(sorted(by_name))}.")
    return _files_of(folder, by_name[wanted], wanted)


def _files_of(folder: Path, entry: dict[str, Any], config: str) -> dict[str, list[Path]]:
    base = folder / str(entry.get("data_dir", ""))
    given = entry.get("data_files")
    if given is None:
        return _by_name(base, "") if base.is_dir() else {}
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    items = given if isinstance(given, list) and given and isinstance(given[0], dict) else [{"path": given}]
    by_split: dict[str, list[Path]] = {}
    for item in items:
        path = item.get("path") if isinstance(item, dict) else None
        patterns = [path] if isinstance(path, str) else path
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise DatasetError(
                f"{folder}: README.md, configs, {config}: data_files is not understood. Use a file name."
            )
        for pattern in patterns:
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise DatasetError(f"{folder}: README.md, configs, {config}: {pattern!r} is outside the folder.")
            try:
                found = sorted(base.glob(f"{pattern}/*" if pattern.endswith("**") else pattern))
            except (ValueError, NotImplementedError) as error:
                raise DatasetError(
                    f"{folder}: README.md, configs, {config}: {pattern!r}: {one_line(error)}."
                ) from error
            files = [file for one in found for file in (_data_under(one) if one.is_dir() else [one])]
            files = list(dict.fromkeys(files))
            if files:  # snapshots often contain only some splits
                by_split.setdefault(str(item.get("split", "train")), []).extend(files)
    return by_split


def _data_under(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and is_data(file)]


def join(files: list[Path], where: Path | str, *, tolerant: bool = False) -> Any:
    """Combine several files into one split; `tolerant` as for `read_file`.

    Raises:
        DatasetError: the files have different types or incompatible columns, or one occurs twice.
    """
    names = [plain_name(file) for file in files]
    if len({name.suffix.lower() in JSON_SUFFIXES for name in names}) > 1 or (
        len({name.with_suffix("") for name in names}) < len(files)
    ):
        listing = ", ".join(file.name for file in files[:4])
        raise DatasetError(f"{where}: {listing} would be read as one split. Keep one of them, or use its path.")
    parts: list[Any] = [read_file(file, tolerant=tolerant) for file in files]
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in part]
    try:
        return datasets.concatenate_datasets(parts)
    except (ValueError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise DatasetError(
            f"{where}: its {len(files)} files cannot be combined ({one_line(error)}). Give them the same columns."
        ) from error


def _read_saved(folder: Path, split: str) -> Rows:
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DatasetError(
            f"{folder}: was saved by datasets, but cannot be read ({one_line(error)}). Save it again."
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        if split != "train":
            raise DatasetError(f'{folder}: contains one dataset without splits, so there is no "{split}".')
        return saved
    if split not in saved:
        raise DatasetError(f'{folder}: has no split "{split}"; it has {", ".join(saved)}.')
    return saved[split]
