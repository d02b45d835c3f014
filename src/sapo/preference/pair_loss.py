"""The configured loss of a batch of pairs: objective, likelihood term, guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sapo.preference.objectives import LossType, ReferenceLogps, chosen_nll, dpo_loss, orpo_loss
from sapo.preference.scoring import PairScores


class LossOptions(Protocol):
    """The options of `SAPOConfig` that the loss reads, described there."""

    objective: str
    beta: float
    loss_type: Sequence[LossType]
    loss_weights: Sequence[float] | None
    chosen_nll_weight: float
    dpop_weight: float
    label_smoothing: float
    nce_shift: float
    nce_negative_weight: float
    kl_weight: float


class PairLoss(NamedTuple):
    """Loss of a batch of B pairs.

    `loss` is a scalar with gradients; `losses` are the B pairs' terms in nats; `metrics` are means over the batch.
    """

    loss: Tensor
    losses: list[float]
    metrics: dict[str, float]


def pair_loss(
    scores: PairScores,
    reference: ReferenceLogps | None,
    args: LossOptions,
    replayed: Sequence[bool] = (),
    draws: Sequence[int] | None = None,
) -> PairLoss:
    """Mean loss over the pairs, and the metrics of the batch.

    Args:
        scores: log-probabilities of the policy, with gradients.
        reference: log-probabilities of the reference; None counts as 0.
        args: objective, its form and its guards.
        replayed: whether each pair is self-replay: a response alone, whose loss is its negative log-likelihood per
            token, times `chosen_nll_weight` where that is set. Empty: none is.
        draws: the weight of each pair in all means, how often it is in the batch; None: once.

    Returns:
        The loss, and as metrics `loss`, `nll_loss` (with a likelihood term), `kl_loss` (with `kl_weight`), `rewards/*`
        and `logps/*`, these of the pairs that are not self-replay, and `self_replay/nll_loss`. If the loss excludes the
        shared tokens of both responses (see `SAPOConfig.scores_shared`), so do the metrics.
    """
    weights = None if draws is None else scores.chosen_logps.new_tensor(draws) / sum(draws)

    def mean(values: Tensor, among: Tensor | None = None) -> Tensor:
        if weights is None:
            return (values if among is None else values[among]).mean()
        if among is None:
            return (values * weights).sum()
        return (values * weights)[among].sum() / weights[among].sum()

    metrics: dict[str, Tensor] = {}
    nll = chosen_nll(scores.chosen_logps, scores.chosen_lengths)
    # None where no pair is self-replay: indexing would wait for the device.
    own = torch.tensor([not one for one in replayed], device=nll.device) if any(replayed) else None
    if own is not None:
        metrics["self_replay/nll_loss"] = mean(nll, ~own)
    if args.objective == "sft":
        return _sft_loss(scores, nll, own, args, metrics, mean)
    if own is not None and all(replayed):
        losses = (args.chosen_nll_weight or 1.0) * nll
        return _with_values(mean(losses), losses, metrics | {"loss": mean(losses)})
    if args.objective == "orpo":
        pair = orpo_loss(
            scores.chosen_logps / scores.chosen_lengths.clamp(min=1),
            scores.rejected_logps / scores.rejected_lengths.clamp(min=1),
            beta=args.beta,
        )
        terms = _of_pairs(pair.losses, own)
        likelihood = mean(nll) if scores.all_positions_nll is None else scores.all_positions_nll
        loss = likelihood + mean(terms)
        losses = nll + terms
        metrics["nll_loss"] = likelihood if own is None else mean(nll, own)
    else:
        zero = torch.zeros_like(scores.chosen_logps)
        terms = torch.zeros_like(scores.chosen_logps)
        for loss_type, weight in zip(args.loss_type, args.loss_weights or [1.0] * len(args.loss_type), strict=True):
            pair = dpo_loss(
                scores.chosen_logps,
                scores.rejected_logps,
                zero if reference is None else reference.chosen_logps,
                zero if reference is None else reference.rejected_logps,
                beta=args.beta,
                loss_type=loss_type,
                chosen_lengths=scores.chosen_lengths,
                rejected_lengths=scores.rejected_lengths,
                dpop_weight=args.dpop_weight,
                label_smoothing=args.label_smoothing,
                nce_shift=args.nce_shift,
                nce_negative_weight=args.nce_negative_weight,
            )
            # Times 1 and plus 0, a single form stays as it is, to the last bit.
            terms = terms + weight * pair.losses
        losses = _of_pairs(terms, own)
        if args.chosen_nll_weight:
            losses = losses + args.chosen_nll_weight * nll
            metrics["nll_loss"] = mean(nll, own)
        elif own is not None:
            losses = torch.where(own, losses, nll)
        loss = mean(losses)
    margins = pair.chosen_rewards - pair.rejected_rewards
    metrics |= {
        "loss": loss,
        "rewards/chosen": mean(pair.chosen_rewards, own),
        "rewards/rejected": mean(pair.rejected_rewards, own),
        "rewards/margins": mean(margins, own),
        # A tie counts half: at the first step, where policy and reference are equal, that is a half and not nothing.
        "rewards/accuracies": mean((margins > 0).float() + 0.5 * (margins == 0).float(), own),
        "logps/chosen": mean(scores.chosen_logps, own),
        "logps/rejected": mean(scores.rejected_logps, own),
    }
    return _with_values(loss, losses, metrics)


def _of_pairs(losses: Tensor, own: Tensor | None) -> Tensor:
    """A term of the pairs, 0 for self-replay."""
    return losses if own is None else torch.where(own, losses, torch.zeros_like(losses))


def _sft_loss(
    scores: PairScores,
    nll: Tensor,
    own: Tensor | None,
    args: LossOptions,
    metrics: dict[str, Tensor],
    mean: Callable[..., Tensor],
) -> PairLoss:
    """Mean over responses of the mean over a response's tokens: weighted log-likelihood, and divergence from the start.

    ASFT (arXiv 2509.23753); the weights alone: dynamic fine-tuning (arXiv 2508.05629).
    """
    losses = nll
    if scores.weighted_logps is not None:
        losses = chosen_nll(scores.weighted_logps, scores.chosen_lengths)
    if scores.divergences is not None:
        divergence = scores.divergences / scores.chosen_lengths.clamp(min=1)
        losses = losses + args.kl_weight * divergence
        metrics["kl_loss"] = mean(divergence)
    loss = mean(losses)
    metrics["loss"] = loss
    if own is None or bool(own.any()):
        metrics["nll_loss"] = mean(nll, own)
        metrics["logps/chosen"] = mean(scores.chosen_logps, own)
    return _with_values(loss, losses, metrics)


def _with_values(loss: Tensor, losses: Tensor, metrics: dict[str, Tensor]) -> PairLoss:
    # One transfer for all metrics.
    means = torch.stack([value.detach().float() for value in metrics.values()])
    values = torch.cat([means, losses.detach().float()]).tolist()
    return PairLoss(loss, values[len(metrics) :], dict(zip(metrics, values, strict=False)))
