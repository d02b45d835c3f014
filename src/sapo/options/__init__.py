"""Every option of a run, declared once, without torch.

Ranges, what a resume compares, the recipe, `--help`, the report's table and the configuration page are derived from
these declarations. `Option` has the facts of one option; the functions below select options.
"""

from __future__ import annotations

from sapo.options.declare import Option
from sapo.options.table import (
    accepted,
    not_compared,
    one_start,
    option,
    options,
    own_options,
    pair_options,
    resume_fixed,
    sections,
)

__all__ = [
    "Option",
    "accepted",
    "not_compared",
    "one_start",
    "option",
    "options",
    "own_options",
    "pair_options",
    "resume_fixed",
    "sections",
]
