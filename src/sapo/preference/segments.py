"""Choose, truncate and splice spans of response tokens. Pure integers: no model, no tensor.

A response is A + B + C: the opponent regenerates the segment B after A, and C follows unless B' ended the response.
Geometry from the published collator (`sapo/utils.py`, revision 5d7a210) and section 3.2 of the paper.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Suffix = Literal["keep", "drop", "mask"]

PUBLISHED_TAIL_MARGIN = 3
"""In the published collator, a segment never includes the last three tokens of a long response."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Half-open span `[start, stop)` of response tokens to regenerate."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"Segment({self.start}, {self.stop}): need 0 <= start <= stop")

    def __len__(self) -> int:
        return self.stop - self.start


def segment_tokens(response_length: int, segment_length: float | None) -> int:
    """Number of tokens to regenerate in a response of `response_length` tokens (including the EOS token).

    Args:
        response_length: tokens in the response, at least 1.
        segment_length: tokens (1 or more), a fraction of the response (between 0 and 1), or None for all of it.

    Raises:
        ValueError: no tokens, or a segment length that is not positive.
    """
    if response_length < 1:
        raise ValueError(f"response_length={response_length}: must be 1 or more")
    if segment_length is None:
        return response_length
    if segment_length <= 0:
        raise ValueError(f"segment_length={segment_length}: must be positive, or None for the full response")
    if segment_length < 1:
        return max(1, round(segment_length * response_length))
    return min(int(segment_length), response_length)


def choose_segment(
    response_length: int,
    segment_length: float | None,
    rng: random.Random,
    *,
    tail_margin: int = PUBLISHED_TAIL_MARGIN,
) -> Segment:
    """Draw the segment of a response: n tokens, N of them to regenerate; the start is uniform over [0, n - 3 - N].

    If that range is empty the start is 0, so a response of about N tokens or fewer is regenerated in full.

    Args:
        response_length: n, number of tokens in the response, including the EOS token.
        segment_length: see `segment_tokens`.
        rng: random generator; always used exactly once.
        tail_margin: number of last tokens that a segment never includes (3 as published; 0 for none).

    Source: the published collator's `truncate_at`; golden vectors `segment_geometry.json`.
    """
    tokens = segment_tokens(response_length, segment_length)
    last_start = response_length - tail_margin - tokens
    uniform = rng.random()
    start = int(uniform * (last_start + 1)) if last_start > 0 else 0
    return Segment(start, start + tokens)


def truncate_at_eos(tokens: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    """`tokens` up to and including the first one that is in `eos_ids`."""
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return list(tokens[: position + 1])
    return list(tokens)


def splice(
    response: Sequence[int],
    segment: Segment,
    replacement: Sequence[int],
    *,
    eos_ids: Collection[int] = (),
    suffix: Suffix = "keep",
) -> list[int]:
    """Replace `segment` of `response` by `replacement`.

    If `replacement` ends the response (its last token is in `eos_ids`), the suffix is dropped, as in the published
    implementation. With `suffix="drop"` it always is; "mask" keeps it without scoring it (see `batches`).

    Raises:
        ValueError: the segment extends beyond the response.
    """
    if segment.stop > len(response):
        raise ValueError(f"{segment} extends beyond a response of {len(response)} tokens")
    head = [*response[: segment.start], *replacement]
    ended = bool(replacement) and replacement[-1] in eos_ids
    if ended or suffix == "drop":
        return head
    return [*head, *response[segment.stop :]]
