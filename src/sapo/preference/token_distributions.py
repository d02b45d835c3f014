"""Exact divergences between next-token distributions, from hidden states: never all logits of two models at once.

The last hidden states of a response take little memory, its logits take vocabulary over hidden size times as much. So
hidden states are kept, and logits are computed from them a few positions at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sapo.errors import ModelError
from sapo.generation.forward import unwrapped
from sapo.preference.batches import PairBatch, ScoredRows
from sapo.preference.objectives import token_logps
from sapo.preference.scoring import PairScores, model_inputs, scored_logps, sums_by_owner

CHUNK_LOGITS = 1 << 23
"""Maximum number of logits of one model that are computed together."""
_EXPONENT = 60.0

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Head:
    """The output head of a model, with what its architecture does to logits.

    Attributes:
        module: hidden states to logits.
        scale: factor of the logits.
        cap: logits are squashed to (-cap, cap) by a tanh; None if they are not.
    """

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a causal language model, wrapped or not."""
        inner = unwrapped(model)
        config = inner.config.get_text_config()
        return cls(inner.get_output_embeddings(), _scale(config), getattr(config, "final_logit_softcapping", None))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[M, V]` of hidden states `[M, H]`."""
        logits: Tensor = self.module(hidden) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def _scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)


def hidden_at(model: nn.Module, rows: ScoredRows) -> Tensor:
    """Hidden states before the head at the scored positions of `rows`, `[M, H]`; gradients flow if they are enabled.

    Args:
        model: a causal language model, wrapped or not; its weights are not sharded.
        rows: rows on the model's device.

    Raises:
        ModelError: the model does not compute its logits from these states alone.
    """
    inner = unwrapped(model)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(args[0].flatten(0, 1)[rows.places])
        # The head of the forward pass sees one position, as a check.
        return (found[0][-1:].detach()[None], *args[1:])

    handle = inner.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits = model(**model_inputs(model, rows), use_cache=False).logits
    finally:
        handle.remove()
    if inner not in _checked:
        _check(inner, found, logits)
        _checked.add(inner)
    return found[0]


@torch.no_grad()
def _check(inner: nn.Module, found: list[Tensor], logits: Tensor) -> None:
    if len(found) == 1 and logits.shape[:2] == (1, 1):
        own = Head.of(inner)(found[0][-1:]).float()
        if float((own - logits[0].float()).abs().max()) <= 1e-2 * max(1.0, float(own.abs().max())):
            return
    raise ModelError(
        f"{type(inner).__name__} does not compute its logits from its last hidden states and its output head alone, so "
        "its distribution cannot be compared with another's. Leave kl_weight and eval_retention out."
    )


def token_kl(start_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(start || model) of each position in nats, over the full vocabulary.

    Each term is p (q/p - 1 - log(q/p)) with p of the start, which is never negative, so the sum is exact near 0, and 0
    for equal logits.

    Args:
        start_logits: `[..., V]`.
        logits: `[..., V]`.

    Returns:
        `[...]`, in float32 at least.
    """
    start, own = _log_softmax(start_logits), _log_softmax(logits)
    change, p = own - start, start.exp()
    near = (torch.expm1(change.clamp(max=_EXPONENT)) - change).clamp(min=0)
    # Where the start gives next to nothing, q / p may overflow.
    far = own.exp() - p * (1 + change)
    return torch.where(change > _EXPONENT, far, p * near).sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def position_chunks(count: int, vocabulary: int) -> Iterator[slice]:
    """Slices of `count` positions with at most `CHUNK_LOGITS` logits each, but one position at least."""
    size = max(1, CHUNK_LOGITS // vocabulary)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


@dataclass(frozen=True, slots=True)
class Anchor:
    """The reference at the scored positions of a batch.

    Attributes:
        hidden: `[M, H]` its hidden states, without gradients.
        using: opens a context that yields the reference.
    """

    hidden: Tensor
    using: Callable[[], AbstractContextManager[nn.Module]]

    def logits(self, part: slice) -> Tensor:
        """Its logits at some of the positions."""
        with torch.no_grad(), self.using() as reference:
            return Head.of(reference)(self.hidden[part])


def score_sft(
    model: nn.Module,
    batch: PairBatch,
    anchor: Anchor | None,
    *,
    by_probability: bool,
    fused_lm_head: bool = False,
) -> PairScores:
    """Score the chosen responses of a batch without rejected ones, with what anchored SFT needs of each token.

    Args:
        model: a causal language model, wrapped or not.
        batch: pairs with only a chosen response, on its device.
        anchor: the reference on the same batch; None without.
        by_probability: also weight tokens by their probability, which carries no gradient.
        fused_lm_head: see `scored_logps`; without an anchor only.
    """
    divergences = None
    if anchor is None:
        logps = scored_logps(model, batch, fused_lm_head=fused_lm_head)
    else:
        logps, divergences = position_scores(model, batch, anchor)
    owners = batch.owners.flatten()[batch.places] % len(batch)
    lengths = torch.bincount(owners, minlength=len(batch))

    def summed(values: Tensor) -> Tensor:
        return sums_by_owner(values, owners, len(batch))

    sums = summed(logps)
    return PairScores(
        sums,
        sums.detach(),
        lengths,
        lengths,
        weighted_logps=summed(logps.detach().exp() * logps) if by_probability else None,
        divergences=None if divergences is None else summed(divergences),
    )


def position_scores(model: nn.Module, rows: ScoredRows, anchor: Anchor) -> tuple[Tensor, Tensor]:
    """Log-probability of each scored token, and KL(reference || model) at its position, in nats.

    Logits of a chunk of positions are computed, used and dropped; the backward pass computes them again.

    Args:
        model: a causal language model, wrapped or not.
        rows: rows on its device.
        anchor: the reference on the same rows.

    Returns:
        `[M]` and `[M]`, with gradients if they are enabled.
    """
    hidden, targets = hidden_at(model, rows), rows.targets.flatten()[rows.places]
    head = Head.of(model)

    def scored(states: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        logits = head(states)
        return token_logps(logits, targets[part]), token_kl(anchor.logits(part), logits)

    found = []
    vocabulary = unwrapped(model).config.get_text_config().vocab_size
    for part in position_chunks(len(targets), vocabulary):
        if torch.is_grad_enabled():
            found.append(checkpoint(scored, hidden[part], part, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(scored(hidden[part], part))
    logps, divergences = zip(*found, strict=True)
    return torch.cat(logps), torch.cat(divergences)
