"""A model's generation configuration, made such that it can be saved."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

_FIRST = ("do_sample", "num_beams")
"""What decides whether the others are valid."""


def repair_generation_config(model: Any) -> str | None:
    """Leave out what transformers refuses to save.

    Published models have sampling parameters beside greedy decoding, which generation ignores. transformers loads such
    a configuration and raises when a changed one is saved: at the end of a run.

    Args:
        model: its `generation_config` is replaced if it is invalid. What is left generates alike.

    Returns:
        What was left out, as a sentence; None for a valid configuration.
    """
    given = getattr(model, "generation_config", None)
    if given is None or _is_valid(given):
        return None
    values = given.to_diff_dict()
    names = [name for name in _FIRST if name in values] + sorted(values.keys() - set(_FIRST))
    repaired, left = GenerationConfig(), []
    for name in names:
        default = getattr(repaired, name, None)
        setattr(repaired, name, values[name])
        if not _is_valid(repaired):
            setattr(repaired, name, default)
            left.append(f"{name}={values[name]}")
    model.generation_config = repaired
    return (
        f"left out {', '.join(left)}, which transformers refuses to save beside the other settings. Greedy decoding "
        "ignores sampling parameters; set do_sample to true in the model to use them."
    )


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True
