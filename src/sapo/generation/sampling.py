"""From logits to the next token, as pure functions of tensors.

The distribution is that of transformers' chain of warpers (temperature, then top-k, then top-p); top-p looks
only at the tokens that top-k left, which gives the same distribution without sorting the vocabulary. A token
is drawn by inverting the cumulative distribution at a uniform number that belongs to the row, so that no
generator state is shared between rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sapo.errors import ConfigurationError

INVALID_TOKEN = -1
"""What `sample_tokens` gives a row without distribution: one with a nan, an infinity, or nothing but -inf."""

# top-k keeps every token that ties with the k-th. Fetching a few more than k finds such ties, which are
# common in bfloat16; only when all of these tie as well is the whole vocabulary looked at.
_TIE_MARGIN = 14


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; the defaults are the published settings.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: keep the k likeliest tokens, and those that tie with the k-th; 0 keeps all.
        top_p: of these, keep the smallest set of likeliest tokens whose probabilities reach p; 1.0 keeps all.

    Raises:
        ConfigurationError: a value outside its range.
    """

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigurationError(
                f"temperature={self.temperature}: must be finite, and 0 (always the likeliest token) or more"
            )
        if self.top_k < 0:
            raise ConfigurationError(f"top_k={self.top_k}: must be 1 or more, or 0 to keep the whole vocabulary")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p={self.top_p}: must be above 0 and at most 1.0, which keeps every token")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that seeds play no part."""
        return self.temperature == 0


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The distribution that the next token is drawn from.

    Args:
        logits: `[B, V]`, any floating type; -inf excludes a token.
        sampling: temperature, top-k and top-p.

    Returns:
        Probabilities `[B, K]` in float32, and the token ids `[B, K]` they belong to, ascending in each row. K
        is 1 when greedy, V without top-k, else a little more than k. Tokens that were filtered out have
        probability 0. A row with a nan, an infinity, or nothing but -inf, has nan for probabilities.
    """
    if sampling.greedy:
        best, ids = logits.max(-1, keepdim=True)
        return torch.where(best.isfinite(), 1.0, math.nan), ids
    scores, ids = _top_k(logits, sampling)
    if sampling.top_p < 1:
        scores = _top_p(scores, sampling.top_p)
    return scores.softmax(-1), ids


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token a row, by inverting the cumulative distribution.

    Tokens are laid out by id before summing. Rounding in the logits then only moves the borders between
    tokens; sorted by probability, two near-equal tokens would swap places and with them the outcome.

    Args:
        logits: `[B, V]`.
        uniforms: `[B]`, float64 in [0, 1), one a row; not read when greedy.
        sampling: temperature, top-k and top-p.

    Returns:
        Token ids `[B]`, int64; `INVALID_TOKEN` for a row that has no distribution.
    """
    device = logits.device
    if device.type == "mps":
        logits = logits.cpu()  # MPS has no float64
    probabilities, ids = filtered_probabilities(logits, sampling)
    if sampling.greedy:
        return torch.where(probabilities.isnan(), INVALID_TOKEN, ids)[:, 0].to(device)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    targets = uniforms.to(total.device, torch.float64)[:, None] * total
    # right=True: the first token whose cumulative probability exceeds the target, hence never one of
    # probability 0. The product stays below the total, uniforms being below 1; the clamp serves rows of nan,
    # marked just after.
    places = torch.searchsorted(cumulative, targets, right=True).clamp_(max=ids.shape[1] - 1)
    return torch.where(total.isnan(), INVALID_TOKEN, ids.gather(1, places))[:, 0].to(device)


def host_computes(device: torch.device) -> bool:
    """Whether reading a value from `device` costs nothing: elsewhere the host would wait for all that was launched."""
    return device.type == "cpu"


def _top_k(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Scores (logits over temperature, -inf where filtered) and token ids, `[B, K]` each, ids ascending."""
    vocabulary, k = logits.shape[-1], sampling.top_k
    wanted = k + _TIE_MARGIN
    # Whether the slice holds all ties is a question of values. Elsewhere the whole vocabulary is sorted on the device.
    if k and wanted < vocabulary and host_computes(logits.device):
        scores, ids = logits.topk(wanted, -1)
        scores = scores.float() / sampling.temperature
        kth = scores[:, k - 1 : k]
        if not (scores[:, -1:] >= kth).logical_and_(kth > -math.inf).any():
            ids, order = ids.sort(-1)
            scores = scores.masked_fill(scores < kth, -math.inf)
            return scores.gather(1, order), ids
    scores = logits.float() / sampling.temperature
    if 0 < k < vocabulary:
        kth = scores.topk(k, -1).values[:, -1:]
        # Less than, not "not at least": a nan must stay, so that it shows.
        scores = scores.masked_fill(scores < kth, -math.inf)
    return scores, torch.arange(vocabulary, device=scores.device).expand_as(scores)


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    """Put -inf where the probability of all likelier tokens reaches `top_p`.

    Summed from the unlikeliest upwards in float32, as `TopPLogitsWarper` does: the token that crosses the
    threshold stays, and so does the likeliest. Of equal tokens the ones of lower id go first (a stable sort),
    so that ties are resolved alike in every batch.
    """
    ascending, order = scores.sort(dim=-1, stable=True)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(1, order, removed), -math.inf)
