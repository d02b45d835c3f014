"""What a model kept of its start: exact divergence from it, teacher-forced on the start's own replies.

Forgetting follows KL(start || model) on the prompts of the new task (arXiv 2509.04259). It is measured here token by
token over the full vocabulary, on replies that the start generated once: no sampling noise lies between two models.
Of the start only its hidden states on these replies and its head are kept, so that a run needs no second model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sapo.generation.forward import frozen
from sapo.generation.protocol import Generator
from sapo.generation.sampling import Sampling
from sapo.measures.intervals import Estimate, bootstrap_ratio
from sapo.preference.batches import batches_by_length
from sapo.preference.objectives import token_logps
from sapo.preference.token_distributions import Head, hidden_at, position_chunks, token_kl
from sapo.seeds import derive_seed

REPLY_TOKENS = 64
"""Maximum tokens of a reply of the start."""
REPLY_SAMPLING = Sampling(1.0, 0, 1.0)
"""Replies are the start's own distribution: temperature 1, nothing cut off."""


def spread(count: int, total: int) -> list[int]:
    """Indices of `count` of `total` items, evenly spread; all of them if there are fewer."""
    count = min(count, total)
    return [place * total // count for place in range(count)]


@dataclass(frozen=True, slots=True)
class Forced:
    """A prompt and a fixed reply, as token ids; the reply is scored, never generated."""

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]


def generate_replies(
    generator: Generator, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, max_length: int
) -> list[list[int]]:
    """The start's reply to each prompt, all shorter than `max_length`; the seed of each is its place in the list."""
    return generator.generate(
        prompts,
        [min(max_new_tokens, max_length - len(prompt)) for prompt in prompts],
        [derive_seed("start reply", place) for place in range(len(prompts))],
    )


@dataclass(frozen=True, slots=True)
class ForcedScore:
    """Scores of a model on one fixed reply: sums over its tokens.

    Attributes:
        logp: log-probability in nats.
        kl: KL(start || model) in nats; None if it was not asked for.
        tokens: tokens of the reply.
    """

    logp: float
    kl: float | None
    tokens: int


@dataclass(frozen=True, slots=True)
class StartStates:
    """The start on fixed replies.

    Attributes:
        hidden: states before the head, on the host, of each reply, `[tokens, H]`.
        head: the start's, which training does not change: see `fixed_head`.
    """

    hidden: tuple[Tensor, ...] | list[Tensor]
    head: Head


def states_of(model: nn.Module, rows: Sequence[Forced], *, pad_token_id: int, batch_size: int) -> list[Tensor]:
    """Hidden states before the head at each token of each reply, on the host, in the model's type."""
    found: list[Tensor] = [torch.empty(0)] * len(rows)

    def keep(place: int, hidden: Tensor, _: Tensor) -> None:
        found[place] = hidden.cpu()

    _each(model, rows, keep, pad_token_id=pad_token_id, batch_size=batch_size)
    return found


def fixed_head(model: nn.Module) -> Head:
    """The head of a model as it is now: a copy where training changes it."""
    head = Head.of(model)
    if not has_trained_head(model):
        return head
    return Head(copy.deepcopy(head.module).requires_grad_(False), head.scale, head.cap)


def has_trained_head(model: Any) -> bool:
    """Whether the output head, or an adapter on it, is trained."""
    head = model.get_output_embeddings()
    return isinstance(head, BaseTunerLayer) or any(weight.requires_grad for weight in head.parameters())


def score_forced(
    model: nn.Module, rows: Sequence[Forced], start: StartStates | None, *, pad_token_id: int, batch_size: int
) -> list[ForcedScore]:
    """Likelihood of each fixed reply and, with `start`, the divergence from it; nothing is sampled.

    Args:
        model: a causal language model, not sharded.
        rows: replies of at least one token.
        start: states on the same rows in the same order; None for likelihoods alone.
        pad_token_id: pads the rows.
        batch_size: rows computed together; it does not change the result beyond floating point.
    """
    head, found = Head.of(model), [ForcedScore(0.0, None, 0)] * len(rows)

    def score(place: int, hidden: Tensor, targets: Tensor) -> None:
        logp, divergence = 0.0, 0.0
        vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
        for part in position_chunks(len(targets), vocabulary):
            if start is not None:
                before = start.head(start.hidden[place][part].to(hidden.device))
            logits = head(hidden[part])
            logp += float(token_logps(logits, targets[part]).double().sum())
            if start is not None:
                divergence += float(token_kl(before, logits).double().sum())
        found[place] = ForcedScore(logp, None if start is None else divergence, len(targets))

    _each(model, rows, score, pad_token_id=pad_token_id, batch_size=batch_size)
    return found


def _each(
    model: nn.Module,
    rows: Sequence[Forced],
    use: Callable[[int, Tensor, Tensor], None],
    *,
    pad_token_id: int,
    batch_size: int,
) -> None:
    """Call `use` with the index, hidden states and tokens of each reply."""
    pairs, device = [(row.prompt_ids, row.reply_ids) for row in rows], next(model.parameters()).device
    with frozen(model):
        for places, batch in batches_by_length(pairs, pad_token_id=pad_token_id, batch_size=batch_size):
            laid = batch.to(device)
            hidden, targets = hidden_at(model, laid), laid.targets.flatten()[laid.places]
            lengths = laid.lengths.tolist()
            for place, states, tokens in zip(
                places, torch.split(hidden, lengths), torch.split(targets, lengths), strict=True
            ):
                use(place, states, tokens)


def kl_estimate(scores: Sequence[ForcedScore], **options: int) -> Estimate | None:
    """KL(start || model) in nats per token, with a bootstrap over replies; None without scores."""
    return bootstrap_ratio([one.kl or 0.0 for one in scores], [one.tokens for one in scores], **options)


def nll_estimate(scores: Sequence[ForcedScore], **options: int) -> Estimate | None:
    """Negative log-likelihood in nats per token of the same replies."""
    return bootstrap_ratio([-one.logp for one in scores], [one.tokens for one in scores], **options)


def gain_estimate(after: Sequence[ForcedScore], before: Sequence[ForcedScore], **options: int) -> Estimate | None:
    """Rise of the log-likelihood of the same replies in nats per token, paired by reply."""
    rises = [one.logp - other.logp for one, other in zip(after, before, strict=True)]
    return bootstrap_ratio(rises, [one.tokens for one in after], **options)


def summarize_retention(
    scores: Mapping[str, Sequence[ForcedScore]], samples: Sequence[Mapping[str, float]], *, seed: int
) -> dict[str, Estimate]:
    """The measures of the retention suite by name, without undefined ones.

    Args:
        scores: "general" and perhaps "task", the scores on the start's replies.
        samples: `reply_values` of the model's own replies to the general prompts.
        seed: seed of the resampling.
    """
    found: dict[str, Estimate | None] = {}
    for group, rows in scores.items():
        found[f"kl_{group}"] = kl_estimate(rows, seed=seed)
        found[f"nll_{group}"] = nll_estimate(rows, seed=seed)
    for name in ("ended", "length", "loops"):
        found[name] = bootstrap_ratio([values[name] for values in samples], seed=seed)
    return {name: estimate for name, estimate in found.items() if estimate is not None}
