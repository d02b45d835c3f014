"""Flags and recipes to dataclasses: trl's parser, with errors of one line that name the nearest option."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from sapo.commands.recipes import find_recipe
from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError, brief


@dataclasses.dataclass
class DataArguments(ScriptArguments):
    """trl's data flags, and a data set for evaluation of its own."""

    eval_dataset_name: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "File, folder or hub id to evaluate on. Unset: the test split of dataset_name, if it has one."
        },
    )


@dataclasses.dataclass
class RunArguments:
    """What a training command was asked for."""

    data: DataArguments
    mixture: DatasetMixtureConfig
    config: SAPOConfig
    model: ModelConfig


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message[:1].lower() + message[1:] + ".")


def parse(arguments: Sequence[str], program: str, defaults: Mapping[str, Any] | None = None) -> RunArguments:
    """Parse flags and, with `--config`, a recipe underneath them.

    Args:
        arguments: of the command.
        program: its name, for the help.
        defaults: take the place of options' own, under the recipe.

    Raises:
        ConfigurationError: an unknown option (with the nearest), a value of the wrong type, options that clash.
    """
    parser = _Parser([DataArguments, DatasetMixtureConfig, SAPOConfig, ModelConfig], prog=program, allow_abbrev=False)
    parser.set_defaults(**(defaults or {}))
    arguments = [part for argument in arguments for part in _split_equals(argument)]
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        # A `--no_...` flag shares its destination with the flag before it, which is the one with a type.
        actions.setdefault(action.dest, action)
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise ConfigurationError("--config: name a recipe, such as tiny-cpu-orpo.")
        parser.set_defaults_with_config(**_recipe(find_recipe(arguments[place + 1]), actions))
        arguments = arguments[:place] + arguments[place + 2 :]
    known = [flag for action in parser._actions for flag in action.option_strings]
    for argument in arguments:
        if argument.startswith("--") and argument not in known:
            raise ConfigurationError(f"unknown option {argument}{_nearest(argument, known)}.")
    try:
        parsed = parser.parse_args_into_dataclasses(args=arguments)
    except ConfigurationError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigurationError(brief(error)) from error
    return RunArguments(*parsed)


def _split_equals(argument: str) -> list[str]:
    if argument.startswith("--") and "=" in argument:
        return argument.split("=", 1)
    return [argument]


def _recipe(file: Path, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config {file}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--config {file}: not valid YAML ({brief(error)}).") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config {file}: a recipe is a list of `option: value` lines.")
    for name, value in content.items():
        if name not in actions or name == "help":
            raise ConfigurationError(f"{file}: unknown option {name}{_nearest(str(name), list(actions))}.")
        convert = actions[name].type
        if isinstance(value, (bool, int, float, str)) and callable(convert):
            try:
                content[name] = convert(str(value))
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                raise ConfigurationError(f"{file}: {name}: {value!r} is not valid. See sapo train --help.") from None
            choices = actions[name].choices
            if choices is not None and content[name] not in choices:
                listed = ", ".join(map(str, choices))
                raise ConfigurationError(f"{file}: {name}: {value!r} is not one of {listed}.")
            if actions[name].nargs == "+":
                content[name] = [content[name]]
    return content


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; nearest: {close[0]}" if close else ""


def as_recipe(arguments: RunArguments) -> dict[str, Any]:
    """The options that differ from their defaults, as a recipe that gives the same run again."""
    recipe: dict[str, Any] = {}
    for part in (arguments.model, arguments.data, arguments.mixture, arguments.config):
        for field in dataclasses.fields(part):
            if not field.init or field.name in _DERIVED:
                continue
            default = field.default
            if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = getattr(part, field.name)
            value = value.value if isinstance(value, Enum) else value
            default = default.value if isinstance(default, Enum) else default
            if value != default:
                plain = [dataclasses.asdict(v) for v in value] if field.name == "datasets" else value
                recipe[field.name] = plain
    return recipe


_DERIVED = {
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "accelerator_config",
    "disable_tqdm",
    "hub_token",
    "local_rank",
    "logging_dir",
    "overwrite_output_dir",
    "push_to_hub_token",
    "remove_unused_columns",
    "resume_from_checkpoint",
    "run_name",
}
"""Set by other options, secret, or of one start only."""
