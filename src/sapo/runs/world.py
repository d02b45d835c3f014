"""The processes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from sapo.errors import RepeatedError, SapoError, TrainingError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run.

    Attributes:
        process: index of this process; 0 writes files.
        size: number of processes.
    """

    process: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The world that accelerate's launcher, torchrun or nobody has set up."""
        state = PartialState()
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.process == 0

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            PartialState().wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; all take part. Plain objects, nothing large."""
        return list(gather_object([value])) if self.size > 1 else [value]

    def first_decides(self, value: T) -> T:
        """What the first process says, on all of them: clocks and file systems differ, and all must do the same."""
        said: T = self.gather(value)[0]
        return said

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Leave a block that does not communicate in all processes, or in none: one error is reported, by the first.

        Raises:
            SapoError: on the first process, its own or that of another; `RepeatedError` on the others.
        """
        if self.size == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001 - raised again below
            own = raised
        told = self.gather(None if own is None else f"{type(own).__name__}: {own}")
        failed = [process for process, said in enumerate(told) if said is not None]
        if not failed:
            return
        if own is not None and (self.first or not isinstance(own, SapoError)):
            raise own
        reported = f"process {failed[0]}: {told[failed[0]]}"
        raise TrainingError(reported) if self.first else RepeatedError(reported) from own
