"""Table of all declarations, and the selections that the package derives from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cache
from typing import get_type_hints

from sapo.options.declare import SECTIONS, Option, from_field
from sapo.options.inherited import INHERITED
from sapo.options.model_and_data import DATA, MODEL
from sapo.options.own import OwnOptions


@cache
def _table() -> Mapping[str, Option]:
    hints = get_type_hints(OwnOptions)
    # A section begins with the options that the class declares itself; those of its bases follow.
    fields = sorted(dataclasses.fields(OwnOptions), key=lambda one: one.name not in OwnOptions.__annotations__)
    own = [from_field(one, hints[one.name]) for one in fields]
    table: dict[str, Option] = {}
    for one in (*MODEL, *DATA, *own, *INHERITED):
        if one.name in table:
            raise ValueError(f"option {one.name} is declared twice")
        table[one.name] = one
    order = {section: index for index, section in enumerate(SECTIONS)}
    return dict(sorted(table.items(), key=lambda item: order[item[1].section]))


def options() -> tuple[Option, ...]:
    """Every declared option, refused ones included, by section."""
    return tuple(_table().values())


def option(name: str) -> Option | None:
    """The declaration of `name`, or None if there is none."""
    return _table().get(name)


def own_options() -> tuple[Option, ...]:
    """The options that SAPO adds."""
    return tuple(one for one in options() if one.kind == "own")


def accepted() -> tuple[Option, ...]:
    """Every option that accepts values other than its default: those in the help and the documentation."""
    return tuple(one for one in options() if one.status != "refused")


def sections(shown: Iterable[Option]) -> dict[str, list[Option]]:
    """Options by section, in the order of `SECTIONS`; empty sections are omitted."""
    found: dict[str, list[Option]] = {section: [] for section in SECTIONS}
    for one in shown:
        found[one.section].append(one)
    return {section: members for section, members in found.items() if members}


def resume_fixed() -> frozenset[str]:
    """Fields of `SAPOConfig` that a resumed run must not change."""
    of_config = (one for one in options() if one.kind in ("own", "inherited") and one.status != "refused")
    return frozenset(one.name for one in of_config if one.resume == "fixed" and not one.one_start)


def one_start() -> frozenset[str]:
    """Options that concern one start, are secret, or follow from others: not in a recipe, report or comparison."""
    return frozenset(one.name for one in options() if one.one_start)


def not_compared() -> frozenset[str]:
    """Output options, and those of one start: ignored when two runs are compared."""
    written = ("Logging and report", "Checkpoints and output", "Hub")
    return one_start() | {one.name for one in options() if one.section in written}


def pair_options() -> tuple[str, ...]:
    """Options on which generated pairs depend, besides the model and the prepared data."""
    return tuple(one.name for one in options() if one.shapes_pairs)
