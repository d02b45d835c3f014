"""The configured loss of a batch of pairs: objective, likelihood term, guards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sapo.config import SAPOConfig
from sapo.preference.objectives import ReferenceLogps, chosen_nll, dpo_loss, orpo_loss
from sapo.preference.scoring import PairScores


class PairLoss(NamedTuple):
    """Loss of a batch of B pairs.

    `loss` is a scalar with gradients; `losses` are the B pairs' terms in nats; `metrics` are means over the batch.
    """

    loss: Tensor
    losses: list[float]
    metrics: dict[str, float]


def pair_loss(scores: PairScores, reference: ReferenceLogps | None, args: SAPOConfig) -> PairLoss:
    """Mean loss over the pairs, and the metrics of the batch.

    Args:
        scores: log-probabilities of the policy, with gradients.
        reference: log-probabilities of the reference; None counts as 0.
        args: objective, its form and its guards.

    Returns:
        The loss, and as metrics `loss`, `nll_loss` (with a likelihood term), `rewards/*` and `logps/*`. If
        the loss excludes the shared tokens of both responses (see `SAPOConfig.scores_shared`), so do the metrics.
    """
    metrics: dict[str, Tensor] = {}
    nll = chosen_nll(scores.chosen_logps, scores.chosen_lengths)
    if args.objective == "sft":
        loss = nll.mean()
        return _with_values(loss, nll, {"loss": loss, "nll_loss": loss, "logps/chosen": scores.chosen_logps.mean()})
    if args.objective == "orpo":
        pair = orpo_loss(
            scores.chosen_logps / scores.chosen_lengths.clamp(min=1),
            scores.rejected_logps / scores.rejected_lengths.clamp(min=1),
            beta=args.beta,
        )
        likelihood = nll.mean() if scores.all_positions_nll is None else scores.all_positions_nll
        loss = likelihood + pair.losses.mean()
        losses = nll + pair.losses
        metrics["nll_loss"] = likelihood
    else:
        zero = torch.zeros_like(scores.chosen_logps)
        pair = dpo_loss(
            scores.chosen_logps,
            scores.rejected_logps,
            zero if reference is None else reference.chosen_logps,
            zero if reference is None else reference.rejected_logps,
            beta=args.beta,
            loss_type=args.loss_type,
            chosen_lengths=scores.chosen_lengths,
            rejected_lengths=scores.rejected_lengths,
            dpop_weight=args.dpop_weight,
        )
        losses = pair.losses
        if args.chosen_nll_weight:
            losses = losses + args.chosen_nll_weight * nll
        loss = losses.mean()
        if args.chosen_nll_weight:
            metrics["nll_loss"] = nll.mean()
    margins = pair.chosen_rewards - pair.rejected_rewards
    metrics |= {
        "loss": loss,
        "rewards/chosen": pair.chosen_rewards.mean(),
        "rewards/rejected": pair.rejected_rewards.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "logps/chosen": scores.chosen_logps.mean(),
        "logps/rejected": scores.rejected_logps.mean(),
    }
    return _with_values(loss, losses, metrics)


def _with_values(loss: Tensor, losses: Tensor, metrics: dict[str, Tensor]) -> PairLoss:
    # One transfer for all metrics.
    means = torch.stack([value.detach().float() for value in metrics.values()])
    values = torch.cat([means, losses.detach().float()]).tolist()
    return PairLoss(loss, values[len(metrics) :], dict(zip(metrics, values, strict=False)))
