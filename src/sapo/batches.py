"""Pairs to model inputs: the plain layout, one row a response, chosen rows first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapo.pairs import Pair
from sapo.segments import Suffix

_IGNORE = -100


@dataclass(frozen=True, slots=True)
class PairBatch:
    """B pairs as 2B right-padded rows: the chosen responses, then the rejected ones in the same order.

    Attributes:
        input_ids: `[2B, L]` prompt, response, padding.
        attention_mask: `[2B, L]`, 1 where there is a token. By length, never by token value: a prompt may hold the
            pad or end token (departure 4).
        labels: `[2B, L]` the token itself where it is scored, -100 elsewhere.
        first_label: lowest column with a label; nothing before `first_label - 1` needs logits.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    first_label: int

    def __len__(self) -> int:
        return self.input_ids.shape[0] // 2

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> PairBatch:
        """The batch on `device`."""
        return PairBatch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.first_label,
        )


def collate_pairs(pairs: Sequence[Pair], *, pad_token_id: int, suffix: Suffix = "keep") -> PairBatch:
    """Lay `pairs` out as `[2B, L]`.

    Args:
        pairs: at least one.
        pad_token_id: fills the rows; any token, since padding is known by length.
        suffix: with "mask", what follows the rewritten segment of a rejected response is present and not scored.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("a batch needs at least one pair")
    chosen = [(pair.prompt_ids, pair.chosen_ids, len(pair.chosen_ids)) for pair in pairs]
    rejected = [
        (
            pair.prompt_ids,
            pair.rejected_ids,
            pair.rewritten.stop if suffix == "mask" else len(pair.rejected_ids),
        )
        for pair in pairs
    ]
    return collate_responses(chosen + rejected, pad_token_id=pad_token_id)


def collate_responses(rows: Sequence[tuple[Sequence[int], Sequence[int], int]], *, pad_token_id: int) -> PairBatch:
    """Lay out rows of (prompt, response, number of response tokens to score), right-padded to one width."""
    width = max(len(prompt) + len(response) for prompt, response, _ in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, _IGNORE)
    for row, (prompt, response, scored) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(response)
        input_ids[row, :stop] = torch.tensor([*prompt, *response])
        attention_mask[row, :stop] = 1
        labels[row, start : start + scored] = input_ids[row, start : start + scored]
    # Column 0 has no prediction.
    first_label = max(1, min(len(prompt) for prompt, _, _ in rows))
    return PairBatch(input_ids, attention_mask, labels, first_label)
