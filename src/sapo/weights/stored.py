"""What the weight files of a model's folder say before they are read: which are used, and whether they are whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sapo.errors import ModelError, brief
from sapo.network import is_lfs_pointer
from sapo.weights.source import ModelSource, quantization_method

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = (_WHOLE, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for in a folder, in its order; the first that is there is used."""
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BASE_FILE = "base_weights.json"
"""Beside an adapter of a run: which weights its base model had."""
_SAMPLES, _SAMPLE = 1024, 1024
"""Number of places at which `stored_digest` reads, and bytes at each."""
_LARGEST_HEADER = 100_000_000
"""Bytes; as the reader of safetensors allows."""
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


def check_weights(source: ModelSource) -> None:
    """Refuse a local folder that lacks one of its weight files or holds a part of one, without reading the weights."""
    for adapter in (*source.merged, source.adapter):
        if adapter is None:
            continue
        file = next((Path(adapter) / name for name in _ADAPTER_WEIGHTS if _is_there(Path(adapter) / name)), None)
        if file is None:
            raise ModelError(f"{adapter}: lacks {_ADAPTER_WEIGHTS[0]}. Download or save the adapter again.")
        _check_whole(file)
    folder = Path(source.base)
    if not folder.is_dir():
        return
    used = weight_files(folder)
    for file in used:
        _check_whole(file)
    if not used and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise ModelError(f"{folder}: holds no weights (*.safetensors). Download the folder again.")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model's folder that transformers reads; none where they have other names."""
    used = next((folder / name for name in _WEIGHTS if _is_there(folder / name)), None)
    if used is None:
        return []
    return _of_index(used) if used.name.endswith(".index.json") else [used]


def stored_digest(model: str) -> str | None:
    """Hash of the weights in a folder of a model or adapter, or in a GGUF file, by samples of their bytes.

    It takes a few small reads, and sees that a model was trained or exchanged, not each single change.

    Args:
        model: folder, file or Hub id; of a Hub id there is none.
    """
    path = Path(model)
    if not model:
        return None  # made in memory
    try:
        files = [path] if path.is_file() else weight_files(path) if path.is_dir() else []
    except (ModelError, OSError):
        return None  # loading says what is wrong with it
    files = files or [path / name for name in _ADAPTER_WEIGHTS if (path / name).is_file()]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as content:
            for place in range(0, size, max(1, size * len(files) // _SAMPLES)):
                content.seek(place)
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()[:32]


def note_base(adapter: Path, digest: str | None) -> None:
    """Note beside an adapter that is saved what `stored_digest` its base model had when it was loaded."""
    if digest is not None:
        (adapter / BASE_FILE).write_text(json.dumps({"weights": digest}), encoding="utf-8")


def changed_base(adapter: Path, base: str) -> bool:
    """Whether the weights of a base model are others than an adapter was trained on; not where that was not noted."""
    if not (adapter / BASE_FILE).is_file():
        return False
    try:
        then = json.loads((adapter / BASE_FILE).read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{adapter / BASE_FILE}: cannot be read ({brief(error)}). Restore or remove it.") from error
    now = stored_digest(base)
    return now is not None and then != now


def two_models(folder: Path) -> str | None:
    """What to say of a folder that holds a model in one file and another in several; None of any other."""
    if not (folder / _WHOLE).is_file() or not (folder / _INDEX).is_file():
        return None
    try:
        shards = _of_index(folder / _INDEX)
    except ModelError:
        return None  # left over from a model in several files, which one file has replaced
    if folder / _WHOLE in shards:
        return None
    return (
        f"{folder}: holds a model in {_WHOLE} and another in {len(shards)} files of {_INDEX}. The first is used. "
        "Remove the one that is not meant."
    )


def _of_index(index: Path) -> list[Path]:
    """The weight files that an index names."""
    folder = index.parent
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: cannot be read ({brief(error, 200)}). Download the folder again.") from error
    outside = [name for name in named if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: names {outside[0]}, which is not a file of this folder. Do not use it.")
    missing = [name for name in named if not _is_there(folder / name)]
    if missing:
        raise ModelError(
            f"{folder}: lacks {missing[0]} ({len(missing)} of {len(named)} weight files are missing). Download the "
            "folder again."
        )
    return [folder / name for name in named]


def _is_there(file: Path) -> bool:
    """Whether there is such a file; a link to one that is gone is refused: it is not merely missing."""
    if file.is_symlink() and not file.exists():
        raise ModelError(
            f"{file}: a link to {file.readlink()}, which is not there. Download the folder again, or copy the file."
        )
    return file.is_file()


def _check_whole(file: Path) -> None:
    """Refuse a file of safetensors that was cut off or is none, and say which: loading tells neither of several."""
    if file.suffix != ".safetensors" or is_lfs_pointer(file):
        return
    size = file.stat().st_size
    try:
        expected = _end_of(file)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file}: not a file of safetensors, or damaged ({size} bytes). Download it again.") from None
    if size < expected:
        raise ModelError(f"{file}: cut off ({size} of {expected} bytes). Download or save it again.")


def _end_of(file: Path) -> int:
    """Bytes of a file of safetensors, by its header."""
    header, start = _header(file)
    ends = (about["data_offsets"][1] for name, about in header.items() if name != "__metadata__")
    return start + max(ends, default=0)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a file of safetensors says of its tensors, and the number of bytes before the first of them."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(min(length, _LARGEST_HEADER)))
    return header, 8 + length


def check_stored_types(source: ModelSource, config: Any) -> None:
    """Refuse codes of quantized weights, which would be taken for weights, where config.json does not say so."""
    if quantization_method(config) is not None or not Path(source.base).is_dir():
        return
    files = [file for ending in ("safetensors", "bin") for file in Path(source.base).glob(f"*.{ending}")]
    for file in sorted(files):
        types = _stored_types(file) if file.suffix == ".safetensors" else _pickled_types(file)
        scaled = any("scale" in name for name in types)
        for name, stored in types.items():
            if name.endswith(".weight") and (stored in _INTEGERS or (stored.startswith("F8") and scaled)):
                raise ModelError(
                    f"{file}: {name} is stored as {stored}, and config.json has no quantization_config: codes would be "
                    "taken for weights. Use the unquantized checkpoint, or the config.json that belongs to this one."
                )


def _stored_types(file: Path) -> dict[str, str]:
    """The type of each tensor in a file of safetensors, such as F32 or I8; nothing if it is damaged."""
    try:
        header, _ = _header(file)
    except (OSError, ValueError):
        return {}  # not one of those that are used, which are whole
    return {name: str(about["dtype"]) for name, about in header.items() if name != "__metadata__"}


def _pickled_types(file: Path) -> dict[str, str]:
    """The type of each tensor in a file of torch, by the names of safetensors; nothing if it has to be read for it."""
    import torch  # not needed by commands without weights

    try:
        found = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # noqa: BLE001 - whatever it is, loading says it
        return {}
    tensors = {name: one for name, one in found.items() if isinstance(one, torch.Tensor)} if type(found) is dict else {}
    letters = {torch.uint8: "U", torch.int8: "I", torch.int16: "I", torch.int32: "I", torch.int64: "I"}
    return {
        name: f"{letters[one.dtype]}{8 * one.element_size()}" if one.dtype in letters else str(one.dtype)
        for name, one in tensors.items()
    }
