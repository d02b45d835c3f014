"""What vLLM does not do, however it is run."""

from __future__ import annotations

from sapo.errors import ConfigurationError
from sapo.generation.sampling import Sampling

LEAST_TEMPERATURE = 0.01
"""vLLM samples at this temperature when asked for less, unless for 0."""

_ADAPTER_ROOMS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can make room for; smaller adapters fit too."""


def check_temperature(sampling: Sampling) -> None:
    """Refuse a temperature at which vLLM would sample otherwise than asked.

    Raises:
        ConfigurationError: it is such a one.
    """
    if 0 < sampling.temperature < LEAST_TEMPERATURE:
        raise ConfigurationError(
            f"temperature={sampling.temperature}: vLLM samples at {LEAST_TEMPERATURE} or more. Raise it, or set it to "
            "0 for the likeliest token always."
        )


def adapter_room(rank: int) -> int:
    """The least rank that vLLM can be told to make room for, and into which an adapter of `rank` fits.

    Raises:
        ConfigurationError: there is none.
    """
    room = next((room for room in _ADAPTER_ROOMS if room >= rank), None)
    if room is None:
        raise ConfigurationError(f"a LoRA rank of {rank}: vLLM serves up to {_ADAPTER_ROOMS[-1]}. Lower lora_r.")
    return room
