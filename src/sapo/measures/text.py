"""Repetition, variety and distance of token sequences: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from math import log2, sqrt
from typing import TypeAlias

Ngram: TypeAlias = tuple[int, ...]

LOOP_REPEATS = 3
"""Minimum repetitions of a block at the end of a response that count as a loop."""
LOOP_TOKENS = 12
"""Minimum tokens of all repetitions together: "ha ha ha" is not a loop."""
LOOP_BLOCK = 64
"""Maximum block length in tokens."""


def ngrams(tokens: Sequence[int], n: int) -> list[Ngram]:
    """All runs of `n` tokens, in order; none if there are fewer."""
    return list(zip(*(tokens[place:] for place in range(n)), strict=False))


def seq_rep(tokens: Sequence[int]) -> float | None:
    """Fraction of 4-grams that occurred earlier in the same sequence: 1 - distinct / all; None for fewer than 4 tokens.

    Source: seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319), section 4.
    """
    found = ngrams(tokens, 4)
    return 1 - len(set(found)) / len(found) if found else None


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether a sequence (without its EOS token) ends with a repeated block of tokens."""
    length = len(tokens)
    for period in range(1, min(LOOP_BLOCK, length // LOOP_REPEATS) + 1):
        wanted = max(LOOP_REPEATS * period, LOOP_TOKENS)
        if wanted <= length and all(
            tokens[place] == tokens[place - period] for place in range(length - wanted + period, length)
        ):
            return True
    return False


def without_end(tokens: Sequence[int], eos_ids: Collection[int]) -> Sequence[int]:
    """A response without its EOS token, if it has one."""
    return tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens


def reply_values(tokens: Sequence[int], eos_ids: Collection[int]) -> dict[str, float]:
    """Of one response: whether it ended with an EOS token, its tokens, and whether it ends in a loop."""
    bare = without_end(tokens, eos_ids)
    return {
        "ended": float(len(bare) < len(tokens)),
        "length": float(len(tokens)),
        "loops": float(ends_in_loop(bare)),
    }


def distinct(responses: Iterable[Sequence[int]], n: int, *, limit: int | None = None) -> float | None:
    """Distinct n-grams divided by all n-grams of all responses, or of the first `limit`; None without n-grams.

    Source: distinct-n of Li et al. 2016 (arXiv 1510.03055). It falls with the amount of text, so compare two sets of
    responses only on equally many n-grams.
    """
    found = list(islice((gram for tokens in responses for gram in ngrams(tokens, n)), limit))
    return len(set(found)) / len(found) if found else None


def ngram_counts(responses: Iterable[Sequence[int]], n: int) -> Counter[Ngram]:
    """How often each n-gram occurs in all responses together."""
    return Counter(gram for tokens in responses for gram in ngrams(tokens, n))


def jensen_shannon(left: Mapping[Ngram, int], right: Mapping[Ngram, int]) -> float | None:
    """Jensen-Shannon distance (square root of the divergence in bits) of two distributions given as counts.

    0 for equal distributions, 1 for disjoint ones; None if either is empty. Source: Endres and Schindelin 2003.
    """
    total_left, total_right = sum(left.values()), sum(right.values())
    if not total_left or not total_right:
        return None
    divergence = 0.0
    for counts, total, others, total_of_others in (
        (left, total_left, right, total_right),
        (right, total_right, left, total_left),
    ):
        for gram, count in counts.items():
            share = count / total
            middle = (share + others.get(gram, 0) / total_of_others) / 2
            divergence += share * log2(share / middle) / 2
    return sqrt(min(1.0, max(0.0, divergence)))
