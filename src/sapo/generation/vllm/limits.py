"""Limits of vLLM, on servers and in process."""

from __future__ import annotations

from sapo.errors import ConfigurationError
from sapo.generation.sampling import Sampling

MIN_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one, except 0."""

_MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's max_lora_rank."""


def check_temperature(sampling: Sampling) -> None:
    """Refuse a temperature that vLLM would change.

    Raises:
        ConfigurationError: the temperature is too low.
    """
    if 0 < sampling.temperature < MIN_TEMPERATURE:
        raise ConfigurationError(
            f"temperature={sampling.temperature}: vLLM samples at {MIN_TEMPERATURE} or more. Raise it, or set it to "
            "0 for greedy decoding."
        )


def max_lora_rank(rank: int) -> int:
    """The smallest max_lora_rank of vLLM for an adapter of `rank`.

    Raises:
        ConfigurationError: the rank is too high.
    """
    limit = next((limit for limit in _MAX_LORA_RANKS if limit >= rank), None)
    if limit is None:
        raise ConfigurationError(f"a LoRA rank of {rank}: vLLM serves up to {_MAX_LORA_RANKS[-1]}. Lower lora_r.")
    return limit
