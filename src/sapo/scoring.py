"""Log-probabilities of a batch of pairs under a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sapo.batches import PairBatch
from sapo.objectives import IGNORE, published_orpo_nll, token_logps


class PairScores(NamedTuple):
    """Summed log-probabilities in nats and numbers of scored tokens, each `[B]`.

    `all_positions_nll` is ORPO's likelihood term as published, only when asked for.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    all_positions_nll: Tensor | None = None


def score(model: nn.Module, batch: PairBatch, *, all_positions: bool = False) -> PairScores:
    """Score the labelled tokens of `batch`.

    The head runs from the first labelled column on: the prompts' logits are never formed, unless `all_positions`
    asks for the published likelihood term, which averages over them and over the padding.

    Args:
        model: a causal language model, wrapped or not; gradients flow if they are enabled.
        batch: on the model's device.
        all_positions: also return `all_positions_nll`.
    """
    first = 1 if all_positions else batch.first_label
    logits = _logits_from(model, batch, first - 1)
    targets = batch.labels[:, first:]
    summed = token_logps(logits[:, :-1], targets).sum(-1)
    lengths = (targets != IGNORE).sum(-1)
    half = len(batch)
    nll = published_orpo_nll(logits[:half], batch.input_ids[:half]) if all_positions else None
    return PairScores(summed[:half], summed[half:], lengths[:half], lengths[half:], nll)


def response_logps(model: nn.Module, batch: PairBatch) -> Tensor:
    """Summed log-probability of each row's labelled tokens, `[rows]`, without gradients and in evaluation mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = _logits_from(model, batch, batch.first_label - 1)
            return token_logps(logits[:, :-1], batch.labels[:, batch.first_label :]).sum(-1)
    finally:
        model.train(training)


@torch.no_grad()
def score_frozen(model: nn.Module, batch: PairBatch) -> PairScores:
    """`score` without gradients and in evaluation mode, the model's mode restored."""
    training = model.training
    model.eval()
    try:
        return score(model, batch)
    finally:
        model.train(training)


def _logits_from(model: nn.Module, batch: PairBatch, first: int) -> Tensor:
    """Logits `[rows, L - first, V]` of the columns from `first` on."""
    kept = batch.input_ids.shape[1] - first
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=kept,
    ).logits
    # A model without `logits_to_keep` returns them all; the last `kept` are the same either way.
    return logits[:, -kept:]
