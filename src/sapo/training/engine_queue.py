"""The opponent on an engine: its weights go out, pending batches come back, in one order fixed by the settings.

Everything that concerns the engine is a task of one queue, worked off by one thread in the order in which the training
put it there: weights after every `sync_opponent_steps` steps, the pairs of a step `lookahead_steps` before their turn.
So which opponent writes which pairs follows from the settings and not from how fast anything is: training that does not
wait for the engine is as reproducible as training that does, and no pair is older than `max_staleness`.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar
from zlib import crc32

import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from sapo.config import SAPOConfig
from sapo.errors import CheckpointError
from sapo.generation.protocol import Engine, InProcessEngine, Weights
from sapo.preference.pairs import GeneratedPairs, PendingBatch, SelfPlay
from sapo.weights.opponent import ModelCopy, ShadowModel, ShardedCopy

FOLDER = "engine"
"""In the run folder: weights on their way to the engine. In a checkpoint: those that it has, if not the opponent's."""

STREAMED = "model.safetensors"
"""In the latter, where weights were sent rather than handed over as a folder."""

T = TypeVar("T")


def _weights_folder(args: SAPOConfig) -> Path:
    """Where this run, and no other, hands its weights over; the same after a restart."""
    output = Path(args.output_dir or "").absolute()
    if args.vllm_weights_dir is None:
        return output / FOLDER
    # A place such as /dev/shm is everybody's, and stays.
    return Path(args.vllm_weights_dir).absolute() / f"{output.name}-{crc32(str(output).encode()):08x}"


class _LazyFuture(Generic[T]):
    """What `_InlineExecutor` gives for a task: done when somebody needs its result."""

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
    """In the place of a thread, for an engine that shares its device with the training: it works when it is needed."""

    def __init__(self) -> None:
        self._tasks: deque[_LazyFuture[Any]] = deque()

    def submit(self, task: Callable[[], T]) -> _LazyFuture[T]:
        later = _LazyFuture(task, self._tasks)
        self._tasks.append(later)
        return later

    def shutdown(self, *, cancel_futures: bool) -> None:
        self._tasks.clear()


Task: TypeAlias = "Future[T] | _LazyFuture[T]"


class EngineQueue:
    """A `Generator` that hands requests and weights to an engine, one after the other.

    Args:
        engine: writes.
        args: `sync_opponent_steps`, `output_dir`, `vllm_weights_dir` and the number of processes.
        opponent: the opponent, once there is one; of sharded weights all processes take part.
        record: receives `engine/*` and `time/engine_*` metrics.
    """

    def __init__(
        self,
        engine: Engine,
        args: SAPOConfig,
        opponent: Callable[[], ShadowModel],
        record: Callable[[str, float], None],
    ) -> None:
        self.engine = engine
        self._args = args
        self._opponent = opponent
        self._record = record
        self._weights = _weights_folder(args)
        self._run = ""
        self._step: int | None = None
        self._held: Weights | None = None
        self._queue: ThreadPoolExecutor | _InlineExecutor | None = None
        self._asked: deque[tuple[frozenset[int], Task[dict[tuple[int, int], GeneratedPairs]]]] = deque()
        self._busy = 0.0
        self._group: Any = None

    # ---- Weights ----

    def begin(self, step: int, checkpoint: Path | None = None) -> None:
        """Give the engine the weights with which it is to write at `step`; all processes take part.

        Args:
            step: optimizer steps that the opponent has followed.
            checkpoint: which the run goes on from, and which may hold the weights that the engine had.
        """
        self.drain()
        if not self._run:
            if self._args.process_index == 0:
                # What a killed run has left there is of no use.
                shutil.rmtree(self._weights, ignore_errors=True)
            names = [secrets.token_hex(4)]
            self._run = str(broadcast_object_list(names)[0]) if self._args.world_size > 1 else names[0]
            if self._args.world_size > 1:
                # Used by the queue's thread alone, so that it never mixes with what the training says.
                self._group = dist.new_group(backend="gloo")
        kept = [] if checkpoint is None else sorted(checkpoint.glob(f"{FOLDER}/opponent-*"))
        if not kept:
            self._publish_opponent(step)
            return
        at = kept[-1].name.removeprefix("opponent-")
        if not at.isdigit() or int(at) > step:
            raise CheckpointError(f"{kept[-1]}: not weights of a step before {step}. Resume from another checkpoint.")
        if self._streams:
            self._load(int(at), load_file(kept[-1] / STREAMED) if self._args.process_index == 0 else {})
        else:
            self._publish(int(at), lambda folder: self._copy(kept[-1], folder))

    @property
    def _streams(self) -> bool:
        return self._args.vllm_weights_transfer == "stream"

    def _publish_opponent(self, step: int) -> None:
        opponent, engine = self._opponent(), self.engine
        if self._streams:
            started = time.perf_counter()
            # The opponent moves on before these are sent.
            own = {name: weight.detach().to("cpu", copy=True) for name, weight in opponent.whole().items()}
            self._record("time/engine_weights", time.perf_counter() - started)
            self._load(step, own if self._args.process_index == 0 else {})
            return
        # What is written next must be written before the opponent moves on, or these would be other weights.
        at_once = self._args.sync_opponent_steps == self._args.generation_interval == 1
        if isinstance(engine, InProcessEngine) and isinstance(opponent, ModelCopy) and at_once:
            tensors = opponent.tensors()
            # Experts have other names here than in files, and an engine knows those of files.
            if not any(".experts." in name for name in tensors):
                self._step = step
                load = partial(engine.load_tensors, tensors.items(), f"{self._run}-{step}")
                self._asked.append((frozenset(), self._submit(lambda: load() or {})))
                return
        self._publish(step, self._save_opponent)

    def _save_opponent(self, folder: Path) -> None:
        opponent = self._opponent()
        if self._args.process_index == 0 or isinstance(opponent, ShardedCopy):
            opponent.save_pretrained(folder)

    def _copy(self, kept: Path, folder: Path) -> None:
        if self._args.process_index == 0:
            shutil.copytree(kept, folder)

    def follow(self, step: int) -> None:
        """After optimizer step number `step`: give the engine the opponent's weights if it is time."""
        if step % self._args.sync_opponent_steps == 0:
            self._publish_opponent(step)

    @property
    def ready(self) -> bool:
        """Whether the engine has weights of this run."""
        return self._step is not None

    def written_by(self, step: int) -> int:
        """The step of the opponent that writes what is asked for now."""
        return step if self._step is None else self._step

    def _publish(self, step: int, write: Callable[[Path], None]) -> None:
        started = time.perf_counter()
        folder = self._weights / f"{self._run}-opponent-{step}"
        if self._args.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            self._weights.mkdir(parents=True, exist_ok=True)
        write(folder)
        self._record("time/engine_weights", time.perf_counter() - started)
        self._load(step, folder)

    def _load(self, step: int, weights: Weights) -> None:
        earlier, self._held, self._step = self._held, weights, step

        def load() -> dict[tuple[int, int], GeneratedPairs]:
            if self._group is not None:
                # Nobody may still be writing with the weights that are about to go.
                dist.barrier(self._group)
            self.engine.load(weights, f"{self._run}-{step}")
            if isinstance(earlier, Path) and earlier != weights and self._args.process_index == 0:
                shutil.rmtree(earlier)
            return {}

        self._asked.append((frozenset(), self._submit(load)))

    # ---- Text ----

    def generate(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Continue each context once everything asked for before is done; see `Generator.generate`."""
        return self._submit(lambda: self.engine.generate(contexts, max_new_tokens, seeds)).result()

    def prefetch(self, source: SelfPlay, pending: Sequence[PendingBatch], step: int) -> None:
        """Ask for the pairs of `pending` micro-batches, and wait for those of `step`; they are put into the pool.

        Raises:
            GenerationError: what became of the engine.
        """
        ahead = self._args.lookahead_steps > 0
        new, by = source.unwritten(pending), self.written_by(step)
        # Looking ahead, each step is a task of its own, so that the next one has not to wait for all of them.
        steps = [frozenset({c.step}) for c in new] if ahead else [frozenset(c.step for c in new)]
        for part in dict.fromkeys(steps):
            own = [c for c in new if c.step in part]
            self._asked.append((part, self._submit(partial(source.write, self.engine, own, by))))
        started = time.perf_counter()
        while self._asked and (not ahead or self._asked[0][1].done() or self._awaits(step)):
            source.pool.update(self._asked.popleft()[1].result())
        self._record("time/engine_wait", time.perf_counter() - started)
        self._record("time/engine_busy", self._busy)
        self._record("engine/queue", sum(bool(part) for part, _ in self._asked))
        self._busy = 0.0

    def _awaits(self, step: int) -> bool:
        return any(step in part for part, _ in self._asked)

    # ---- The queue ----

    def drain(self, source: SelfPlay | None = None) -> None:
        """Wait until everything asked for is done; pairs go to the pool of `source`.

        Raises:
            GenerationError: what became of the engine.
        """
        if self._queue is not None:
            self._submit(lambda: None).result()
        while self._asked:
            written = self._asked.popleft()[1].result()
            if source is not None:
                source.pool.update(written)

    def save(self, folder: Path, step: int) -> None:
        """Add to a checkpoint the weights that the engine writes with, unless they are the opponent's own."""
        if self._held is None or self._step == step or self._args.process_index:
            return
        own = folder / FOLDER / f"opponent-{self._step}"
        if isinstance(self._held, Path):
            shutil.copytree(self._held, own)
        else:
            own.mkdir(parents=True)
            save_file(dict(self._held), own / STREAMED)

    def close(self) -> None:
        """Let go of the engine, and remove the weights on their way to it."""
        # First the engine, which ends what is under way if this is the end of a run that failed.
        self.engine.close()
        if self._queue is not None:
            self._queue.shutdown(cancel_futures=True)
        self._queue, self._step = None, None
        self._asked.clear()
        if isinstance(self._held, Path) and self._args.process_index == 0:
            shutil.rmtree(self._weights, ignore_errors=True)
        self._held = None

    def _submit(self, task: Callable[[], T]) -> Task[T]:
        if self._queue is None:
            turns = isinstance(self.engine, InProcessEngine)
            self._queue = _InlineExecutor() if turns else ThreadPoolExecutor(1, thread_name_prefix="engine")

        def timed() -> T:
            started = time.perf_counter()
            try:
                return task()
            finally:
                self._busy += time.perf_counter() - started

        return self._queue.submit(timed)
