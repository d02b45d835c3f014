"""The queue of an engine: tasks are done one after the other, in the order in which training submits them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeAlias, TypeVar

from sapo.generation.protocol import Engine, InProcessEngine
from sapo.preference.pairs import GeneratedPairs

T = TypeVar("T")

PairsByBatch: TypeAlias = "dict[tuple[int, int], GeneratedPairs]"
"""Pairs by optimizer step and micro-batch."""


class _LazyFuture(Generic[T]):
    """A task of `_InlineExecutor`: done when its result is needed."""

    def __init__(self, task: Callable[[], T], tasks: deque[_LazyFuture[Any]]) -> None:
        self._task = task
        self._tasks = tasks
        self._results: list[T] = []

    def done(self) -> bool:
        return bool(self._results)

    def result(self) -> T:
        while not self._results:
            self._tasks[0].run()
        return self._results[0]

    def run(self) -> None:
        self._tasks.popleft()
        self._results.append(self._task())


class _InlineExecutor:
    """In place of a thread, for an engine that shares its device with training: it works when it is needed."""

    def __init__(self) -> None:
        self._tasks: deque[_LazyFuture[Any]] = deque()

    def submit(self, task: Callable[[], T]) -> _LazyFuture[T]:
        future = _LazyFuture(task, self._tasks)
        self._tasks.append(future)
        return future

    def shutdown(self, *, cancel_futures: bool) -> None:
        self._tasks.clear()


Task: TypeAlias = "Future[T] | _LazyFuture[T]"


class EngineTasks:
    """A `Generator` whose requests wait for everything submitted to the engine before.

    Args:
        engine: generates, and is given weights.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._executor: ThreadPoolExecutor | _InlineExecutor | None = None
        self._requests: deque[tuple[frozenset[int], Task[PairsByBatch]]] = deque()
        self._busy = 0.0

    def generate(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Continue each context once everything submitted before is done; see `Generator.generate`."""
        return self._submit(lambda: self.engine.generate(contexts, max_new_tokens, seeds)).result()

    def request(self, steps: Iterable[int], task: Callable[[], PairsByBatch | None]) -> None:
        """Submit a task whose result, the pairs of `steps`, is collected later; of no steps for new weights."""
        self._requests.append((frozenset(steps), self._submit(lambda: task() or {})))

    def collect(self, step: int | None) -> PairsByBatch:
        """The pairs that are there, in the order of the requests.

        Args:
            step: wait for the pairs of this step and take what is done besides; None waits for everything.

        Raises:
            GenerationError: what became of the engine.
        """
        collected: PairsByBatch = {}
        while self._requests and (step is None or self._requests[0][1].done() or self._awaits(step)):
            collected.update(self._requests.popleft()[1].result())
        return collected

    def _awaits(self, step: int) -> bool:
        return any(step in steps for steps, _ in self._requests)

    def drain(self) -> PairsByBatch:
        """Wait until everything submitted is done.

        Raises:
            GenerationError: what became of the engine.
        """
        if self._executor is not None:
            self._submit(lambda: None).result()
        return self.collect(None)

    @property
    def waiting(self) -> int:
        """Requests for pairs that are not collected yet."""
        return sum(bool(steps) for steps, _ in self._requests)

    def busy_seconds(self) -> float:
        """Seconds that the engine worked since this was last asked."""
        busy, self._busy = self._busy, 0.0
        return busy

    def close(self) -> None:
        """Shut the engine down, and forget what was submitted."""
        # First the engine, which ends what is under way if this is the end of a run that failed.
        self.engine.close()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._executor = None
        self._requests.clear()

    def _submit(self, task: Callable[[], T]) -> Task[T]:
        if self._executor is None:
            inline = isinstance(self.engine, InProcessEngine)
            self._executor = _InlineExecutor() if inline else ThreadPoolExecutor(1, thread_name_prefix="engine")

        def timed() -> T:
            started = time.perf_counter()
            try:
                return task()
            finally:
                self._busy += time.perf_counter() - started

        return self._executor.submit(timed)
