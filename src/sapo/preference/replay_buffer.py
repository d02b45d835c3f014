"""Bounded first-in first-out buffer with draws that prefer rarely drawn items.

Source: the published replay buffer (`sapo/replay_buffer.py`, revision 5d7a210), whose counts were keyed by object
identity and so lost on resume; here each slot carries its own count and age.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np

Item = TypeVar("Item")
Draw = Literal["inverse_count", "uniform"]


@dataclass(frozen=True, slots=True)
class BufferEntry(Generic[Item]):
    """One stored item with its step and draw count."""

    item: Item
    step: int
    draws: int


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[Item]):
    """A state of the buffer for `ReplayBuffer.undo`."""

    items: list[Item]
    steps: np.ndarray
    draws: np.ndarray
    first: int


class ReplayBuffer(Generic[Item]):
    """First in, first out; at most `capacity` items.

    Args:
        capacity: maximum number of items; the oldest is removed when it is full.
        draw: "inverse_count" draws with probability proportional to 1 / (times drawn + 1), as published; "uniform".
        replacement: whether one draw may contain an item twice (as published).

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(self, capacity: int, *, draw: Draw = "inverse_count", replacement: bool = True) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: must be 1 or more")
        self.capacity = capacity
        self._draw = draw
        self._replacement = replacement
        # A ring: slot (first + i) % capacity is the i-th oldest item, so adding never moves the others.
        self._items: list[Item] = []
        self._steps: np.ndarray = np.zeros(capacity, dtype=np.int64)
        self._draws: np.ndarray = np.zeros(capacity, dtype=np.int64)
        self._first = 0

    def __len__(self) -> int:
        return len(self._items)

    def _order(self) -> np.ndarray:
        """Slots from the oldest item to the newest."""
        return (self._first + np.arange(len(self._items))) % max(len(self._items), 1)

    def add(self, item: Item, step: int) -> None:
        """Store `item`, generated at optimizer step `step`; the oldest is removed when the buffer is full."""
        if len(self._items) < self.capacity:
            slot = len(self._items)
            self._items.append(item)
        else:
            slot = self._first
            self._items[slot] = item
            self._first = (self._first + 1) % self.capacity
        self._steps[slot] = step
        self._draws[slot] = 0

    def expire(self, oldest_step: int) -> int:
        """Remove items generated before `oldest_step`; return their number."""
        kept = [entry for entry in self.entries() if entry.step >= oldest_step]
        expired = len(self) - len(kept)
        if expired:
            self.restore(kept)
        return expired

    def probabilities(self) -> list[float]:
        """Probability of each item to be drawn next, oldest first."""
        weights = self._weights()
        return list(weights / weights.sum()) if len(self) else []

    def _weights(self) -> np.ndarray:
        if self._draw == "uniform":
            return np.ones(len(self))
        return np.asarray(1.0 / (self._draws[self._order()] + 1.0))

    def draw(self, count: int, rng: random.Random) -> list[Item]:
        """Draw `count` items, or as many as there are, and count the draws.

        Counts are updated after the full draw: within one draw all probabilities are fixed.
        """
        count = min(count, len(self))
        if count == 0:
            return []
        weights = self._weights()
        slots = self._order()
        if self._replacement:
            cumulative = np.cumsum(weights / weights.sum())
            uniforms = np.array([rng.random() for _ in range(count)]) * cumulative[-1]
            places = np.minimum(np.searchsorted(cumulative, uniforms, side="right"), len(self) - 1)
        else:
            # Largest keys u^(1/w): a weighted draw without replacement in one pass
            # (Efraimidis and Spirakis 2006).
            uniforms = np.array([rng.random() for _ in range(len(self))])
            places = np.argsort(-np.log(1.0 - uniforms) / weights, kind="stable")[:count]
        drawn = slots[places]
        np.add.at(self._draws, drawn, 1)
        return [self._items[slot] for slot in drawn]

    def mean_draws(self) -> float:
        """Draws per stored item; 0 when empty."""
        return float(self._draws[: len(self)].mean()) if len(self) else 0.0

    def mean_age(self, step: int) -> float:
        """Optimizer steps since the stored items were generated, on average; 0 when empty."""
        return float(step - self._steps[: len(self)].mean()) if len(self) else 0.0

    def items(self) -> list[Item]:
        """All items, oldest first."""
        return [self._items[slot] for slot in self._order()]

    def entries(self) -> list[BufferEntry[Item]]:
        """All entries, oldest first, for a checkpoint."""
        return [
            BufferEntry(self._items[slot], int(self._steps[slot]), int(self._draws[slot])) for slot in self._order()
        ]

    def snapshot(self) -> Snapshot[Item]:
        """The current contents, for `undo`; copies references and counts, not items."""
        return Snapshot(list(self._items), self._steps.copy(), self._draws.copy(), self._first)

    def undo(self, to: Snapshot[Item]) -> None:
        """Revert all additions and draws since `to` was taken; `to` must not be used again."""
        self._items, self._steps, self._draws, self._first = to.items, to.steps, to.draws, to.first

    def restore(self, entries: Iterable[BufferEntry[Item]]) -> None:
        """Replace the contents by `entries` (oldest first), including counts and ages.

        Raises:
            ValueError: more entries than `capacity`.
        """
        entries = list(entries)
        if len(entries) > self.capacity:
            raise ValueError(f"{len(entries)} entries exceed the replay buffer's capacity of {self.capacity}")
        self._items = [entry.item for entry in entries]
        self._first = 0
        self._steps[: len(entries)] = [entry.step for entry in entries]
        self._draws[: len(entries)] = [entry.draws for entry in entries]
