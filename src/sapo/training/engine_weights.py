"""How the opponent's weights reach an engine: as a folder, over the network, or in memory."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sapo.config import SAPOConfig
from sapo.errors import CheckpointError
from sapo.generation.protocol import InProcessEngine, Weights
from sapo.runs.world import World
from sapo.training.engine_tasks import EngineTasks
from sapo.weights.roles import Roles

FOLDER = "engine"
"""In the run folder: weights on their way to the engine. In a checkpoint: those that it has, if not the opponent's."""

STREAMED = "model.safetensors"
"""In the latter, where weights were sent rather than handed over as a folder."""


class EngineWeights:
    """Publishes the opponent's weights to an engine, and knows which it has.

    Args:
        tasks: the engine's queue.
        args: `sync_opponent_steps`, `output_dir`, `vllm_weights_dir` and `vllm_weights_transfer`.
        roles: holds the opponent; of sharded weights all processes take part.
        world: the first process writes and sends.
        record: receives `time/engine_weights`.
    """

    def __init__(
        self, tasks: EngineTasks, args: SAPOConfig, roles: Roles, world: World, record: Callable[[str, float], None]
    ) -> None:
        self._tasks = tasks
        self._args = args
        self._roles = roles
        self._world = world
        self._record = record
        self._folder = _weights_folder(args)
        self._run = ""
        self._held: Weights | None = None
        self._group: Any = None
        self.step: int | None = None
        """Optimizer steps that the weights last published have followed; None before the first."""

    def opponent_step(self, step: int) -> int:
        """Optimizer steps that the opponent has followed which generates what is asked for now."""
        return step if self.step is None else self.step

    def begin(self, step: int, checkpoint: Path | None = None) -> None:
        """Publish the weights with which the engine is to generate at `step`; all processes take part.

        Args:
            step: optimizer steps that the opponent has followed.
            checkpoint: from which the run resumes, and which may hold the weights that the engine had.

        Raises:
            CheckpointError: it holds weights of a later step.
        """
        if not self._run:
            if self._world.first:
                # What a killed run has left there is of no use.
                shutil.rmtree(self._folder, ignore_errors=True)
            self._run = self._world.first_decides(secrets.token_hex(4))
            if self._world.size > 1:
                # Used by the queue's thread alone, so that it never mixes with what training communicates.
                self._group = dist.new_group(backend="gloo")
        kept = [] if checkpoint is None else sorted(checkpoint.glob(f"{FOLDER}/opponent-*"))
        if not kept:
            self.publish(step)
            return
        at = kept[-1].name.removeprefix("opponent-")
        if not at.isdigit() or int(at) > step:
            raise CheckpointError(f"{kept[-1]}: not weights of a step before {step}. Resume from another checkpoint.")
        if self._streams:
            self._load(int(at), load_file(kept[-1] / STREAMED) if self._world.first else {})
        else:
            self._publish_folder(int(at), lambda folder: self._copy(kept[-1], folder))

    @property
    def _streams(self) -> bool:
        return self._args.vllm_weights_transfer == "stream"

    def publish(self, step: int) -> None:
        """Give the engine the opponent's weights of now, which have followed `step` optimizer steps."""
        opponent, engine = self._roles.ready_opponent(), self._tasks.engine
        if self._streams:
            started = time.perf_counter()
            # As they compute where this process has them all; the opponent moves on before these are sent.
            sent = opponent.in_memory() or opponent.full()
            own = {name: weight.detach().to("cpu", copy=True) for name, weight in sent.items()}
            self._record("time/engine_weights", time.perf_counter() - started)
            self._load(step, own if self._world.first else {})
            return
        # Without a copy the engine must have generated with these before the opponent moves on.
        at_once = self._args.sync_opponent_steps == self._args.generation_interval == 1
        if isinstance(engine, InProcessEngine) and at_once:
            tensors = opponent.in_memory()
            # Experts have other names here than in files, and an engine knows those of files.
            if tensors is not None and not any(".experts." in name for name in tensors):
                self.step = step
                self._tasks.request((), partial(engine.load_tensors, tensors.items(), f"{self._run}-{step}"))
                return
        self._publish_folder(step, partial(self._roles.save_opponent, writes=self._world.first))

    def _copy(self, kept: Path, folder: Path) -> None:
        if self._world.first:
            shutil.copytree(kept, folder)

    def _publish_folder(self, step: int, write: Callable[[Path], None]) -> None:
        started = time.perf_counter()
        folder = self._folder / f"{self._run}-opponent-{step}"
        if self._world.first:
            shutil.rmtree(folder, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        self._record("time/engine_weights", time.perf_counter() - started)
        self._load(step, folder)

    def _load(self, step: int, weights: Weights) -> None:
        earlier, self._held, self.step = self._held, weights, step

        def load() -> None:
            if self._group is not None:
                # Nobody may still be generating with the weights that are about to go.
                dist.barrier(self._group)
            self._tasks.engine.load(weights, f"{self._run}-{step}")
            if isinstance(earlier, Path) and earlier != weights and self._world.first:
                shutil.rmtree(earlier)

        self._tasks.request((), load)

    def save(self, folder: Path, step: int) -> None:
        """Add to a checkpoint the weights with which the engine generates, unless they are the opponent's own."""
        if self._held is None or self.step == step or not self._world.first:
            return
        own = folder / FOLDER / f"opponent-{self.step}"
        if isinstance(self._held, Path):
            shutil.copytree(self._held, own)
        else:
            own.mkdir(parents=True)
            save_file(dict(self._held), own / STREAMED)

    def close(self) -> None:
        """Remove the weights on their way to the engine; it has none any more."""
        self.step = None
        if isinstance(self._held, Path) and self._world.first:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._held = None


def _weights_folder(args: SAPOConfig) -> Path:
    """Where this run, and no other, hands its weights over; the same after a restart."""
    output = Path(args.output_dir or "").absolute()
    if args.vllm_weights_dir is None:
        return output / FOLDER
    # A folder such as /dev/shm is everybody's, and stays.
    return Path(args.vllm_weights_dir).absolute() / f"{output.name}-{crc32(str(output).encode()):08x}"
