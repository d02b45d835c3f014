"""Options as dataclasses: what the trainer and the loaders of model and data take; and back to a recipe."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig

from sapo.commands.data_arguments import DataArguments, RunDescription, check_needs, part_of
from sapo.commands.parser import Command, parse_command
from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError
from sapo.options import one_start, option


@dataclasses.dataclass
class RunArguments(RunDescription):
    """The options of a run that trains or generates: `config` is complete."""

    config: SAPOConfig


def build(values: Mapping[str, Any]) -> RunArguments:
    """The dataclasses of a run.

    Args:
        values: options by name; the others have their defaults.

    Raises:
        ConfigurationError: options that clash, or that the installed transformers or trl does not have.
    """
    kinds = (DataArguments, DatasetMixtureConfig, SAPOConfig, ModelConfig)
    parts = [part_of(kind, values) for kind in kinds]
    known = {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}
    for name in sorted(values.keys() - known):
        declared = option(name)
        since = f" It came with transformers {declared.since}." if declared is not None and declared.since else ""
        raise ConfigurationError(f"{name}: the installed transformers and trl do not have this option.{since}")
    run = RunArguments(*parts)
    check_needs(values, run)
    return run


def parse(arguments: Sequence[str], program: str, defaults: Mapping[str, Any] | None = None) -> RunArguments:
    """Parse options of a run and, with `--config`, a recipe underneath them; for scripts, such as the benchmarks.

    Args:
        arguments: as typed.
        program: the command they are for, such as "sapo train".
        defaults: replace the options' own defaults, under the recipe.

    Raises:
        ConfigurationError: an unknown option (with the nearest), a value of the wrong type, options that clash.
    """
    command = Command(program.removeprefix("sapo "), "", "", "", takes_options=True)
    return build(parse_command(command, arguments).values(defaults))


def as_recipe(arguments: RunArguments) -> dict[str, Any]:
    """The options that differ from their defaults, as a recipe that gives the same run again, from any folder."""
    recipe: dict[str, Any] = {}
    for part in (arguments.model, arguments.data, arguments.mixture, arguments.config):
        for field in dataclasses.fields(part):
            if not field.init or field.name in one_start():
                continue
            default = field.default
            if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = getattr(part, field.name)
            value = value.value if isinstance(value, Enum) else value
            default = default.value if isinstance(default, Enum) else default
            if value != default:
                plain = [dataclasses.asdict(v) for v in value] if field.name == "datasets" else value
                recipe[field.name] = _from_anywhere(field.name, plain)
    return recipe


_PATHS = ("output_dir", "vllm_weights_dir")
"""Options that name a place whether or not something is there yet."""
_PERHAPS_PATHS = (
    "model_name_or_path", "dataset_name", "eval_dataset_name", "replay_dataset_name", "chat_template_path", "deepspeed",
    "fsdp_config", "path", "data_files", "data_dir",
)  # fmt: skip
"""Options, and fields of the members of `datasets`, that name a file or folder here, or something elsewhere."""


def _from_anywhere(name: str, value: Any) -> Any:
    """The value of an option as it is understood in any working folder: paths are absolute."""
    if isinstance(value, list):
        return [_from_anywhere(name, one) for one in value]
    if name == "datasets" and isinstance(value, dict):
        # In a folder, the files are named from there.
        inside = ("data_files", "data_dir") if _is_here(Path(str(value.get("path")))) else ()
        return {key: one if key in inside else _from_anywhere(key, one) for key, one in value.items()}
    if name == "data_files" and isinstance(value, dict):
        return {split: _from_anywhere(name, files) for split, files in value.items()}
    if not isinstance(value, str) or not value:
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if name in _PATHS or (name in _PERHAPS_PATHS and _is_here(path)) else value


def _is_here(path: Path) -> bool:
    """Whether there is such a file or folder."""
    try:
        return path.exists() or bool(glob.glob(str(path)))
    except (OSError, ValueError):
        # Longer than a path can be, or with a character that no path has.
        return False
