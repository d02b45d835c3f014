"""How much of a run's time a measurement takes, and whether there is time for one more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TimeShare:
    """Time spent on a measurement, over the time of the run so far.

    Args:
        most: maximum share.
        clock: gives seconds.

    Attributes:
        cost: seconds of the last measurement, or an estimate before the first.
    """

    def __init__(self, most: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.cost: float | None = None
        self._most = most
        self._began, self._spent = clock(), 0.0

    def begin(self) -> None:
        """The run begins now."""
        self._began, self._spent = self.clock(), 0.0

    def fits(self) -> bool:
        """Whether one more measurement, as long as the last, keeps within the share."""
        cost = self.cost or 0.0
        return self._spent + cost <= self._most * (self.clock() - self._began + cost)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """The measurement itself: its time counts, and is what the next is expected to take."""
        started = self.clock()
        yield
        self.cost = self.clock() - started
        self._spent += self.cost

    @property
    def share(self) -> float:
        """Time spent over time passed."""
        return self._spent / max(self.clock() - self._began, 1e-9)
