"""Pairs to model inputs, in two layouts: plain, one row per response; shared, one packed row without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from sapo.preference.objectives import IGNORE
from sapo.preference.pairs import Pair
from sapo.preference.segments import Suffix
from sapo.preference.shared_prefix import PairSpan, SharedPrefixes

Layout = Literal["plain", "shared"]
Rows = TypeVar("Rows", bound="ScoredRows")

_PARTS = 3
"""Sums per pair: chosen response only, rejected response only, shared tokens."""


MAX_PADDING = 0.15
"""Maximum fraction of padding in a pass of several pairs in the plain layout."""


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Model inputs, and the assignment of predictions to log-probability sums.

    Attributes:
        input_ids: `[R, L]` tokens, right-padded.
        attention_mask: `[R, L]`, 1 where there is a token, by length and never by token value: a prompt may contain
            the pad or EOS token (departure 4). None with shared prefixes.
        targets: `[R, L]` the token that each position predicts; `IGNORE` where it is not scored.
        owners: `[R, L]` index of the sum that each scored position belongs to, in `[0, sums)`.
        places: `[M]` indices of the scored positions in the flattened rows, computed on the host to avoid a
            synchronization.
        lengths: `[sums]` number of scored positions of each sum.
        sums: number of sums.
        tokens: tokens that are not padding.
        position_ids: `[R, L]`; None where they are 0, 1, 2, ... in each row.
        prefixes: with shared prefixes, the spans of the pairs in the packed row.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    targets: Tensor
    owners: Tensor
    places: Tensor
    lengths: Tensor
    sums: int
    tokens: int
    position_ids: Tensor | None = None
    prefixes: SharedPrefixes | None = None

    def to(self: Rows, device: torch.device | str) -> Rows:
        """The same on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, slots=True)
class PairBatch(ScoredRows):
    """B pairs. Sum i is chosen response i, B + i rejected response i, 2B + i their shared tokens.

    With `all_positions` there is one more sum, of all other positions of the chosen rows including padding, so that
    the published likelihood term of ORPO is a mean over `all_positions` predictions.

    `draws` tells how often each pair was drawn for the micro-batch; None where each was drawn once.
    """

    pairs: int = 0
    all_positions: int = 0
    draws: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.pairs

    @property
    def drawn(self) -> int:
        """Number of draws that these pairs are."""
        return self.pairs if self.draws is None else sum(self.draws)


def collate_pairs(
    pairs: Sequence[Pair],
    *,
    pad_token_id: int,
    suffix: Suffix = "keep",
    layout: Layout = "plain",
    score_shared: bool = True,
    all_positions: bool = False,
) -> PairBatch:
    """Arrange `pairs` in a layout.

    Args:
        pairs: at least one.
        pad_token_id: any token id, since padding is known by length.
        suffix: with "mask", the text after the regenerated segment of a rejected response is present but not scored.
        layout: "plain" is `[2B, L]`, the chosen responses first; "shared" one row, see `shared_prefix`.
        score_shared: also score the beginning A that both responses share. Its terms cancel in a difference of
            log-probabilities, so the DPO loss does not need it.
        all_positions: score everything in the chosen rows (plain layout only).

    Raises:
        ValueError: no pairs, or `all_positions` with shared prefixes.
    """
    if not pairs:
        raise ValueError("a batch needs at least one pair")
    if layout == "shared":
        if all_positions:
            raise ValueError("all_positions counts padding, but the shared layout has none")
        return _packed(pairs, suffix, score_shared)
    rows = [_ScoredSequence(p.prompt_ids, p.chosen_ids, _first(p, score_shared), len(p.chosen_ids)) for p in pairs]
    count, places = len(pairs), list(range(len(pairs)))
    for place, pair in enumerate(pairs):
        if not pair.is_sft:
            rows.append(
                _ScoredSequence(pair.prompt_ids, pair.rejected_ids, _first(pair, score_shared), _stop(pair, suffix))
            )
            places.append(count + place)
    input_ids, attention_mask, targets = _padded(rows, pad_token_id)
    owners = torch.tensor(places)[:, None].expand_as(targets).contiguous()
    sums, positions = _PARTS * count, 0
    if all_positions:
        others = targets[:count, :-1] == IGNORE
        owners[:count, :-1][others] = sums
        targets[:count, :-1] = input_ids[:count, 1:]
        sums, positions = sums + 1, targets[:count, :-1].numel()
    return PairBatch(
        input_ids,
        attention_mask,
        targets,
        owners,
        *_scored(targets, owners, sums),
        sums,
        int(attention_mask.sum()),
        pairs=count,
        all_positions=positions,
    )


def split_pairs(
    pairs: Sequence[Pair],
    limit: int | None,
    *,
    layout: Layout,
    tokens: int | None = None,
    equal_passes: bool = False,
    least: int = 1,
) -> list[list[Pair]]:
    """Divide the pairs of a micro-batch into passes of at most `limit` pairs.

    In the plain layout pairs of like length go together, and a pass ends where one more pair would make its padding
    more than `MAX_PADDING`. In the shared layout, which has no padding, passes get alike numbers of tokens, for the
    least memory. With `tokens`, each pair in turn, the longest first, goes to the first pass that has room for it.

    Args:
        pairs: at least one.
        limit: maximum number of pairs of a pass; None for all.
        layout: of each pass.
        tokens: maximum number of tokens of a pass, padding included; a pair that has more is alone. None for no limit.
        equal_passes: let the number of passes depend on the number of pairs alone, so that all processes take the same:
            those that gather weights in each pass must. With `tokens` they have to agree on `least`.
        least: number of passes that there have to be, at most one for each pair; counts with `tokens`.
    """
    longest_first = sorted(pairs, key=lambda p: -max(_lengths(p)))
    if tokens is not None:
        return _within(longest_first, limit or len(pairs), tokens, layout, least, padded=equal_passes)
    if (limit is None or limit >= len(pairs)) and (layout == "shared" or equal_passes):
        return [list(pairs)]
    limit = limit or len(pairs)
    if layout == "plain":
        if equal_passes:
            return [longest_first[place : place + limit] for place in range(0, len(pairs), limit)]
        return _alike(longest_first, limit)
    passes = -(-len(pairs) // limit)
    # Dealt in alternating direction, so that the pass with the longer pair of one round gets a shorter one next.
    parts: list[list[Pair]] = [[] for _ in range(passes)]
    for place, pair in enumerate(longest_first):
        turn, seat = divmod(place, passes)
        parts[seat if turn % 2 == 0 else passes - 1 - seat].append(pair)
    return parts


def pass_tokens(pairs: Sequence[Pair], layout: Layout) -> int:
    """Tokens of the rows that `pairs` are laid out in, padding included."""
    lengths = [_lengths(pair) for pair in pairs]
    if layout == "plain":
        return sum(1 if pair.is_sft else 2 for pair in pairs) * max(map(max, lengths))
    # The rejected response repeats one token of what both share.
    shared = [max(0, len(pair.prompt_ids) + pair.segment.start - 1) for pair in pairs]
    return sum(sum(length) - visible for length, visible in zip(lengths, shared, strict=True))


def padding_share(pairs: Sequence[Pair]) -> float:
    """Fraction of padding in the plain layout of `pairs`."""
    lengths = [length for pair in pairs for length in _lengths(pair)]
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


def _lengths(pair: Pair) -> tuple[int, int]:
    return len(pair.prompt_ids) + len(pair.chosen_ids), len(pair.prompt_ids) + len(pair.rejected_ids)


def _alike(longest_first: Sequence[Pair], limit: int) -> list[list[Pair]]:
    parts: list[list[Pair]] = []
    for pair in longest_first:
        if parts and len(parts[-1]) < limit and padding_share([*parts[-1], pair]) <= MAX_PADDING:
            parts[-1].append(pair)
        else:
            parts.append([pair])
    return parts


def _within(
    longest_first: Sequence[Pair], most: int, tokens: int, layout: Layout, least: int, *, padded: bool
) -> list[list[Pair]]:
    parts: list[list[Pair]] = []
    for pair in longest_first:
        for part in parts:
            more = [*part, pair]
            little_padding = layout == "shared" or padded or padding_share(more) <= MAX_PADDING
            if len(part) < most and little_padding and pass_tokens(more, layout) <= tokens:
                part.append(pair)
                break
        else:
            parts.append([pair])
    while len(parts) < min(least, len(longest_first)):
        # The pass of the most tokens among those of several pairs is halved.
        largest = max((part for part in parts if len(part) > 1), key=lambda part: pass_tokens(part, layout))
        parts.append(largest[1::2])
        largest[:] = largest[::2]
    return parts


def collate_responses(rows: Sequence[tuple[Sequence[int], Sequence[int], int]], *, pad_token_id: int) -> ScoredRows:
    """Arrange rows of (prompt, response, number of response tokens to score), one sum per row."""
    input_ids, attention_mask, targets = _padded(
        [_ScoredSequence(prompt, response, 0, scored) for prompt, response, scored in rows], pad_token_id
    )
    owners = torch.arange(len(rows))[:, None].expand_as(targets).contiguous()
    scored, tokens = _scored(targets, owners, len(rows)), int(attention_mask.sum())
    return ScoredRows(input_ids, attention_mask, targets, owners, *scored, len(rows), tokens)


def batches_by_length(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_token_id: int, batch_size: int
) -> Iterator[tuple[list[int], ScoredRows]]:
    """Rows of (prompt, response) in batches of similar lengths, for little padding, with their places in `rows`.

    The batches depend on the lengths alone, so that equal models give equal numbers.
    """
    order = sorted(range(len(rows)), key=lambda place: sum(map(len, rows[place])))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        chosen = [(*rows[place], len(rows[place][1])) for place in places]
        yield places, collate_responses(chosen, pad_token_id=pad_token_id)


def _scored(targets: Tensor, owners: Tensor, sums: int) -> tuple[Tensor, Tensor]:
    """`places` and `lengths` of `ScoredRows`."""
    places = (targets != IGNORE).flatten().nonzero()[:, 0]
    return places, torch.bincount(owners.flatten()[places], minlength=sums)


@dataclass(frozen=True, slots=True)
class _ScoredSequence:
    """A prompt and a response, with the response tokens in `[first, stop)` scored."""

    prompt: Sequence[int]
    response: Sequence[int]
    first: int
    stop: int

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.response]

    @property
    def targets(self) -> list[int]:
        """The token that each position predicts; no position predicts the first token."""
        start = len(self.prompt)
        labels = [IGNORE] * (start + self.first) + list(self.response[self.first : self.stop])
        labels += [IGNORE] * (start + len(self.response) - len(labels))
        return [*labels[1:], IGNORE]


def _first(pair: Pair, score_shared: bool) -> int:
    # Of a response alone nothing cancels.
    return 0 if score_shared or pair.is_sft else pair.segment.start


def _stop(pair: Pair, suffix: Suffix) -> int:
    return pair.rewritten.stop if suffix == "mask" else len(pair.rejected_ids)


def _padded(rows: Sequence[_ScoredSequence], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(row.prompt) + len(row.response) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORE)
    for place, row in enumerate(rows):
        length = len(row.prompt) + len(row.response)
        input_ids[place, :length] = torch.tensor(row.ids)
        attention_mask[place, :length] = 1
        targets[place, :length] = torch.tensor(row.targets)
    return input_ids, attention_mask, targets


def _packed(pairs: Sequence[Pair], suffix: Suffix, score_shared: bool) -> PairBatch:
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    spans = []
    count = len(pairs)
    for place, pair in enumerate(pairs):
        shared = pair.segment.start
        chosen = _ScoredSequence(pair.prompt_ids, pair.chosen_ids, _first(pair, score_shared), len(pair.chosen_ids))
        rejected = _ScoredSequence(pair.prompt_ids, pair.rejected_ids, shared, _stop(pair, suffix))
        prefix = len(pair.prompt_ids) + shared
        # Prompt and A without the last token, which the branch repeats; with neither there is nothing to repeat.
        visible = max(0, prefix - 1)
        branch = rejected.ids[visible:]
        start, middle = len(ids), len(ids) + len(chosen.ids)
        spans.append(PairSpan(start, middle, middle + len(branch), visible))
        ids += chosen.ids + branch
        positions += [*range(len(chosen.ids)), *range(visible, visible + len(branch))]
        targets += chosen.targets + rejected.targets[visible:]
        owners += [2 * count + place] * visible + [place] * (len(chosen.ids) - visible) + [count + place] * len(branch)
    label, owner = torch.tensor([targets]), torch.tensor([owners])
    places, lengths = _scored(label, owner, _PARTS * count)
    return PairBatch(
        input_ids=torch.tensor([ids]),
        attention_mask=None,
        targets=label,
        owners=owner,
        places=places,
        lengths=lengths,
        sums=_PARTS * count,
        tokens=len(ids),
        position_ids=torch.tensor([positions]),
        prefixes=SharedPrefixes(tuple(spans)),
        pairs=count,
    )
