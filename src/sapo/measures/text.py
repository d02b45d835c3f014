"""Repetition, variety and distance of token sequences: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from math import log2, sqrt
from typing import TypeAlias

Ngram: TypeAlias = tuple[int, ...]

LOOP_REPEATS = 3
"""How often a block must follow itself at the end of a response to count as a loop."""
LOOP_TOKENS = 12
"""Tokens that such repetitions must cover: "ha ha ha" is no loop."""
LOOP_BLOCK = 64
"""Longest block looked for, in tokens."""


def ngrams(tokens: Sequence[int], n: int) -> list[Ngram]:
    """All runs of `n` tokens, in order; none when there are fewer."""
    return list(zip(*(tokens[place:] for place in range(n)), strict=False))


def seq_rep(tokens: Sequence[int], n: int = 4) -> float | None:
    """Share of n-grams that have occurred before in the same sequence: 1 - distinct / all.

    Source: seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319), section 4.

    Returns:
        Between 0 and 1; None for a sequence of fewer than `n` tokens.
    """
    found = ngrams(tokens, n)
    return 1 - len(set(found)) / len(found) if found else None


def ends_in_loop(
    tokens: Sequence[int],
    *,
    repeats: int = LOOP_REPEATS,
    covered: int = LOOP_TOKENS,
    longest_block: int = LOOP_BLOCK,
) -> bool:
    """Whether the sequence ends in one block of tokens that follows itself.

    Args:
        tokens: without the end token.
        repeats: how often the block must occur in a row.
        covered: tokens that the occurrences must cover together.
        longest_block: tokens of the longest block looked for.
    """
    length = len(tokens)
    for period in range(1, min(longest_block, length // repeats) + 1):
        wanted = max(repeats * period, covered)
        if wanted <= length and all(
            tokens[place] == tokens[place - period] for place in range(length - wanted + period, length)
        ):
            return True
    return False


def distinct(responses: Iterable[Sequence[int]], n: int, *, most: int | None = None) -> float | None:
    """Different n-grams over all n-grams of all responses together.

    Source: distinct-n of Li et al. 2016 (arXiv 1510.03055). It falls with the amount of text, so two sets of responses
    compare only on equally many n-grams.

    Args:
        responses: token sequences.
        n: length of the n-grams.
        most: look at no more than this many n-grams, the first.

    Returns:
        Between 0 and 1; None when there is no n-gram.
    """
    found = list(islice((gram for tokens in responses for gram in ngrams(tokens, n)), most))
    return len(set(found)) / len(found) if found else None


def ngram_counts(responses: Iterable[Sequence[int]], n: int) -> Counter[Ngram]:
    """How often each n-gram occurs in all responses together."""
    return Counter(gram for tokens in responses for gram in ngrams(tokens, n))


def jensen_shannon(left: Mapping[Ngram, int], right: Mapping[Ngram, int]) -> float | None:
    """Jensen-Shannon distance (square root of the divergence in bits) of two distributions given as counts.

    Source: Endres and Schindelin 2003.

    Returns:
        0 for equal distributions, 1 for distributions that share nothing; None when either is empty.
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
