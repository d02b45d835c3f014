"""Models to evaluate: folders, Hub ids, adapters, and the policy and the opponent of a run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sapo.data.chat_template import use_chat_template
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions
from sapo.errors import ModelError, TokenizerError
from sapo.runs.files import file_digest, folder_digest
from sapo.runs.layout import OPPONENT_FOLDER
from sapo.runs.reading import is_run, start_of
from sapo.weights.description import load_template_tokenizer, load_tokenizer, positions_of, read_config
from sapo.weights.embeddings import embedding_rows, fit_model, known_tokens
from sapo.weights.loading import load_frozen
from sapo.weights.policy import padding_token_id
from sapo.weights.source import ADAPTER_FILE, find_source, read_adapter_config

logger = logging.get_logger(__name__)

_MODEL_FILES = ("*.safetensors", "*.bin", "*.model", "*.jinja", "*.json", "*.gguf")
_OTHER_FILES = ("trainer_state.json",)


@dataclass(frozen=True, slots=True)
class Target:
    """One model to evaluate.

    Attributes:
        name: name in tables, unique within a command.
        path: folder or Hub id of the model or adapter.
        role: "model", or in a run "policy", "opponent" or "start".
        base: folder or Hub id of an adapter's base model.
        run: the run folder it belongs to.
    """

    name: str
    path: str
    role: str = "model"
    base: str | None = None
    run: str | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-.") or "model"
        return f"{readable}-{hashlib.sha256(self.path.encode()).hexdigest()[:6]}"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to generate and to score.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: with the chat template to use, if there is one.
        eos_ids: EOS tokens.
        pad_token_id: pads rows.
        positions: context length in tokens; None if the configuration has none.
    """

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    pad_token_id: int
    positions: int | None

    def max_length(self, wanted: int) -> int:
        """`wanted` tokens, or the model's context length if that is less."""
        return min(wanted, self.positions or wanted)

    def data_options(self, wanted: int) -> DataOptions:
        """Limits of rows of at most `wanted` tokens, a quarter of them for the response."""
        length = self.max_length(wanted)
        return DataOptions(length, max(1, length - length // 4), embeddings=embedding_rows(self.model))

    def checked(self, ids: list[int]) -> list[int]:
        """`ids`, if the model has an embedding for each; else a `TokenizerError`."""
        return known_tokens(ids, self.tokenizer, self.model)


def find_targets(models: Sequence[str], *, start: str | None = None) -> list[Target]:
    """Expand run folders into policy, opponent and the model that the run started from.

    Args:
        models: folders or Hub ids.
        start: the model before training, to compare with; not needed if a run names one that is on this machine.
    """
    targets: list[Target] = []
    for name in models:
        folder = Path(name)
        if not folder.is_dir():
            if not folder.is_file() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
                raise ModelError(f"{name}: no such model or run folder.")
            targets.append(Target(name, name))
        elif is_run(folder):
            targets += _of_run(folder, start)
        else:
            targets.append(_of_folder(folder, folder.name))
    if start is not None and not any(target.role == "start" for target in targets):
        targets.insert(0, _start(start))
    return _with_unlike_names(targets)


def _of_run(folder: Path, start: str | None) -> list[Target]:
    name = folder.resolve().name
    found = [_of_folder(folder, f"{name} policy", "policy", folder)]
    if (folder / OPPONENT_FOLDER).is_dir():
        found.append(_of_folder(folder / OPPONENT_FOLDER, f"{name} opponent", "opponent", folder))
    began = start or start_of(folder)
    if began is not None and (start is not None or Path(began).is_dir()):
        found.insert(0, _start(began, folder))
    elif began is not None:
        logger.warning(
            f"{folder}: its start {began} is no folder here, and is left out. Name it with --start to compare with it."
        )
    return found


def _start(path: str, run: Path | None = None) -> Target:
    folder = Path(path)
    if folder.is_dir():
        return _of_folder(folder, "start", "start", run)
    return Target("start", path, "start", run=None if run is None else str(run))


def _of_folder(folder: Path, name: str, role: str = "model", run: Path | None = None) -> Target:
    home = None if run is None else str(run)
    if (folder / "config.json").is_file():
        return Target(name, str(folder), role, None, home)
    if (folder / ADAPTER_FILE).is_file():
        base = read_adapter_config(folder).get("base_model_name_or_path")
        if not base:
            raise ModelError(f"{folder / ADAPTER_FILE}: does not name the adapter's base model.")
        return Target(name, str(folder), role, str(base), home)
    unsaved = "the run has not saved its policy yet; use one of its checkpoint-N folders"
    what = unsaved if role == "policy" else "not a model"
    raise ModelError(f"{folder}: contains neither config.json nor {ADAPTER_FILE}: {what}.")


def _with_unlike_names(targets: list[Target]) -> list[Target]:
    unlike: list[Target] = []
    for target in targets:
        if any(other.path == target.path for other in unlike):
            continue
        name, count = target.name, 2
        while any(other.name == name for other in unlike):
            name, count = f"{target.name} ({count})", count + 1
        unlike.append(replace(target, name=name))
    return unlike


def check_target(target: Target) -> None:
    """Refuse a model that cannot be loaded, before lm-evaluation-harness loads it in another process."""
    read_config(target.path)
    for path in (target.base, target.path):
        if path is not None:
            load_tokenizer(path)


def check_for_other_loaders(target: Target) -> None:
    """Refuse what this package loads and lm-evaluation-harness does not."""
    source = find_source(target.path)
    if source.merged or source.is_gguf:
        what = "a GGUF file" if source.is_gguf else "an adapter on an adapter"
        raise ModelError(
            f"{target.path}: lm-evaluation-harness cannot load {what}. Evaluate the folder that sapo export "
            f"{target.path} OUT writes."
        )


def fingerprint(target: Target) -> str:
    """Hash that identifies a model: of its files for a folder, of the commit for a Hub id."""
    digest = hashlib.sha256()
    for path in (target.base, target.path):
        if path is None:
            continue
        folder = Path(path)
        own = folder_digest(folder, _MODEL_FILES, without=_OTHER_FILES) if folder.is_dir() else None
        if folder.is_file():
            own = file_digest(folder)
        digest.update((own or f"{path}@{read_config(path)._commit_hash or 'main'}").encode())
    return digest.hexdigest()[:16]


def borrowed_tokenizer(target: Target) -> Any | None:
    """The run's tokenizer, for the start of a run that has no chat template of its own; None for every other model."""
    if target.role != "start" or target.run is None or load_tokenizer(target.path).chat_template:
        return None
    found = load_tokenizer(target.run)
    return found if found.chat_template else None


def load_target(target: Target, *, device: str, dtype: str, chat_template_path: str | None) -> LoadedModel:
    """Load a model with its tokenizer, and the template to use instead of its own, if one is named.

    The start of a run that has no chat template of its own is given the run's: both are asked the same.
    """
    borrowed = borrowed_tokenizer(target) if chat_template_path is None else None
    tokenizer = load_tokenizer(target.path) if borrowed is None else borrowed
    use_chat_template(tokenizer, chat_template_path, load_template_tokenizer)
    model = load_frozen(target.path, dtype=dtype, device=device)
    if chat_template_path is not None or borrowed is not None:
        fit_model(model, tokenizer, seed=0)
    try:
        eos_ids = eos_token_ids(tokenizer, model.generation_config.eos_token_id)
    except TokenizerError as error:
        raise TokenizerError(f"{target.path}: {error}") from error
    return LoadedModel(model, tokenizer, eos_ids, padding_token_id(tokenizer, eos_ids), positions_of(model.config))
