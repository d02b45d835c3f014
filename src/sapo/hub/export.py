"""Make a run's model an ordinary model folder: LoRA merged, one data type, complete configurations, checked."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from sapo.data.encoding import eos_token_ids
from sapo.errors import ConfigurationError, ModelError, brief
from sapo.hub.self_check import Agreement, Reply, agreement, allowed_difference, greedy_replies, prompts
from sapo.runs.files import read_object, write_atomically
from sapo.runs.folder import readable, replace_folder
from sapo.runs.layout import LOCK_FILE, OPPONENT_FOLDER, STATE_FILE
from sapo.runs.lock import locked
from sapo.runs.origin import package_versions
from sapo.runs.reading import is_run, recipe_option, start_of
from sapo.runs.tensors import read_tensors
from sapo.weights.description import load_tokenizer, read_config
from sapo.weights.loading import load_frozen
from sapo.weights.opponent import policy_tensors
from sapo.weights.policy import repair_generation_config
from sapo.weights.rounding import rounded
from sapo.weights.source import find_source, holds_model, quantization_method
from sapo.weights.starts import merge_adapter

EXPORT_FILE = "sapo_export.json"
"""In an exported folder: what it was made from, and its files."""
_FILES = "files"


@dataclass(frozen=True, slots=True)
class Origin:
    """What is exported.

    Attributes:
        model: folder, GGUF file or Hub id to load.
        which: policy, opponent or start.
        revision: of a Hub id.
        opponent_of: checkpoint folder whose opponent replaces the weights of `model`; None if `model` has them.
        start: model that the run started from; None where there is no run, or it does not say.
        note: what the user should know about the weights; or an empty string.
    """

    model: str
    which: str
    revision: str = "main"
    opponent_of: Path | None = None
    start: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Exported:
    """A model folder that was written and checked.

    Attributes:
        folder: where it lies.
        what: what it was made from, in words.
        dtype: of its weights.
        repaired: what was changed in the generation configuration; None for nothing.
        agreement: with the model it was made from.
        replies: of the model it was made from.
        tokenizer: of the model.
        eos_ids: tokens that end a reply.
    """

    folder: Path
    what: str
    dtype: torch.dtype
    repaired: str | None
    agreement: Agreement
    replies: list[Reply]
    tokenizer: Any
    eos_ids: frozenset[int]


def find_origin(target: str, which: str, revision: str = "main") -> Origin:
    """What `which` of a run, of a checkpoint, or of a model on its own stands for; refuses what is not there."""
    folder = Path(target)
    checkpoint = (folder / STATE_FILE).is_file()
    if not checkpoint and not is_run(folder):
        if which != "policy":
            raise ConfigurationError(f"--which {which}: {target} is a model and not a run. Leave --which out.")
        return Origin(target, "policy", revision)
    run = folder.parent if checkpoint else folder
    start = start_of(run)
    if which == "start":
        if start is None:
            raise ConfigurationError(f"--which start: {run} does not say what it started from.")
        return Origin(start, which, recipe_option(run, "model_revision") or "main", start=start)
    if not holds_model(folder):
        raise ConfigurationError(
            f"{target}: this run has not saved its policy yet. Export one of its checkpoint-N folders."
        )
    quantized = next((name for name in ("load_in_4bit", "load_in_8bit") if recipe_option(run, name) == "True"), None)
    note = "" if quantized is None else f"The run used {quantized}; the adapter is merged into the unquantized base."
    if which == "policy":
        return Origin(target, which, start=start, note=note)
    if checkpoint:
        if not (folder / "opponent.safetensors").is_file():
            raise ConfigurationError(f"--which opponent: {target} holds no opponent.")
        return Origin(target, which, opponent_of=folder, start=start, note=note)
    if not (folder / OPPONENT_FOLDER).is_dir():
        raise ConfigurationError(f"--which opponent: {target} has no opponent (pair_source or objective needs none).")
    return Origin(str(folder / OPPONENT_FOLDER), which, start=start, note=note)


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out` when the block ends; after an error nothing of it is left.

    Raises:
        ConfigurationError: `out` is not empty, and no earlier export, or one that may not be overwritten, or that holds
            files of somebody else; or another process exports to it.
        ModelError: it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"{out} is a file. Name a folder to create.")
    if is_run(out.absolute().parent) and re.fullmatch(r"checkpoint-\d+|opponent", out.name) and not out.exists():
        raise ConfigurationError(f"{out} would be taken for a part of the run beside it. Name another folder.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / EXPORT_FILE).is_file():
            raise ConfigurationError(f"{out} is not empty, and not an earlier export. Name another folder.")
        if not overwrite:
            raise ConfigurationError(f"{out} exists already. Name another folder, or add --overwrite.")
        _refuse_foreign_files(out)
    # Behind a link is what is replaced, not the link.
    place = out.resolve()
    absent = [folder for folder in place.parents if not folder.exists()]
    staging = place.with_name(f".{place.name}.exporting")
    try:
        with locked(staging):
            _clear(staging)
            try:
                (staging / place.name).mkdir()
                yield staging / place.name
                _list_files(staging / place.name)
                replace_folder(staging / place.name, place)
            finally:
                _clear(staging)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{out} cannot be written ({brief(error, 200)}). Nothing of it is left.") from error
    finally:
        for folder in (staging, *absent):
            # Not if it holds the export, or another process has begun one.
            with suppress(OSError):
                folder.rmdir()


def _clear(staging: Path) -> None:
    """Remove all but the lock: what this export has written, or one that was killed."""
    for left in staging.iterdir():
        if left.name != LOCK_FILE:
            shutil.rmtree(left, ignore_errors=True)


def _list_files(folder: Path) -> None:
    facts = read_object(folder / EXPORT_FILE) | {_FILES: _files(folder)}
    write_atomically(folder / EXPORT_FILE, json.dumps(facts, indent=1))


def _refuse_foreign_files(out: Path) -> None:
    """Refuse to replace an export to which something was added since."""
    foreign = sorted(set(_files(out)) - {EXPORT_FILE, *read_object(out / EXPORT_FILE).get(_FILES, [])})
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ConfigurationError(
            f"{out} holds {foreign[0]}{more}, not written by the earlier export, and --overwrite removes it. Move it "
            "away, or name another folder."
        )


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())


def export_model(origin: Origin, folder: Path, *, dtype: str = "auto", device: str | None = None) -> Exported:
    """Write a model folder, load it again, and compare.

    Args:
        origin: what to export.
        folder: empty.
        dtype: of the weights; "auto" as the model, or the base model of an adapter, is stored.
        device: to compute on; unset, the accelerator if there is one.

    Raises:
        ModelError: the model cannot be loaded or merged, or the written folder does not agree with it.
    """
    source = find_source(origin.model, origin.revision)
    config = read_config(origin.model, origin.revision)
    method = quantization_method(config)
    if method is not None:
        adapter = source.adapter is not None
        raise ModelError(
            f"{origin.model}: {'its base is' if adapter else 'its weights are'} stored quantized ({method}) and cannot "
            "be merged or cast. "
            + (
                "Serve the adapter beside its base (vllm serve BASE --enable-lora)."
                if adapter
                else "Serve it as it is."
            )
        )
    stored = config.dtype or torch.float32
    wanted: torch.dtype = stored if dtype == "auto" else getattr(torch, dtype)
    tokenizer = load_tokenizer(origin.model, origin.revision)
    model = load_frozen(origin.model, revision=origin.revision, dtype="float32", device=device)
    if origin.opponent_of is not None:
        _take_opponent(model, origin.opponent_of)
    eos_ids = eos_token_ids(tokenizer, model.generation_config.eos_token_id)
    rendered = prompts(tokenizer)
    replies = greedy_replies(model, tokenizer, rendered, eos_ids)
    what = f"{origin.which} of {origin.model}" if origin.start is not None else origin.model
    if isinstance(model, PeftModel):
        what += f": LoRA adapter merged into {source.base} in float32"
        model = merge_adapter(model)
    elif source.is_gguf:
        what += ": dequantized"
    repaired = _complete(model, origin, tokenizer, eos_ids)
    for weight in model.parameters():
        weight.data = rounded(weight.data, wanted)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    readable(*folder.glob("*.safetensors"))
    facts = {"which": origin.which, "model": origin.model, "dtype": str(wanted), "packages": package_versions()}
    write_atomically(folder / EXPORT_FILE, json.dumps(facts, indent=1))
    del model
    agreed = agreement(
        load_frozen(str(folder), device=device),
        load_tokenizer(str(folder)),
        replies,
        eos_ids,
        allowed=allowed_difference(wanted),
    )
    if prompts(load_tokenizer(str(folder))) != rendered:
        raise ModelError(f"{origin.model}: the written tokenizer gives other tokens than the run's. Nothing is left.")
    if not agreed.holds:
        raise ModelError(
            f"{origin.model}: the written folder does not agree with it: {agreed.line()}. Nothing is left."
        )
    return Exported(folder, what, wanted, repaired, agreed, replies, tokenizer, eos_ids)


def _take_opponent(model: Any, checkpoint: Path) -> None:
    own, kept = policy_tensors(model), read_tensors(checkpoint, "opponent")
    if own.keys() != kept.keys():
        raise ModelError(f"{checkpoint}: its opponent does not have the weights of its policy. Export --which policy.")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(kept[name])


def _complete(model: Any, origin: Origin, tokenizer: Any, eos_ids: frozenset[int]) -> str | None:
    """Fill in what the configurations lack; what was repaired."""
    use_cache = True
    if origin.start is not None and origin.which != "start" and Path(origin.start).exists():
        # Runs of version 0.1 and before saved what Trainer had switched off.
        use_cache = bool(read_config(origin.start).to_dict().get("use_cache", True))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = use_cache
    model.config.name_or_path = ""
    repaired = repair_generation_config(model)
    ends = sorted(eos_ids)
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    for name in ("pad_token_id", "bos_token_id"):
        if getattr(model.generation_config, name) is None and getattr(tokenizer, name) is not None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
    return repaired
