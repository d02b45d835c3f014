"""Pairs as integer tensors, for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sapo.preference.pairs import GeneratedPairs, Pair, shared_ids
from sapo.preference.replay_buffer import BufferEntry
from sapo.preference.segments import Segment

_TOKEN_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")

T = TypeVar("T")


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
    for field in _TOKEN_FIELDS:
        values = [getattr(pair, field) for pair in pairs]
        tensors[field] = torch.tensor([token for value in values for token in value], dtype=torch.int64)
        tensors[f"{field}_lengths"] = torch.tensor([len(value) for value in values], dtype=torch.int64)
    return tensors


def entries_from_tensors(tensors: Mapping[str, Tensor]) -> list[BufferEntry[Pair]]:
    """The inverse of `entries_to_tensors`."""
    columns = [
        [shared_ids(part.tolist()) for part in torch.split(tensors[field], tensors[f"{field}_lengths"].tolist())]
        for field in _TOKEN_FIELDS
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
    """Pairs generated ahead: as a buffer's contents, with the step and micro-batch of each."""
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


def checked_entries(tensors: Mapping[str, Tensor], vocabulary_size: int) -> list[BufferEntry[Pair]]:
    """`entries_from_tensors` of an untrusted file, with checks that the pairs are valid for this model.

    Raises:
        ValueError: the pairs are invalid.
    """
    if any(tensor.dtype != torch.int64 for tensor in tensors.values()):
        raise ValueError("pairs must be integer tensors")
    for field in _TOKEN_FIELDS:
        tokens = tensors[field]
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary_size:
            raise ValueError(f"{field} contains tokens outside the model's vocabulary")
    entries = entries_from_tensors(tensors)
    for entry in entries:
        if not (_is_valid(entry.item) and entry.step >= 0 and entry.draws >= 0):
            raise ValueError(f"an entry of row {entry.item.row} is not a valid replay buffer entry")
    return entries


def _is_valid(pair: Pair) -> bool:
    """Whether both responses exist and contain the two spans after a common prefix."""
    own, new = pair.segment, pair.rewritten
    inside = 0 <= own.start <= own.stop <= len(pair.chosen_ids) and new.start <= new.stop <= len(pair.rejected_ids)
    shared = own.start == new.start and pair.chosen_ids[: own.start] == pair.rejected_ids[: own.start]
    return bool(inside and shared and pair.prompt_ids and pair.chosen_ids and pair.rejected_ids)


def redistribute(parts: Sequence[Sequence[T]], processes: int, *, step: Callable[[T], int]) -> list[list[T]]:
    """Redistribute the contents of several processes' buffers to `processes` buffers, each entry once.

    Round-robin from the oldest, so that sizes differ by at most one and ages are similar.

    Args:
        parts: entries of each earlier process, oldest first.
        processes: current number of processes.
        step: maps an entry to the optimizer step at which it was generated.
    """
    everything = sorted((entry for part in parts for entry in part), key=step)
    return [everything[place::processes] for place in range(processes)]
