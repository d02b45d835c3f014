"""Saving the models of a run, each as a model folder: complete, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sapo.errors import CheckpointError, SapoError, brief, process_lost
from sapo.runs.folder import STAGING, readable, replace_folder, writing
from sapo.runs.layout import OPPONENT_FOLDER
from sapo.runs.tensors import write_tensors
from sapo.runs.world import World
from sapo.training.context import RunContext
from sapo.weights.opponent import policy_tensors

_RESCUED = "rescued_weights"
"""Of a policy that transformers would not save: its weights alone."""


def save_policy(context: RunContext, folder: Path) -> None:
    """Write the policy (with LoRA its adapter alone) and the tokenizer; no pickled arguments.

    All processes take part, the first writes.
    """
    context.roles.save_policy(folder, writes=context.world.first)
    if context.world.first:
        context.tokenizer.save_pretrained(folder)
        readable(*folder.iterdir())


def save_models(context: RunContext, folder: Path) -> None:
    """Write policy and tokenizer into `folder`, then the opponent into `folder`/opponent, each a model folder.

    All processes take part. One that fails does not keep the other from being written.

    Raises:
        CheckpointError: what could not be written, and where its weights are.
    """
    world, errors = context.world, list[SapoError]()
    try:
        with _staged(world, folder) as staging:
            save_policy(context, staging)
            world.barrier()
            if world.first:
                for file in staging.iterdir():
                    file.replace(folder / file.name)
    except CheckpointError as error:
        errors.append(error)
    except Exception as error:
        if process_lost(error) is not None:
            raise
        # Whatever it is, the weights are worth more.
        errors.append(_rescued(context, folder, error))
    try:
        if context.roles.opponent is not None:
            with _staged(world, folder / OPPONENT_FOLDER, staging=folder / STAGING) as staging:
                context.roles.save_opponent(staging, writes=world.first)
                if world.first:
                    context.tokenizer.save_pretrained(staging)
                    readable(*staging.iterdir())
                    replace_folder(staging, folder / OPPONENT_FOLDER)
    except CheckpointError as error:
        errors.append(error)
    except Exception as error:
        if process_lost(error) is not None:
            raise
        errors.append(CheckpointError(f"the opponent cannot be saved ({type(error).__name__}: {brief(error)})."))
    world.barrier()
    if errors:
        raise CheckpointError(" ".join(map(str, errors))) from errors[0]


@contextmanager
def _staged(world: World, target: Path, staging: Path | None = None) -> Iterator[Path]:
    """An empty folder to write `target` in, removed at the end; all processes take part."""
    staging = staging or target / STAGING
    if world.first:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    world.barrier()
    try:
        with writing(target, staging if world.first else None):
            yield staging
    finally:
        if world.first:
            shutil.rmtree(staging, ignore_errors=True)


def _rescued(context: RunContext, folder: Path, error: Exception) -> CheckpointError:
    """Write the weights of a policy that cannot be saved as a model; the error that says where they are."""
    said = f"the policy cannot be saved as a model ({type(error).__name__}: {brief(error)})"
    if context.roles.sharded:
        return CheckpointError(f"{said}. Continue from the newest checkpoint in {folder}, if there is one.")
    if context.world.first:
        with writing(folder / f"{_RESCUED}.safetensors", folder / STAGING):
            write_tensors(folder, _RESCUED, policy_tensors(context.roles.policy()))
            readable(folder / f"{_RESCUED}.safetensors")
    return CheckpointError(
        f"{said}; its weights are in {folder / _RESCUED}.safetensors, by the names of the model's parameters."
    )
