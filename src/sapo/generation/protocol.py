"""The protocol between self-play and what generates text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from sapo.errors import ConfigurationError


@runtime_checkable
class Generator(Protocol):
    """Something that continues token sequences."""

    def generate(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Continue each context.

        Args:
            contexts: token ids to continue, at least one each; rows of any length.
            max_new_tokens: maximum new tokens of each row, 0 or more.
            seeds: seed of each row, its only source of randomness: a row's output does not depend on the other rows,
                their order or their number, beyond floating point.

        Returns:
            For row i the tokens after `contexts[i]`: at most `max_new_tokens[i]`, up to and including the
            first EOS token.

        Raises:
            ConfigurationError: a row without context or with a negative budget, or arguments of unequal
                lengths.
        """
        ...


Weights: TypeAlias = "Path | Mapping[str, Tensor]"


@runtime_checkable
class Engine(Generator, Protocol):
    """A `Generator` with its own weights, outside the policy's modules, which are updated from folders."""

    def load(self, weights: Weights, version: str) -> None:
        """Serve new weights: every token that `generate` returns from now on is sampled with them.

        Args:
            weights: a model folder or, with LoRA, an adapter folder, which exists until the next load. Or all weights
                by name, in main memory, for an engine that accepts tensors; only in the process that loads.
            version: name of the weights, unique within a run.

        Raises:
            GenerationError: the engine cannot load them.
        """
        ...

    def close(self) -> None:
        """Free the engine's resources; it must not be used afterwards."""
        ...


@runtime_checkable
class InProcessEngine(Engine, Protocol):
    """An `Engine` in this process, which alternates with training and can load weights from memory."""

    def load_tensors(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """As `load`, with the full model's weights by name."""
        ...


def check_request(contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]) -> None:
    """Refuse a request that violates the contract of `Generator`; every implementation calls this first.

    Raises:
        ConfigurationError: a row without context or with a negative budget, or arguments of unequal lengths.
    """
    if not len(contexts) == len(max_new_tokens) == len(seeds):
        raise ConfigurationError(
            f"generate got {len(contexts)} contexts, {len(max_new_tokens)} budgets and {len(seeds)} seeds; "
            "pass one of each per row"
        )
    for row, (context, budget) in enumerate(zip(contexts, max_new_tokens, strict=True)):
        if len(context) == 0:
            raise ConfigurationError(
                f"row {row}: the context is empty, so there is nothing to continue; "
                "give the row a prompt of at least one token"
            )
        if budget < 0:
            raise ConfigurationError(f"row {row}: max_new_tokens={budget} is negative; use 0 for no tokens")
