"""What vLLM is asked for, on servers and in process, and its limits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sapo.errors import ConfigurationError
from sapo.generation.sampling import Sampling

MIN_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one, except 0."""

_MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's max_lora_rank."""


def completion_options(sampling: Sampling, budget: int, seed: int, eos_ids: Collection[int]) -> dict[str, Any]:
    """Parameters of one row; none is left to the defaults of the model's generation configuration."""
    return {
        "max_tokens": budget,
        # Never -1, which means no seed.
        "seed": seed & (2**63 - 1),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(eos_ids),
        # The EOS token of the model's configuration ends a row only if it is one of these.
        "ignore_eos": True,
    }


def check_temperature(sampling: Sampling) -> None:
    """Refuse a temperature that vLLM would change."""
    if 0 < sampling.temperature < MIN_TEMPERATURE:
        raise ConfigurationError(
            f"temperature={sampling.temperature}: vLLM samples at {MIN_TEMPERATURE} or more. Raise it, or set it to "
            "0 for greedy decoding."
        )


def max_lora_rank(rank: int) -> int:
    """The smallest max_lora_rank of vLLM for an adapter of `rank`; a rank that is too high is refused."""
    limit = next((limit for limit in _MAX_LORA_RANKS if limit >= rank), None)
    if limit is None:
        raise ConfigurationError(f"a LoRA rank of {rank}: vLLM serves up to {_MAX_LORA_RANKS[-1]}. Lower lora_r.")
    return limit
