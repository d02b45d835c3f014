"""The declaration of an option, as a dataclass field or as a line of a table."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin

Kind = Literal["own", "inherited", "model", "data"]
Status = Literal["used", "harmless", "refused"]
Resume = Literal["fixed", "free"]
ValueType = Literal[
    "int",
    "float",
    "bool",
    "bool_or_auto",
    "str",
    "str_or_false",
    "list",
    "numbers",
    "mapping",
    "mapping_or_file",
    "records",
]


SECTIONS = (
    "Model",
    "Data",
    "Objective",
    "Self-play",
    "Generation backend",
    "Opponent and reference",
    "Replay buffer",
    "Self-replay",
    "Training",
    "Optimizer",
    "Speed and memory",
    "LoRA and quantization",
    "Evaluation",
    "Logging and report",
    "Checkpoints and output",
    "Hub",
    "Several processes",
    "Data loading",
)
"""Groups of the help and tables of the documentation, in their order."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option: a flag of the command line, a line of a recipe, a field of a dataclass, under the same name.

    Attributes:
        name: the common name.
        default: value if the option is unset.
        help: one or two sentences, understood without the name. Empty for a refused option.
        section: one of `SECTIONS`.
        type: type of a value. A "mapping" is JSON on the command line; "records" can be given in a recipe only.
        optional: whether None is a value (`none` on the command line, `null` in a recipe).
        choices: valid values, of a list its parts; or None.
        low: minimum, inclusive, or None.
        high: maximum, inclusive, or None.
        resume: "fixed" if a resumed run must have the value that its checkpoint was made with.
        one_start: whether it concerns one start of a run: excluded from recipes, reports and comparisons.
        common: whether the short `--help` shows it.
        shapes_pairs: whether generated pairs depend on it, besides the model and the prepared data.
        repeatable: whether the flag may be given several times, each adding to a list.
        needs: condition without which it has no effect, such as "generation_backend=vllm_server"; or an empty string.
        kind: "own" if SAPO declares it, "inherited" from transformers, trl's flags for "model" and "data".
        status: "used"; "harmless" if only transformers uses it; "refused" if only the default is accepted.
        reason: why it is refused, and the alternative.
        refuses: values of a used option that are refused, each with the reason.
        since: first version of transformers that has it, or None if all supported versions do.
    """

    name: str
    default: Any
    help: str
    section: str
    type: ValueType
    optional: bool = False
    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    resume: Resume = "fixed"
    one_start: bool = False
    common: bool = False
    shapes_pairs: bool = False
    repeatable: bool = False
    needs: str = ""
    kind: Kind = "own"
    status: Status = "used"
    reason: str = ""
    refuses: Mapping[Any, str] = field(default_factory=dict)
    since: str | None = None

    @property
    def range(self) -> str:
        """The range in words: "0 or more", "between 0 and 1", or an empty string."""
        if self.low is None:
            return ""
        if self.high is None:
            return f"{self.low:g} or more"
        return f"between {self.low:g} and {self.high:g}"

    @property
    def default_text(self) -> str:
        """The default in recipe syntax; "unset" for None."""
        if self.default is None or self.default == []:
            return "unset"
        if isinstance(self.default, list):
            return " ".join(self.default)
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


def declared(default: Any, text: str, section: str, **more: Any) -> Any:
    """A dataclass field with the declaration of its option.

    Args:
        default: default of the field.
        text: help text.
        section: one of `SECTIONS`.
        more: further attributes of `Option`; name, type, optional and (but for a list) choices follow from the field.

    Raises:
        ValueError: no such section.
    """
    if section not in SECTIONS:
        raise ValueError(f"{section!r} is not a section")
    # argparse reads `%` as a format, and others may build a parser from the dataclass.
    metadata: dict[str, Any] = {
        "help": text.replace("%", "%%"),
        "option": partial(Option, help=text, section=section, **more),
    }
    if isinstance(default, list):
        return field(default_factory=partial(list, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def time_fraction(default: float, measure: str, text: str) -> Any:
    """The declaration of the maximum fraction of a run's time that a measure may take.

    Args:
        default: between 0 and 1.
        measure: option that switches the measure on.
        text: end of the help text: what is not counted or left out.
    """
    text = f"Maximum fraction of the run's time that {measure} may take{text}"
    return declared(default, text, "Evaluation", resume="free", low=0, high=1, needs=measure)


def from_field(one: Field[Any], hint: Any) -> Option:
    """The declaration in a dataclass field.

    Args:
        one: made by `declared`.
        hint: its type, evaluated.
    """
    default = one.default if one.default is not MISSING else None
    if one.default_factory is not MISSING:
        default = one.default_factory()
    kind, optional, choices = value_type(hint)
    more = {} if choices is None else {"choices": choices}
    made: Option = one.metadata["option"](name=one.name, default=default, type=kind, optional=optional, **more)
    return made


def value_type(hint: Any) -> tuple[ValueType, bool, tuple[str, ...] | None]:
    """Type, whether None is a value, and choices of an annotation."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    optional, parts = type(None) in parts, tuple(part for part in parts if part is not type(None))
    if bool in parts and str in parts:
        # The one text is "auto". A Literal would be plainer, and transformers' own parser of dataclasses refuses it.
        return "bool_or_auto", optional, None
    for part in parts:
        if get_origin(part) is Literal:
            return "str", optional, tuple(get_args(part))
    # A mapping that may be JSON text is declared `dict | str`.
    if dict in parts or any(get_origin(part) is dict for part in parts):
        return "mapping", optional, None
    if any(get_origin(part) is list for part in parts):
        return "numbers" if list[float] in parts else "list", optional, None
    names: dict[type, ValueType] = {bool: "bool", int: "int", float: "float", str: "str"}
    return names[parts[0]], optional, None
