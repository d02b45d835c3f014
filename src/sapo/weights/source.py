"""What a model's name stands for: a folder, a GGUF file, an adapter, or a Hub id; and why it cannot be loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)

from sapo.errors import ModelError, brief, pip_line, require
from sapo.network import hub_fault, hub_or_cache, is_lfs_pointer

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
GENERATION_FILE = "generation_config.json"
_WITHOUT_WEIGHTS_OF_THE_MODEL = (
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING",
)  # fmt: skip
"""Types of adapters that lengthen the input and change no weight: neither merged, nor passed over one by one."""
_OF_A_MODEL = (".safetensors", ".bin", ".json", ".model", ".gguf")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", "*.model",
)  # fmt: skip
"""Files of a tokenizer."""
_GGUF = ".gguf"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where weights and tokenizer of a model come from.

    Attributes:
        name: as the user gave it.
        base: folder, GGUF file or Hub id of the full model.
        adapter: folder of the adapter on it; None for a full model.
        revision: of `base`, where that is a Hub id.
        merged: folders of adapters that are merged into the base before `adapter` is put on it, in this order.
    """

    name: str
    base: str
    adapter: str | None
    revision: str
    merged: tuple[str, ...] = ()

    @property
    def is_gguf(self) -> bool:
        """Whether the base is a GGUF file."""
        return self.base.endswith(_GGUF) and Path(self.base).is_file()

    @property
    def base_path(self) -> str:
        """What `from_pretrained` is given for the base; of a GGUF file its folder."""
        return str(Path(self.base).parent) if self.is_gguf else self.base

    @property
    def base_options(self) -> dict[str, Any]:
        """What `from_pretrained` is given besides `base_path`: the revision, and the name of a GGUF file."""
        return {"revision": self.revision} | ({"gguf_file": Path(self.base).name} if self.is_gguf else {})

    @property
    def tokenizer_folder(self) -> str | None:
        """The adapter's folder that holds a tokenizer, perhaps with a template of its own; None if the base has it."""
        for folder in (self.adapter, *reversed(self.merged)):
            if folder is not None and any((Path(folder) / file).is_file() for file in TOKENIZER_FILES):
                return folder
        return None

    def with_adapter_merged(self) -> ModelSource:
        """The same model with its adapter, if it has one, merged into the base."""
        return self if self.adapter is None else replace(self, adapter=None, merged=(*self.merged, self.adapter))


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, complete or not."""
    return (folder / CONFIG_FILE).is_file() or (folder / ADAPTER_FILE).is_file()


def find_source(name: str, revision: str = "main") -> ModelSource:
    """Resolve a model folder, a GGUF file, an adapter folder or a Hub id, without asking the hub.

    Raises:
        ModelError: no such folder, a folder without a model, one with both a model and an adapter, or a revision of
            what is on this machine.
    """
    found = _found(name, revision)
    if revision != "main" and Path(name).exists() and Path(found.base).exists():
        raise ModelError(
            f"{name}: is on this machine and has no revision {brief(revision, 80)}. Leave the revision out, or name a "
            "model of the hub."
        )
    return found


def _found(name: str, revision: str) -> ModelSource:
    folder = Path(name)
    if folder.is_file() and folder.suffix == _GGUF:
        return _gguf_source(name, folder)
    if not folder.is_dir():
        _refuse_missing_folder(name)
        cached = _cached_adapter(name, revision)
        return ModelSource(name, name, None, revision) if cached is None else _adapter_source(name, cached, "main")
    model, adapter = (folder / CONFIG_FILE).is_file(), (folder / ADAPTER_FILE).is_file()
    if not adapter and (file := _only_gguf(folder)) is not None:
        return _gguf_source(name, file)
    if model and adapter:
        raise ModelError(
            f"{name}: holds both {CONFIG_FILE} and {ADAPTER_FILE}, so it is unclear whether the model or the adapter "
            f"is meant. Remove {ADAPTER_FILE} to use the model, or move the adapter to a folder of its own."
        )
    if model:
        return ModelSource(name, name, None, "main")
    if not adapter:
        raise ModelError(
            f"{name}: no {CONFIG_FILE} and no {ADAPTER_FILE} in this folder. Give a model or adapter folder."
        )
    return _adapter_source(name, folder, revision)


def _adapter_source(name: str, folder: Path, revision: str) -> ModelSource:
    """The adapter in `folder` on its base model; a base that is an adapter itself is merged into its own base."""
    content = read_adapter_config(folder)
    _check_kind(folder, content)
    base = content.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder / ADAPTER_FILE}: base_model_name_or_path is missing. Name the adapter's base model.")
    if Path(base).is_dir() and Path(base).resolve() == folder.resolve():
        raise ModelError(f"{folder / ADAPTER_FILE}: names itself as the base model. Name the adapter's base model.")
    try:
        found = _found(base, str(content.get("revision") or revision)).with_adapter_merged()
    except ModelError as error:
        raise ModelError(f"{folder / ADAPTER_FILE} names the base model {error}") from error
    except RecursionError as error:
        raise ModelError(f"{folder / ADAPTER_FILE}: the base models name each other. Name a full model.") from error
    return replace(found, name=name, adapter=str(folder))


def _check_kind(folder: Path, content: Mapping[str, Any]) -> None:
    kind, task = content.get("peft_type"), content.get("task_type")
    if kind in _WITHOUT_WEIGHTS_OF_THE_MODEL:
        raise ModelError(
            f"{folder}: an adapter of type {kind}, which lengthens the input and changes no weights of the model, is "
            "not supported. Use a LoRA adapter, or the base model."
        )
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(
            f"{folder / ADAPTER_FILE}: task_type is {task}, so the adapter is not one of a model that generates text. "
            "Use an adapter with task_type CAUSAL_LM, or the base model."
        )


def _gguf_source(name: str, file: Path) -> ModelSource:
    require(str(file), "gguf", error=ModelError)
    if re.search(r"-\d{5}-of-\d{5}$", file.stem):
        raise ModelError(f"{file}: one part of a split file. Join the parts with llama-gguf-split --merge.")
    return ModelSource(name, str(file), None, "main")


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no other weights; None if there is none; several are refused."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    files = [name for name in names if name.endswith(_GGUF) and not name.startswith("mmproj")]
    if not files or any(name.endswith((".safetensors", ".bin")) for name in names):
        return None
    if len(files) > 1:
        raise ModelError(f"{folder}: holds {len(files)} GGUF files. Name one of them, such as {folder / files[0]}.")
    return folder / files[0]


def _cached_adapter(name: str, revision: str) -> Path | None:
    """Where the hub's cache holds the adapter of this name; None if it is a model, or not there."""
    try:
        model = try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
        adapter = try_to_load_from_cache(name, ADAPTER_FILE, revision=revision)
    except HFValidationError:
        # transformers says in its own words what is wrong with the name.
        return None
    return Path(adapter).parent if isinstance(adapter, str) and not isinstance(model, str) else None


def download_adapter(name: str, revision: str) -> bool:
    """Put an adapter of the hub into the hub's cache, where `find_source` sees it; whether there is one."""
    try:
        with hub_or_cache(name):
            folder = snapshot_download(
                name, revision=revision, allow_patterns=[ADAPTER_FILE, "adapter_model.*", *TOKENIZER_PATTERNS]
            )
    except (HfHubHTTPError, OSError) as error:
        raise loading_error("adapter", ModelSource(name, name, None, revision), error) from error
    return (Path(folder) / ADAPTER_FILE).is_file()


def not_in_repository(error: BaseException) -> bool:
    """Whether the hub answered that a repository lacks a file, and not that it could not be asked."""
    causes = tuple(_causes(error))
    missing = any(isinstance(cause, EntryNotFoundError) for cause in causes)
    return missing and not any(isinstance(cause, LocalEntryNotFoundError) for cause in causes)


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


def other_base(stored: Mapping[str, Any], base: str) -> str | None:
    """The base model that an adapter was trained on, if it is not the one that it is put on; None if it seems to be.

    Args:
        stored: its adapter_config.json.
        base: folder or Hub id of the model that it is put on.
    """
    named = str(stored.get("base_model_name_or_path") or "")
    if not named or not base:
        return None
    mine, theirs = Path(base).expanduser(), Path(named).expanduser()
    if mine.exists() and theirs.exists():
        return None if mine.resolve() == theirs.resolve() else named
    # One of them is on the Hub, or was moved: the last part of the name stays, also in a folder of the Hub's cache.
    kept = {part.lower() for part in (*mine.parts, *(part.rpartition("--")[2] for part in mine.parts))}
    found = {part.lower() for part in (*theirs.parts, *(part.rpartition("--")[2] for part in theirs.parts))}
    return None if mine.name.lower() in found or theirs.name.lower() in kept else named


def quantization_method(config: Any) -> str | None:
    """How the stored weights are quantized, such as fp8, gptq, awq, bitsandbytes; None if they are not."""
    for part in (config, config.get_text_config()):
        given = getattr(part, "quantization_config", None)
        if given:
            method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
            return "by an unnamed method" if method is None else str(getattr(method, "value", method))
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
    if "attn_implementation" in str(error) and "not supported" in str(error):
        return ModelError(f"{name}: attn_implementation is none that transformers has ({reason}). Use sdpa or eager.")
    if what == "model" and "unexpected keyword argument" in str(error):
        return ModelError(f"{name}: model_init_kwargs or {CONFIG_FILE} has what the model does not take ({reason}).")
    pointer = _pointer_in(source)
    if pointer is not None:
        return ModelError(
            f"{pointer}: not the file itself, but a pointer of Git LFS to it. Run `git lfs pull` in the folder, or "
            "download the model with `hf download`."
        )
    of_shapes = CONFIG_FILE if what == "model" else ADAPTER_FILE
    if "ignore_mismatched_sizes" in str(error) or "size mismatch" in str(error):
        return ModelError(
            f"{name}: the weights have other shapes than {of_shapes} says. Use the {of_shapes} that belongs to them."
        )
    if what == "adapter" and "missing adapter keys" in str(error):
        return ModelError(
            f"{name}: lacks weights that {ADAPTER_FILE} asks for ({reason}). Use the {ADAPTER_FILE} that belongs to "
            "the weights, or save the adapter again."
        )
    if "weights only load failed" in str(error).lower():
        return ModelError(
            f"{name}: a file of torch (.bin) that holds more than weights. Loading it could run code, so it is never "
            "loaded. Use a checkpoint in safetensors."
        )
    if source.is_gguf:
        return ModelError(
            f"{name}: the {what} cannot be read from this GGUF file ({reason}). Start from the model that it was "
            "converted from."
        )
    if isinstance(error, ImportError) or Path(source.base).is_dir():
        if isinstance(error, KeyError):
            reason = f"transformers knows no {reason}"
        if isinstance(error, ImportError) or (isinstance(error, TypeError) and _install(error)):
            advice = _install(error)
        elif isinstance(error, (StrictDataclassError, KeyError, AttributeError, TypeError, AssertionError)):
            advice = " Check the files that describe it." if what == "tokenizer" else f" Correct {of_shapes}."
        else:
            advice = " Check that the folder is complete."
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
            f"({hub_fault() or brief(causes[-1], 100)}). Give a local folder, or connect this machine."
        )
    if any(isinstance(cause, EntryNotFoundError) for cause in causes):
        return ModelError(f"{name}: the {what} is incomplete on the hub ({reason}).")
    return ModelError(f"{name}: the {what} cannot be loaded ({reason}).")


_PACKAGES = {
    "flash": "pip install flash-attn, or leave attn_implementation out",
    **{name: pip_line(name) for name in ("bitsandbytes", "gguf", "sentencepiece", "tiktoken")},
}


def _install(error: BaseException) -> str:
    """How to install the package that a library misses."""
    said = str(error).lower()
    found = next((line for name, line in _PACKAGES.items() if name in said), "")
    if not found and isinstance(error, ModuleNotFoundError) and error.name:
        found = pip_line(error.name.partition(".")[0])
    return f" Run: {found}" if found else ""


def _pointer_in(source: ModelSource) -> Path | None:
    """A file of a local model or adapter that Git LFS has not downloaded."""
    for folder in (source.base_path, source.adapter, *source.merged):
        for file in sorted(Path(folder).iterdir()) if folder is not None and Path(folder).is_dir() else ():
            if file.suffix in _OF_A_MODEL and file.is_file() and is_lfs_pointer(file):
                return file
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _refuse_missing_folder(name: str) -> None:
    """Say at once that a folder is missing, before the hub is asked."""
    if Path(name).is_file():
        raise ModelError(f"{name}: is a file. Give the folder of a model or adapter, or a GGUF file.")
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


def trained_rows(stored: Mapping[str, Any]) -> int:
    """Embeddings that an adapter needs by its configuration: 1 + the largest token that it trains; 0 for none."""
    indices = stored.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return max((int(token) + 1 for tokens in lists for token in tokens), default=0)
