"""Losses from log-probabilities. Pure functions on tensors: no model, no configuration, no state.

Sources: DPO (Rafailov et al. 2023, eq. 7), hinge (SLiC, Zhao et al. 2023), IPO (Azar et al. 2023, eq. 17),
ORPO (Hong et al. 2024, eqs. 4 to 7), DPO-Positive (Pal et al. 2024, eq. 4), SAPO (arXiv 2405.20830, eqs. 5 and 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LossType = Literal["sigmoid", "hinge", "ipo", "nce"]

IGNORE = -100
"""Label of a position that is not scored, as in PyTorch."""

_LEAST_GAP = 1e-12


class PairLosses(NamedTuple):
    """Loss and rewards of each pair, shape `[B]`; the rewards carry no gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """Summed log-probabilities in nats under the reference, each `[B]`."""

    chosen_logps: Tensor
    rejected_logps: Tensor

    def to(self, device: torch.device | str) -> ReferenceLogps:
        """The same on `device`."""
        return ReferenceLogps(self.chosen_logps.to(device), self.rejected_logps.to(device))


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, in float32 at least.

    Args:
        logits: `[..., T, V]`, position t predicting `targets[..., t]`.
        targets: `[..., T]` token ids; `IGNORE` gives 0.

    Returns:
        `[..., T]` natural logarithms.
    """
    logps: Tensor = _TokenLogps.apply(logits, targets)  # type: ignore[no-untyped-call]
    return logps


class _TokenLogps(torch.autograd.Function):
    """`token_logps` with a backward pass that allocates one tensor of the logits' size instead of four.

    The gradient of log p(target) is the target's indicator minus the softmax.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        scored = targets != IGNORE
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        picked = wide.gather(-1, targets.masked_fill(~scored, 0).unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(logits, targets)
        return (picked - wide.logsumexp(-1)).masked_fill(~scored, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        scored = targets != IGNORE
        weights = gradient.masked_fill(~scored, 0.0).unsqueeze(-1)
        found = torch.softmax(logits, -1, dtype=gradient.dtype).mul_(-weights)
        found.scatter_add_(-1, targets.masked_fill(~scored, 0).unsqueeze(-1), weights)
        return found.to(logits.dtype), None


def sequence_logps(logits: Tensor, labels: Tensor, *, average: bool = False) -> Tensor:
    """Log-probability of each sequence's labelled tokens: their sum, or their mean.

    Args:
        logits: `[N, L, V]`, position t predicting token t + 1.
        labels: `[N, L]` token ids at their own positions; `IGNORE` where not scored. The first position has no
            prediction and is never scored.
        average: divide by the number of scored tokens.

    Returns:
        `[N]`; 0 for a sequence without scored tokens.
    """
    targets = labels[:, 1:]
    summed = token_logps(logits[:, :-1], targets).sum(-1)
    return summed / (targets != IGNORE).sum(-1).clamp(min=1) if average else summed


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    dpop_weight: float = 0.0,
    label_smoothing: float = 0.0,
    nce_shift: float = 0.0,
    nce_negative_weight: float = 1.0,
) -> PairLosses:
    """Pairwise loss on log-ratios to the reference.

    With margin m = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)): sigmoid is
    -log sigmoid(beta m), hinge is max(0, 1 - beta m), ipo is (m - 1 / (2 beta))^2 with each log-ratio divided by
    its response's length, as trl does. nce takes the log-ratios r_w and r_l apart:
    -log sigmoid(beta r_w + shift) - weight log sigmoid(-(beta r_l + shift)). SPACE (arXiv 2512.07175) with mu is
    beta 1, shift -log mu, weight mu; GSIL in its Bernoulli form (arXiv 2410.10093) and NCA (arXiv 2402.05369) have
    weight 1.

    Args:
        policy_chosen_logps: `[B]` summed log-probabilities in nats; the three others likewise.
        policy_rejected_logps: `[B]`.
        reference_chosen_logps: `[B]`.
        reference_rejected_logps: `[B]`.
        beta: strength of the penalty for moving away from the reference.
        loss_type: "sigmoid", "hinge", "ipo" or "nce".
        chosen_lengths: `[B]` scored tokens; needed by "ipo".
        rejected_lengths: `[B]` scored tokens; needed by "ipo".
        dpop_weight: lambda of DPO-Positive: the margin loses lambda max(0, log ref(chosen) - log pi(chosen)), so
            that lowering both responses cannot raise it.
        label_smoothing: of "sigmoid": probability that a pair's labels are swapped.
        nce_shift: of "nce".
        nce_negative_weight: of "nce".

    Raises:
        ValueError: "ipo" without lengths, or an unknown `loss_type`.
    """
    chosen_ratio = policy_chosen_logps - reference_chosen_logps
    rejected_ratio = policy_rejected_logps - reference_rejected_logps
    chosen_score, rejected_score = chosen_ratio, rejected_ratio
    if loss_type == "ipo":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError('loss_type="ipo" needs chosen_lengths and rejected_lengths')
        chosen_score = chosen_ratio / chosen_lengths.clamp(min=1)
        rejected_score = rejected_ratio / rejected_lengths.clamp(min=1)
    margin = chosen_score - rejected_score
    if dpop_weight:
        margin = margin - dpop_weight * F.relu(-chosen_score)
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)
    elif loss_type == "hinge":
        losses = F.relu(1 - beta * margin)
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif loss_type == "nce":
        losses = -F.logsigmoid(beta * chosen_ratio + nce_shift)
        losses = losses - nce_negative_weight * F.logsigmoid(-(beta * rejected_ratio + nce_shift))
    else:
        raise ValueError(f'loss_type="{loss_type}": must be sigmoid, hinge, ipo or nce')
    return PairLosses(losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach())


def log_odds(average_logps: Tensor) -> Tensor:
    """Log odds of a length-averaged log-probability: x - log(1 - e^x), elementwise.

    Finite with a finite gradient for every x <= 0. The published float32 formula computes e^x first and gives inf
    and NaN near both ends: departure 8.
    """
    below_one = average_logps.clamp(max=-_LEAST_GAP)
    return average_logps - torch.log(-torch.expm1(below_one))


def orpo_loss(chosen_average_logps: Tensor, rejected_average_logps: Tensor, *, beta: float) -> PairLosses:
    """Odds-ratio term of ORPO, per pair: -beta log sigmoid(log odds(chosen) - log odds(rejected)).

    The full objective is `chosen_nll(...)` plus this term; they are separate so that each can be logged.

    Args:
        chosen_average_logps: `[B]` log-probabilities divided by the response's scored tokens.
        rejected_average_logps: `[B]`, likewise.
        beta: weight of the term (lambda in the ORPO paper).
    """
    ratio = log_odds(chosen_average_logps) - log_odds(rejected_average_logps)
    return PairLosses(
        -beta * F.logsigmoid(ratio),
        beta * chosen_average_logps.detach(),
        beta * rejected_average_logps.detach(),
    )


def chosen_nll(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Negative log-likelihood of each chosen response per scored token, `[B]` in nats.

    ORPO's likelihood term and the `chosen_nll_weight` guard. Averaged within a pair and then over pairs, it depends
    neither on the rejected response nor on the rest of the batch, so accumulation and data parallelism are exact.
    """
    return -chosen_logps / chosen_lengths.clamp(min=1)
