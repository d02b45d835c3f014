"""The seam between self-play and whatever writes the text."""

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
            max_new_tokens: budget of each row in tokens, 0 or more.
            seeds: seed of each row, the only source of that row's randomness: what a row becomes does not
                depend on the other rows, on their order or on their number, beyond floating point.

        Returns:
            For row i the tokens after `contexts[i]`: at most `max_new_tokens[i]`, up to and including the
            first end token.

        Raises:
            ConfigurationError: a row without context or with a negative budget, or arguments of unequal
                lengths.
        """
        ...


Weights: TypeAlias = "Path | Mapping[str, Tensor]"


@runtime_checkable
class Engine(Generator, Protocol):
    """A `Generator` that has weights of its own, outside the policy's modules, and is given new ones as folders."""

    def load(self, weights: Weights, version: str) -> None:
        """Serve other weights: every token that `generate` returns from now on was drawn with them.

        Args:
            weights: an ordinary model folder or, with LoRA, adapter folder; it stays until the next one is loaded. Or
                all weights by name, in main memory, for an engine that takes them so; only of the process that loads.
            version: names the weights; no two of a run's are alike.

        Raises:
            GenerationError: the engine cannot be given them.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; it is not used any more."""
        ...


@runtime_checkable
class InProcessEngine(Engine, Protocol):
    """An `Engine` in this process, which takes turns with the training and can be given weights in memory."""

    def load_tensors(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """As `load`, with the weights of a whole model by name."""
        ...


def check_request(contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]) -> None:
    """Refuse a request that breaks the contract of `Generator`; every implementation calls this first.

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
