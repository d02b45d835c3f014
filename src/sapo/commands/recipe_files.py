"""Recipes: YAML files of options, read so that an error names file, line and option."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import yaml

from sapo.commands.recipes import find_recipe
from sapo.errors import ConfigurationError, brief, yaml_fault
from sapo.options import Option, option
from sapo.options.aliases import unknown
from sapo.options.values import check, convert

_NO = ("no", "off", "yes", "on", "n", "y")
"""Words that YAML reads as a truth value."""


def read_recipe(name: str) -> dict[str, Any]:
    """The options that a recipe sets.

    Args:
        name: a file, or the name of a shipped recipe.

    Raises:
        ConfigurationError: no such recipe, or what is wrong with it, with the line.
    """
    file = find_recipe(name)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigurationError(f"--config {brief(file)}: cannot be read ({brief(error)}).") from error
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = (
                "is empty" if node is None else "is a YAML list" if isinstance(node, yaml.SequenceNode) else "is text"
            )
            dashes = ", without dashes before them" if isinstance(node, yaml.SequenceNode) else ""
            raise ConfigurationError(
                f"--config {file}: {found}; a recipe consists of `option: value` lines{dashes}. Example: `beta: 0.1`."
            )
        return _options(file, loader, node)
    except yaml.MarkedYAMLError as error:
        raise ConfigurationError(
            f"--config {file}{yaml_fault(error)}. Check indentation, colons and quotes there."
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"--config {file}: not valid YAML ({brief(error)}).") from error


def _options(file: Path, loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    _refuse_unknown(file, node)
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        where = f"{file}, line {line}"
        name = key.value
        declared = option(name)
        assert declared is not None, name
        if name in lines:
            raise ConfigurationError(f"{where}: {name} is set in line {lines[name]} already. Remove one of the two.")
        lines[name] = line
        found[name] = _value(where, declared, loader, value)
    return found


def _refuse_unknown(file: Path, node: yaml.MappingNode) -> None:
    """Name all unknown options at once: in a recipe of another tool there are many.

    Raises:
        ConfigurationError: there is one.
    """
    names = [(key.start_mark.line + 1, key.value if isinstance(key, yaml.ScalarNode) else "?") for key, _ in node.value]
    messages = [(line, unknown(brief(name, 80))) for line, name in names if option(name) is None]
    if len(messages) == 1:
        line, message = messages[0]
        raise ConfigurationError(f"{file}, line {line}: {message}")
    if messages:
        listed = "; ".join(
            f"line {line}: {message.removeprefix('unknown option ').rstrip('.').replace('; ', ', ')}"
            for line, message in messages
        )
        raise ConfigurationError(f"{file}: {len(messages)} unknown options. {listed}.")


def _as_written(given: Any, node: yaml.Node) -> Any:
    """A text that YAML reads as a number or a date, such as 1.10, 007 or 12:30, as it is written."""
    if isinstance(node, yaml.SequenceNode) and isinstance(given, list):
        return [_as_written(one, part) for one, part in zip(given, node.value, strict=True)]
    plain = isinstance(node, yaml.ScalarNode) and isinstance(given, (int, float, datetime.date))
    return node.value if plain and not isinstance(given, bool) else given


def _value(where: str, declared: Option, loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    given = loader.construct_object(node, deep=True)
    if declared.type in ("str", "str_or_false", "list"):
        given = _as_written(given, node)
    word = node.value if isinstance(node, yaml.ScalarNode) else ""
    if isinstance(given, bool) and declared.type in ("str", "list") and word.lower() in _NO:
        raise ConfigurationError(
            f"{where}: YAML reads {declared.name}: {word} as {str(given).lower()}. Put it in quotes: "
            f'{declared.name}: "{word}".'
        )
    try:
        value = convert(declared, given)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {declared.name}: {error}.") from None
    try:
        check(declared, value)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    return value
