"""Pairs as the page keeps them: each text once, and never more of it than a page can hold."""

from __future__ import annotations

from typing import Any

BUDGET = 500_000
"""Characters of pair texts in a page; beyond it the middle of long texts is left out, and said to be."""
_NUMBERS = {
    "step": "s",
    "row": "r",
    "turn": "t",
    "margin": "m",
    "loss": "l",
    "chosen_logp": "c",
    "rejected_logp": "j",
    "reference_chosen_logp": "cr",
    "reference_rejected_logp": "jr",
    "age": "a",
    "draws": "d",
    "tokens": "n",
    "segment_tokens": "g",
    "identical": "i",
}


def pack(pairs: list[dict[str, Any]], budget: int = BUDGET) -> dict[str, Any]:
    """Pairs as numbers and places in a list of texts.

    Returns:
        `texts`; `pairs`, each with short names (`_NUMBERS`), `k` "f" for followed or "l" for learnt, and `x`: places of
        prompt, three parts of the chosen and three of the rejected response; and `limit`, the characters kept of a
        text, None if all are whole.
    """
    limit = _limit(pairs, budget)
    places: dict[str, int] = {}

    def place(text: str) -> int:
        return places.setdefault(shorten(text, limit), len(places))

    packed = []
    for pair in pairs:
        row: dict[str, Any] = {short: pair[name] for name, short in _NUMBERS.items() if pair.get(name) is not None}
        row["k"] = pair["kind"][0]
        row["x"] = [place(text) for text in (pair["prompt"], *pair["chosen"], *pair["rejected"])]
        packed.append(row)
    return {"texts": list(places), "pairs": packed, "limit": limit}


def shorten(text: str, limit: int | None) -> str:
    """`text`, its middle replaced by a note of how much is missing if it has more than `limit` characters."""
    if limit is None or len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}\n[{len(text) - limit:,} characters left out; pairs.jsonl has them]\n{text[head - limit :]}"


def _limit(pairs: list[dict[str, Any]], budget: int) -> int | None:
    """The longest texts that fit the budget together, as a power of two; None for all."""
    texts = {text for pair in pairs for text in (pair["prompt"], *pair["chosen"], *pair["rejected"])}
    lengths = sorted(map(len, texts))
    if sum(lengths) <= budget:
        return None
    limit = 1 << 17
    while limit > 64 and sum(min(length, limit) for length in lengths) > budget:
        limit //= 2
    return limit
