"""Tensors of a run as safetensors, one file for each part of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sapo.errors import CheckpointError


def write_tensors(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Write `part`.safetensors."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / f"{part}.safetensors",
    )


def read_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """Read `part`.safetensors; a `CheckpointError` if it is missing or damaged."""
    file = folder / f"{part}.safetensors"
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: lacks {file.name}. Resume from another checkpoint, or with its original options."
        ) from None
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged ({error}). Resume from another checkpoint.") from error
