"""Several datasets as one. Each has its own format and columns."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from sapo.data.examples import DataOptions, DataReport
from sapo.data.files import Rows, Unreadable
from sapo.data.loading import load_files, load_hub, load_rows
from sapo.data.prepare import prepare_dataset
from sapo.errors import DatasetError
from sapo.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import DatasetMixtureConfig
    from trl.scripts.utils import DatasetConfig

_READERS = ("json", "parquet", "arrow")
"""Values of `path` that name a file format, as in `datasets.load_dataset`."""


@dataclass(frozen=True, slots=True)
class Member:
    """One dataset of a mixture, or the only one: its name in messages, and its rows."""

    name: str
    rows: Rows


def load_mixture(mixture: DatasetMixtureConfig, *, tolerant: bool = False) -> list[Member]:
    """Read the members of trl's `datasets` list, with its `path`, `split`, `columns`, `fraction` and the rest.

    As trl's `get_dataset`, but `path` may also be a local file or folder, and the members are not concatenated: their
    columns may differ, and errors name the file. `tolerant` is as for `load_rows`.

    Raises:
        DatasetError: no member, one that cannot be loaded or lacks a column, or invalid fractions.
    """
    members = [_load_member(part, mixture.streaming, tolerant=tolerant) for part in mixture.datasets]
    if not members:
        raise DatasetError("datasets: the list is empty. Add at least one, such as `- path: my.jsonl`.")
    fractions = [part.fraction for part in mixture.datasets if part.fraction is not None]
    return _shares(members, fractions) if fractions else members


def prepare_mixture(
    members: Sequence[Member],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    eos_ids: Collection[int],
    **more: Any,
) -> tuple[datasets.Dataset, list[DataReport]]:
    """`prepare_dataset` on each member; row numbers continue from one member to the next, so each is unique.

    `more` is passed on to `prepare_dataset`.
    """
    parts: list[datasets.Dataset] = []
    reports: list[DataReport] = []
    for member in members:
        part, report = prepare_dataset(
            member.rows,
            tokenizer,
            options,
            eos_ids=eos_ids,
            source=member.name,
            first_row=sum(report.rows for report in reports),
            **more,
        )
        parts.append(part)
        reports.append(report)
    return datasets.concatenate_datasets(parts), reports


def split_rows(prepared: datasets.Dataset, test_size: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off rows for evaluation; the turns of one row stay together.

    Args:
        prepared: from `prepare_mixture`.
        test_size: fraction of the rows if below 1, else number of rows.
        seed: the run's seed, so that a resumed run splits identically.

    Raises:
        DatasetError: one of the sides would be empty.
    """
    numbers = list(prepared["row"])
    rows = sorted(set(numbers))
    count = round(test_size * len(rows)) if test_size < 1 else int(test_size)
    if not 0 < count < len(rows):
        raise DatasetError(
            f"test_split_size={test_size} would hold out {count} of {len(rows)} rows. Use a fraction between 0 and 1, "
            "or a number of rows that leaves both sides non-empty."
        )
    aside = set(random.Random(derive_seed(seed, "test split")).sample(rows, count))
    sides = ([i for i, row in enumerate(numbers) if (row in aside) == test] for test in (False, True))
    train, test = (prepared.select(side) for side in sides)
    return train, test


def _load_member(part: DatasetConfig, streaming: bool, *, tolerant: bool) -> Member:
    folder = Path(part.path).expanduser()
    files = _files(part.data_files)
    rows: Rows
    if files is None and part.data_dir is None:
        name = part.path
        rows = load_rows(name, config=part.name, split=part.split, streaming=streaming, tolerant=tolerant)
    elif (folder.is_dir() or part.path in _READERS) and not any(
        "://" in name for name in chain(*(files or {}).values())
    ):
        base = (folder if folder.is_dir() else Path()) / (part.data_dir or "")
        if files is None:
            rows, name = load_rows(base, split=part.split, tolerant=tolerant), str(base)
        else:
            names = _of_split(files, part)
            name = ", ".join(names)
            rows = load_files([base / file for file in names], split=part.split, tolerant=tolerant)
    else:
        rows = load_hub(part.path, part.name, part.split, streaming, data_dir=part.data_dir, data_files=part.data_files)
        name = part.path
    return Member(name, rows if part.columns is None else _select(rows, part.columns, name))


def _files(given: str | list[str] | dict[str, Any] | None) -> dict[str, list[str]] | None:
    """`data_files` in its full form: a list of files per split."""
    if given is None:
        return None
    by_split = given if isinstance(given, dict) else {"train": given}
    return {split: [names] if isinstance(names, str) else list(names) for split, names in by_split.items()}


def _of_split(files: dict[str, list[str]], part: DatasetConfig) -> list[str]:
    split = part.split.partition("[")[0]
    if split not in files:
        raise DatasetError(f'mixture, {part.path}: data_files has no split "{split}"; it has {", ".join(files)}.')
    return files[split]


def _select(rows: Rows, columns: list[str], name: str) -> Rows:
    if isinstance(rows, list):
        present = {column for row in rows for column in row}
    else:
        present = set(rows.column_names or columns)  # a streamed dataset may not know its columns
    missing = [column for column in columns if column not in present]
    if missing:
        raise DatasetError(
            f"{name}: has no column {', '.join(missing)} to select; it has {', '.join(sorted(present))}."
        )
    if isinstance(rows, list):
        return [
            row if isinstance(row, Unreadable) else {column: row[column] for column in columns if column in row}
            for row in rows
        ]
    return rows.select_columns(columns)


def _shares(members: list[Member], fractions: list[float]) -> list[Member]:
    """Truncate each member to its fraction of the largest mixture without repetition, as trl does."""
    if len(fractions) < len(members):
        raise DatasetError("datasets: some have a fraction and some have none. Give one to all, or to none.")
    if any(isinstance(member.rows, datasets.IterableDataset) for member in members):
        raise DatasetError(
            "datasets: fraction requires the number of rows, which streaming does not know. Remove streaming."
        )
    if min(fractions) <= 0:
        raise DatasetError(f"datasets: fraction={min(fractions)} must be above 0. Remove the dataset instead.")
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(member.rows) / weight for member, weight in zip(members, weights, strict=True))
    counts = [max(1, round(weight * total)) for weight in weights]
    return [
        Member(member.name, member.rows[:count] if isinstance(member.rows, list) else member.rows.select(range(count)))
        for member, count in zip(members, counts, strict=True)
    ]
