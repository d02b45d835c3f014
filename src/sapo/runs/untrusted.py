"""Read the files of transformers, torch and DeepSpeed in a checkpoint without executing code.

Three of their formats are pickles: torch's own files, the index of a distributed FSDP2 checkpoint, and DeepSpeed's
files. torch's are loaded with `weights_only`, also for DeepSpeed; the index is inspected before torch
reads it. So an untrusted checkpoint may be invalid, but it cannot execute code.
"""

from __future__ import annotations

import io
import os
import pickle  # only to inspect one, see `_Inspector`
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from sapo.errors import CheckpointError, brief

INDEX_FILE = ".metadata"
"""Index of a distributed FSDP2 checkpoint."""

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

_INDEX_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath"},
}
"""Plain record classes, without behaviour."""


class _Inspector(pickle.Unpickler):
    """Unpickles only the plain records of torch's index."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is one of these records; else an `UnpicklingError`."""
        if name in _INDEX_RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Context for reading a checkpoint: blocks unsafe pickles, and reports read errors in one line."""
    earlier = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_records()):
            yield
    except CheckpointError:
        raise
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{folder}: a part of it cannot be read ({type(error).__name__}: {brief(error)}). Resume from another "
            "checkpoint."
        ) from error
    finally:
        if earlier is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = earlier


_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
"""Exceptions that the libraries raise on invalid files."""


_STATE: dict[str, Any] = {
    "global_step": int,
    "epoch": int | float | None,
    "best_global_step": int | None,
    "best_metric": int | float | None,
    "best_model_checkpoint": str | None,
    "log_history": list,
    "stateful_callbacks": dict | list | None,
}
"""What Trainer goes on from, by name in its state, and of which type it is."""


def _deepspeed_records() -> list[Any]:
    """Plain record classes that DeepSpeed's files contain besides tensors."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def inspect(folder: Path) -> TrainerState:
    """Look for code, and for names outside the folder, before a library reads a checkpoint; return Trainer's state."""
    with reading(folder):
        for index in folder.rglob(INDEX_FILE):
            content = _Inspector(io.BytesIO(index.read_bytes())).load()
            for place in content.storage_data.values():
                _check_name(index, place.relative_path)
        latest = folder / "latest"
        if latest.is_file():
            # DeepSpeed opens the folder of this name.
            _check_name(latest, latest.read_text(encoding="utf-8").strip())
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        for name, kinds in _STATE.items():
            value = getattr(state, name)
            if not isinstance(value, kinds) or (name == "global_step" and value < 0):
                raise ValueError(f"{TRAINER_STATE_NAME}: {name} is {value!r}")
        return state


def _check_name(file: Path, name: str) -> None:
    if Path(name).name != name:
        raise CheckpointError(f"{file}: points to {name!r}, outside its folder. Do not use this checkpoint.")
