"""Whether all processes of a run train the same run, asked before its first step."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sapo.errors import ConfigurationError, brief
from sapo.runs.lock import owner_of
from sapo.training.context import RunContext

_OWN = ("output_dir", "logging_dir", "run_name", "local_rank", "_n_gpu", "hub_model_id", "resume_from_checkpoint")
"""Options that each process may have for itself; the folder is compared by what is in it."""
_WEIGHTS = 16
"""Numbers of each weight that are compared."""
_VISIBLE_WITHIN = 60.0
"""Seconds until a file that the first process has written must be visible to the others."""


def check_processes(context: RunContext, folder: Path, rows: Any, digest: str) -> None:
    """Refuse a run whose processes have other options, rows or weights, or do not see one folder.

    Without this they would wait for each other at the first step that only one of them takes, or train to a mixture
    without a word. All processes take part, and all raise the same.

    Args:
        context: of the run.
        folder: of the run, whose lock the first process holds.
        rows: prepared training rows.
        digest: of their content.

    Raises:
        ConfigurationError: names what differs, with the values of two processes.
    """
    world = context.world
    if world.size == 1:
        return
    own = described(context.args.to_dict()) | {
        "training rows": f"{len(rows)} rows, {digest[:12]}",
        "weights": _weights_digest(context.roles.policy()),
    }
    found = world.gather(own)
    said = different(found)
    owner = world.first_decides(owner_of(folder) if world.first else {})
    seen = world.gather(world.first or _is_seen(folder, owner, asked=not said))
    if said:
        raise ConfigurationError(f"{said}. Start all processes with the same command, recipe, data and model.")
    if not all(seen):
        raise ConfigurationError(
            f"output_dir={folder}: process {seen.index(False)} does not see what process 0 has written there. Name a "
            "folder that all processes share: each writes its own part of a checkpoint."
        )


def described(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as text, without those that each process may have for itself."""
    return {name: json.dumps(value, default=str, sort_keys=True) for name, value in options.items() if name not in _OWN}


def different(found: Sequence[Mapping[str, str]]) -> str:
    """The first process that differs from process 0, and in what; empty if none does."""
    for process, other in enumerate(found):
        names = [name for name in {**found[0], **other} if found[0].get(name) != other.get(name)]
        if names:
            values = (f"{name}: {brief(found[0].get(name), 80)} and {brief(other.get(name), 80)}" for name in names)
            return f"process 0 and process {process} differ in {', '.join(values)}"
    return ""


def _is_seen(folder: Path, owner: Mapping[str, Any], *, asked: bool) -> bool:
    """Whether `folder` is the one in which the first process has its lock; a network may be late to show it."""
    until = time.monotonic() + _VISIBLE_WITHIN
    while asked and owner_of(folder) != owner:
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _weights_digest(policy: Any) -> str:
    """Of the first numbers of each weight; ZeRO-3 has spread them already, from the first process."""
    parts = [
        weight.detach().flatten()[:_WEIGHTS].float()
        for weight in policy.parameters()
        if not hasattr(weight, "ds_tensor") and weight.is_floating_point()
    ]
    numbers = torch.cat(parts).cpu().numpy().tobytes() if parts else b""
    return hashlib.blake2b(numbers, digest_size=6).hexdigest()
