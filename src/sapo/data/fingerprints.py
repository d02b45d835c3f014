"""A hash of each prepared turn: finds evaluation rows that are trained on, and what has changed before a resume."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute

from sapo.data.examples import ExampleTable
from sapo.data.report import listed_rows


def fingerprints(prepared: datasets.Dataset, names: Sequence[str] = ExampleTable.NESTED) -> npt.NDArray[np.int64]:
    """Row numbers and hashes of all turns, in their order.

    Args:
        prepared: from `prepare_dataset`.
        names: the columns of tokens that the hashes are of; those that are absent are left out.

    Returns:
        Shape (turns, 2): the row number, from 0, and the hash.
    """
    found: list[tuple[int, int]] = []
    for batch in prepared.with_format("arrow").iter(batch_size=1000):
        turns = pyarrow.compute.list_value_length(batch.column("turn")).to_numpy()
        parts = [_token_bytes(batch.column(name)) for name in names if name in batch.column_names]
        for row, *tokens in zip(np.repeat(batch.column("row").to_numpy(), turns), *parts, strict=True):
            digest = hashlib.blake2b(digest_size=8)
            for part in tokens:
                digest.update(len(part).to_bytes(8, "little") + part)
            found.append((int(row), int.from_bytes(digest.digest(), "little", signed=True)))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _token_bytes(nested: Any) -> list[bytes]:
    """The tokens of each turn as bytes."""
    turns = pyarrow.compute.list_flatten(nested).combine_chunks()
    ends = np.cumsum(turns.value_lengths().to_numpy(zero_copy_only=False)) * 4
    tokens = turns.flatten().to_numpy(zero_copy_only=False).astype("<i4").tobytes()
    return [tokens[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def trained_on(train: datasets.Dataset, evaluation: datasets.Dataset) -> list[str]:
    """A warning if rows to evaluate on are training rows too: the same prompt and response. Empty if there are none."""
    names = ("prompt_ids", "response_ids")
    rows, hashes = fingerprints(evaluation, names).T
    shared = np.unique(rows[np.isin(hashes, fingerprints(train, names)[:, 1])])
    if not len(shared):
        return []
    return [
        f"warning: {len(shared)} of {len(np.unique(rows))} evaluation rows are training rows too "
        f"({listed_rows((shared + 1).tolist())}): an evaluation does not show how the model does on new rows"
    ]


def changed_rows(before: npt.NDArray[np.int64], now: npt.NDArray[np.int64]) -> str:
    """What differs between the training rows of two starts, in words.

    Args:
        before: `fingerprints` of the earlier rows.
        now: of the present ones.
    """
    then, here = Counter(before[:, 1].tolist()), Counter(now[:, 1].tolist())
    counts = f"{len(np.unique(before[:, 0]))} rows then, {len(np.unique(now[:, 0]))} now"
    if then and not then.keys() & here.keys():
        return f"{counts}, none of them the same: the data, the chat template or the tokenizer is another"
    gone, new = (
        {row for row, turn in turns.tolist() if turn in different}
        for turns, different in ((before, then - here), (now, here - then))
    )
    named = (("changed", gone & new), ("new", new - gone), ("gone", gone - new))
    found = [f"{what}: {listed_rows([row + 1 for row in sorted(rows)])}" for what, rows in named if rows]
    return f"{counts}; {'; '.join(found) or 'their order is another'}"
