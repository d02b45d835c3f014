"""From logits to the next token, as pure functions of tensors.

The distribution equals that of transformers' warpers (temperature, then top-k, then top-p); top-p runs only on the
tokens that top-k keeps, which gives the same distribution without sorting the vocabulary. A token is drawn by
inverting the cumulative distribution at the row's own uniform number, so rows share no random state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sapo.errors import ConfigurationError

INVALID_TOKEN = -1
"""Result of `sample_tokens` for a row with NaN or infinite logits, or only -inf."""

UNDECIDED_TOKEN = -2
"""Result of `sample_tokens` for a row in which too many tokens tie with the k-th; the full vocabulary decides."""

# top-k keeps every token that ties with the k-th. Fetching a few more than k finds such ties, which are common in
# bfloat16; only if all of these tie too is the full vocabulary checked. A host sees that at once; on an accelerator it
# is seen with the tokens, after some steps that are then repeated, so that should hardly ever be.
_TIE_MARGIN, _TIE_MARGIN_UNSEEN = 14, 78


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; the defaults are the published settings.

    Attributes:
        temperature: divides the logits; 0 for greedy decoding.
        top_k: keep the k most probable tokens and ties with the k-th; 0 keeps all.
        top_p: of these, keep the smallest set of most probable tokens whose probabilities reach p; 1.0 keeps all.

    Raises:
        ConfigurationError: a value outside its range.
    """

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigurationError(f"temperature={self.temperature}: must be 0 (greedy) or a positive number.")
        if self.top_k < 0:
            raise ConfigurationError(f"top_k={self.top_k}: must be 1 or more, or 0 to keep the full vocabulary")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p={self.top_p}: must be above 0 and at most 1.0, which keeps every token")

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy, so that seeds have no effect."""
        return self.temperature == 0


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The distribution that the next token is drawn from.

    Args:
        logits: `[B, V]`, any floating type; -inf excludes a token.
        sampling: temperature, top-k and top-p.

    Returns:
        Probabilities `[B, K]` in float32, and the token ids `[B, K]` they belong to, ascending in each row. K
        is 1 when greedy, V without top-k, else a little more than k. Tokens that were filtered out have
        probability 0. A row with NaN, an infinity, or only -inf, has NaN probabilities.
    """
    probabilities, ids, _ = _filtered(logits, sampling, whole=not host_computes(logits.device))
    return probabilities, ids


def _filtered(logits: Tensor, sampling: Sampling, *, whole: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `filtered_probabilities`; and `[B, 1]`, the rows that are undecided, None if there are none for certain."""
    if sampling.greedy:
        best, ids = logits.max(-1, keepdim=True)
        return torch.where(best.isfinite(), 1.0, math.nan), ids, None
    scores, ids, undecided = _top_k(logits, sampling, whole=whole)
    if sampling.top_p < 1:
        scores = _top_p(scores, sampling.top_p)
    return scores.softmax(-1), ids, undecided


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling, *, whole: bool = False) -> Tensor:
    """Draw one token per row, by inverting the cumulative distribution.

    Probabilities are summed in order of token id. Rounding in the logits then only shifts the boundaries between
    tokens; in order of probability, two near-equal tokens would swap and change the outcome.

    Args:
        logits: `[B, V]`.
        uniforms: `[B]`, float64 in [0, 1), one per row; not read when greedy.
        sampling: temperature, top-k and top-p.
        whole: whether to look at the full vocabulary, so that no row is undecided. A host always decides.

    Returns:
        Token ids `[B]`, int64; `INVALID_TOKEN` for a row without a valid distribution, `UNDECIDED_TOKEN` for one that
        only the full vocabulary decides.
    """
    device = logits.device
    if device.type == "mps":
        logits = logits.cpu()  # MPS has no float64
    probabilities, ids, undecided = _filtered(logits, sampling, whole=whole)
    if sampling.greedy:
        return torch.where(probabilities.isnan(), INVALID_TOKEN, ids)[:, 0].to(device)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    targets = uniforms.to(total.device, torch.float64)[:, None] * total
    # right=True: the first token whose cumulative probability exceeds the target, so never one of probability 0.
    # Uniforms below 1 keep the product below the total; the clamp is for NaN rows, which are marked below.
    places = torch.searchsorted(cumulative, targets, right=True).clamp_(max=ids.shape[1] - 1)
    drawn = torch.where(total.isnan(), INVALID_TOKEN, ids.gather(1, places))
    if undecided is not None:
        drawn = torch.where(undecided, UNDECIDED_TOKEN, drawn)
    return drawn[:, 0].to(device)


def host_computes(device: torch.device) -> bool:
    """Whether `device` is the host, so that reading a value does not wait for an accelerator."""
    return device.type == "cpu"


def _top_k(logits: Tensor, sampling: Sampling, *, whole: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores (logits over temperature, -inf where filtered) and token ids, `[B, K]` each, ids ascending; undecided."""
    vocabulary, k, on_host = logits.shape[-1], sampling.top_k, host_computes(logits.device)
    wanted = k + (_TIE_MARGIN if on_host else _TIE_MARGIN_UNSEEN)
    if k and wanted < vocabulary and not whole:
        scores, ids = logits.topk(wanted, -1)
        scores = scores.float() / sampling.temperature
        kth = scores[:, k - 1 : k]
        undecided = (scores[:, -1:] >= kth).logical_and_(kth > -math.inf)
        if not (on_host and undecided.any()):
            ids, order = ids.sort(-1)
            # `<`, not `not >=`: a NaN must stay visible.
            scores = scores.masked_fill(scores < kth, -math.inf)
            return scores.gather(1, order), ids, None if on_host else undecided
    scores = logits.float() / sampling.temperature
    if 0 < k < vocabulary:
        kth = scores.topk(k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
    return scores, torch.arange(vocabulary, device=scores.device).expand_as(scores), None


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    """Set tokens to -inf where the more probable ones already reach `top_p`.

    Summed from the least probable upwards in float32, as in `TopPLogitsWarper`: the token that crosses the threshold
    is kept, and so is the most probable. Of equal tokens the lower ids are removed first (a stable sort), so ties are
    resolved identically in every batch.
    """
    ascending, order = scores.sort(dim=-1, stable=True)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(1, order, removed), -math.inf)
