"""The options of a run for commands that read its data and no weights: neither torch nor transformers is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from sapo.errors import ConfigurationError, brief
from sapo.options import option
from sapo.options.rules import DataConfig, OptionRules
from sapo.options.values import unmet


@dataclasses.dataclass
class DataArguments(ScriptArguments):
    """trl's data options, and a dataset for evaluation of its own."""

    eval_dataset_name: str | None = None


@dataclasses.dataclass
class RunDescription:
    """The options of a run, in the dataclasses that take them.

    Attributes:
        data: of one dataset.
        mixture: of several.
        config: everything else but the model.
        model: names the model.
    """

    data: DataArguments
    mixture: DatasetMixtureConfig
    config: OptionRules
    model: ModelConfig


def describe(values: Mapping[str, Any]) -> RunDescription:
    """The options of a run, without what makes it one.

    Args:
        values: options by name; the others have their defaults.

    Raises:
        ConfigurationError: options that clash, or that the installed trl does not have.
    """
    parts = [part_of(kind, values) for kind in (DataArguments, DatasetMixtureConfig, ModelConfig)]
    data, mixture, model = parts
    description = RunDescription(data, mixture, DataConfig(values), model)
    check_needs(values, description)
    return description


def part_of(kind: Any, values: Mapping[str, Any]) -> Any:
    """One of the dataclasses of a run from the options that it has.

    Raises:
        ConfigurationError: what it refuses.
    """
    names = [field.name for field in dataclasses.fields(kind) if field.init and field.name in values]
    try:
        return kind(**{name: values[name] for name in names})
    except ConfigurationError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigurationError(brief(error)) from error


def all_values(run: RunDescription) -> dict[str, Any]:
    """All options of a run, by name."""
    return {name: value for part in vars(run).values() for name, value in vars(part).items()}


def check_needs(given: Mapping[str, Any], run: RunDescription) -> None:
    """Refuse options that have no effect without others.

    Raises:
        ConfigurationError: names both.
    """
    values = all_values(run)
    for name, value in given.items():
        declared = option(name)
        need = unmet(declared, value, values) if declared is not None else None
        if need is not None:
            shown = str(value).lower() if isinstance(value, bool) else brief(value, 80)
            raise ConfigurationError(
                f"{name}={shown} has no effect without {need}. Add --{need.replace('=', ' ')}, or leave {name} out."
            )
