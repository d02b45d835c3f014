"""Conversion of texts and YAML values to option values, and checks against the declaration."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from sapo.errors import ConfigurationError, brief
from sapo.options.declare import Option

_TRUE, _FALSE = ("true", "yes", "y", "t", "1"), ("false", "no", "n", "f", "0")
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "bool_or_auto": "true, false or auto",
    "str": "text",
    "str_or_false": "text, or false",
    "list": "text, or a list of texts",
    "numbers": "a number, or a list of numbers",
    "mapping": "a mapping, as JSON such as '{\"key\": 1}'",
    "mapping_or_file": "a file, or a mapping as JSON",
    "records": "a list of mappings",
}


def convert(option: Option, given: Any) -> Any:
    """Convert text from the command line or a YAML value to a value of `option`.

    Raises:
        ValueError: it cannot be converted. Choices, ranges and refusals are checked by `check`.
    """
    text = given.strip() if isinstance(given, str) else None
    if option.choices is not None and text in option.choices:
        return [text] if option.type == "list" else text
    if given is None or (option.optional and text in ("none", "None", "null")):
        if option.optional:
            return None
        raise ValueError(f"has no value; must be {wanted(option)}")
    try:
        return _CONVERTERS[option.type](given)
    except (ValueError, TypeError, OverflowError):
        shown = (
            brief(given, 80)
            if isinstance(given, (str, int, float))
            else "a list"
            if isinstance(given, list)
            else "a mapping"
        )
        raise ValueError(f"{shown} is not valid; must be {wanted(option)}") from None


def wanted(option: Option) -> str:
    """Description of valid values."""
    if option.choices is not None:
        return f"{'one or several' if option.type == 'list' else 'one'} of {', '.join(option.choices)}"
    words = _WANTED[option.type] + (f", {option.range}" if option.range else "")
    return f"{words}, or none" if option.optional and option.type in ("int", "float") else words


def check(option: Option, value: Any) -> None:
    """Refuse an invalid value.

    Raises:
        ConfigurationError: it is refused, not one of the choices, or out of range.
    """
    if value is None:
        return
    name, spelled = option.name, getattr(value, "value", value)
    # `TrainingArguments` converts some defaults to objects.
    unset = value in ([], option.default) or (option.type == "mapping" and value == type(value)())
    shown = str(spelled).lower() if isinstance(spelled, bool) else brief(spelled, 80)
    if option.status == "refused" and not unset:
        raise ConfigurationError(f"{name}={shown}: {option.reason}")
    if isinstance(spelled, str) and spelled in option.refuses:
        raise ConfigurationError(f"{name}={shown}: {option.refuses[spelled]}")
    if option.choices is not None:
        foreign = [part for part in (value if isinstance(value, list) else [spelled]) if part not in option.choices]
        if foreign or value == []:
            raise ConfigurationError(f"{name}={', '.join(map(str, foreign))}: must be {wanted(option)}.")
    if option.type == "bool_or_auto" and not isinstance(value, bool) and value != "auto":
        raise ConfigurationError(f"{name}={shown}: must be {wanted(option)}.")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigurationError(f"{name}={number}: must be a finite number.")
        if isinstance(number, (int, float)) and option.low is not None:
            high = math.inf if option.high is None else option.high
            if not option.low <= number <= high:
                raise ConfigurationError(f"{name}={number}: must be {option.range}.")


def unmet(option: Option, value: Any, values: Mapping[str, Any]) -> str | None:
    """What an option has no effect without, if it is set and that is not given.

    Args:
        option: declares what it `needs`: another option, or one with certain values. Anything else is not checked here.
        value: of the option.
        values: of all options of the run, by name.

    Returns:
        The need in words, or None.
    """
    found = re.fullmatch(r"(\w+)(?:=(\w+(?: or \w+)*))?", option.needs)
    if found is None or found[1] not in values or value in (option.default, [], None, "none"):
        return None
    other = values[found[1]]
    spelled = f"{other:g}" if isinstance(other, float) else str(getattr(other, "value", other)).lower()
    met = bool(other) if found[2] is None else spelled in found[2].split(" or ")
    if isinstance(other, list) and found[2] is not None:
        met = not {*other}.isdisjoint(found[2].split(" or "))
    return None if met else option.needs


def _int(given: Any) -> int:
    if isinstance(given, bool) or (isinstance(given, float) and given != int(given)):
        raise ValueError
    return int(given)


def _float(given: Any) -> float:
    if isinstance(given, bool):
        raise TypeError
    return float(given)


def _bool(given: Any) -> bool:
    text = str(given).lower()
    if text not in (*_TRUE, *_FALSE):
        raise ValueError
    return text in _TRUE


def _bool_or_auto(given: Any) -> bool | str:
    return "auto" if given == "auto" else _bool(given)


def _str(given: Any) -> str:
    if isinstance(given, bool) or not isinstance(given, (str, int, float)):
        raise TypeError
    return str(given)


def _str_or_false(given: Any) -> str | bool:
    return False if given is False or given in ("false", "False") else _str(given)


def _list(given: Any) -> list[str]:
    return [_str(one) for one in given] if isinstance(given, (list, tuple)) else [_str(given)]


def _numbers(given: Any) -> list[float]:
    return [_float(one) for one in given] if isinstance(given, (list, tuple)) else [_float(given)]


def _mapping(given: Any) -> dict[str, Any]:
    found = json.loads(given) if isinstance(given, str) else given
    if not isinstance(found, Mapping):
        raise TypeError
    return dict(found)


def _mapping_or_file(given: Any) -> dict[str, Any] | str:
    return given if isinstance(given, str) and not given.lstrip().startswith("{") else _mapping(given)


def _records(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise TypeError
    return [dict(one) for one in given]


_CONVERTERS = {
    "int": _int,
    "float": _float,
    "bool": _bool,
    "bool_or_auto": _bool_or_auto,
    "str": _str,
    "str_or_false": _str_or_false,
    "list": _list,
    "numbers": _numbers,
    "mapping": _mapping,
    "mapping_or_file": _mapping_or_file,
    "records": _records,
}
