"""What a model's name stands for: a folder, an adapter on a base model, or a hub id; and why it cannot be loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sapo.errors import ModelError, brief

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where weights and tokenizer of a model come from.

    Attributes:
        name: as the user gave it.
        base: folder or hub id of the full model.
        adapter: folder of the adapter on it; None for a full model.
        revision: of `base`, where that is a hub id.
    """

    name: str
    base: str
    adapter: str | None
    revision: str

    @property
    def tokenizer(self) -> str:
        """Folder or hub id that holds the tokenizer: the adapter's folder may have one, with a template of its own."""
        own = self.adapter is not None and any((Path(self.adapter) / file).is_file() for file in TOKENIZER_FILES)
        return str(self.adapter) if own else self.base


def find_source(name: str, revision: str = "main") -> ModelSource:
    """Resolve a model folder, an adapter folder or a hub id.

    Args:
        name: as given by the user.
        revision: of a hub id.

    Raises:
        ModelError: no such folder, a folder without a model, or one with both a model and an adapter.
    """
    folder = Path(name)
    if not folder.is_dir():
        _refuse_missing_folder(name)
        return ModelSource(name, name, None, revision)
    model, adapter = (folder / CONFIG_FILE).is_file(), (folder / ADAPTER_FILE).is_file()
    if model and adapter:
        raise ModelError(
            f"{name}: holds both {CONFIG_FILE} and {ADAPTER_FILE}, so it is unclear whether the model or the adapter "
            f"is meant. Remove {ADAPTER_FILE} to use the model, or move the adapter to a folder of its own."
        )
    if model:
        return ModelSource(name, name, None, revision)
    if not adapter:
        raise ModelError(
            f"{name}: no {CONFIG_FILE} and no {ADAPTER_FILE} in this folder. Give a model or adapter folder."
        )
    content = read_adapter_config(folder)
    base = content.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder / ADAPTER_FILE}: base_model_name_or_path is missing. Name the adapter's base model.")
    try:
        found = find_source(base, str(content.get("revision") or revision))
    except ModelError as error:
        raise ModelError(f"{folder / ADAPTER_FILE} names the base model {error}") from error
    if found.adapter is not None:
        raise ModelError(f"{folder / ADAPTER_FILE}: the base model {base} is itself an adapter. Merge that one first.")
    return ModelSource(name, base, name, found.revision)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        ModelError: it cannot be read, or names a module to import.
    """
    file = folder / ADAPTER_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read ({brief(error, 200)}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: not a JSON object.")
    if content.get("megatron_config"):
        raise ModelError(f"{file}: megatron_config is not supported. Save the adapter without it.")
    return content


def check_weights(source: ModelSource) -> None:
    """Find out whether a local folder holds all its weight files, without reading them.

    Raises:
        ModelError: names the file that is missing.
    """
    folder = Path(source.base)
    if not folder.is_dir():
        return
    for index in (folder / name for name in _INDEX_FILES):
        if not index.is_file():
            continue
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: cannot be read ({brief(error, 200)}). Download the folder again.") from error
        outside = [name for name in named if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise ModelError(f"{index}: names {outside[0]}, which is not a file of this folder. Do not use it.")
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: lacks {missing[0]} ({len(missing)} of {len(named)} weight files are missing). Download the "
                "folder again."
            )
        return
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise ModelError(f"{folder}: holds no weights (*.safetensors). Download the folder again.")


def quantization_method(config: Any) -> str | None:
    """How the stored weights are quantized, such as fp8, gptq, awq, bitsandbytes; None if they are not."""
    for part in (config, config.get_text_config()):
        given = getattr(part, "quantization_config", None)
        if given:
            method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
            return str(getattr(method, "value", method))
    return None


def loading_error(what: str, source: ModelSource, error: BaseException) -> ModelError:
    """One line for what a library raised while it loaded the `what` ("model", "tokenizer") of a source."""
    name = source.name if source.adapter is None else f"{source.base}, the base of {source.name}"
    reason = brief(error, 200)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{name}: the {what} needs code of its own (auto_map), and code from a model is never run. Use a model "
            "that transformers has by itself; one whose code you trust can be loaded in Python and passed as an object."
        )
    if isinstance(error, ImportError) or Path(source.base).is_dir():
        advice = "" if isinstance(error, (ImportError, TypeError)) else " Check that the folder is complete."
        return ModelError(f"{name}: the {what} cannot be loaded ({reason}).{advice}")
    causes = tuple(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return ModelError(f"{name}: gated on the hub. Accept its terms there, then log in with `hf auth login`.")
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return ModelError(f"{name}: has no revision {source.revision} on the hub. Check model_revision.")
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return ModelError(
            f"{name}: no such folder, and no such model on the hub. Check the name; if it is private, log in with "
            "`hf auth login`."
        )
    if any(isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)) for cause in causes):
        return ModelError(
            f"{name}: no such folder, not in the hub's cache on this machine, and the hub cannot be reached "
            f"({brief(causes[-1], 100)}). Give a local folder, or connect this machine."
        )
    if any(isinstance(cause, EntryNotFoundError) for cause in causes):
        return ModelError(f"{name}: the {what} is incomplete on the hub ({reason}). An adapter must be a local folder.")
    return ModelError(f"{name}: the {what} cannot be loaded ({reason}).")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _refuse_missing_folder(name: str) -> None:
    """Say at once that a folder is missing, before the hub is asked, which retries for most of a minute."""
    if "/" not in name:
        raise ModelError(
            f"{name}: no such model folder here. A model of the hub is named with its owner, such as "
            "openai-community/gpt2."
        )
    folder = Path(name)
    is_path = (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or folder.parent.is_dir()
        or re.fullmatch(r"(checkpoint|round)-\d+", folder.name) is not None
    )
    if is_path:
        raise ModelError(f"{name}: no such model folder. Check the path.")
