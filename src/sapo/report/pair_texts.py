"""Pairs in the page's compact form: each text once, within a size budget."""

from __future__ import annotations

from typing import Any

BUDGET = 500_000
"""Maximum characters of pair texts in a page; beyond it, long texts are shortened in the middle, with a note."""
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
    """Pairs as numbers and indices into a list of texts.

    Returns:
        `texts`; `pairs`, each with short names (`_NUMBERS`), `k` "f" for followed or "l" for trained on, and `x`: text
        indices of the prompt, three parts of the chosen and three of the rejected response; and `limit`, the maximum
        characters of a text, None if no text is shortened.
    """
    limit = _limit(pairs, budget)
    indices: dict[str, int] = {}

    def index_of(text: str) -> int:
        return indices.setdefault(shorten(text, limit), len(indices))

    packed = []
    for pair in pairs:
        row: dict[str, Any] = {short: pair[name] for name, short in _NUMBERS.items() if pair.get(name) is not None}
        row["k"] = pair["kind"][0]
        row["x"] = [index_of(text) for text in (pair["prompt"], *pair["chosen"], *pair["rejected"])]
        packed.append(row)
    return {"texts": list(indices), "pairs": packed, "limit": limit}


def shorten(text: str, limit: int | None) -> str:
    """`text`, with its middle replaced by a note if it has more than `limit` characters."""
    if limit is None or len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}\n[{len(text) - limit:,} characters omitted; see pairs.jsonl]\n{text[head - limit :]}"


def _limit(pairs: list[dict[str, Any]], budget: int) -> int | None:
    """The maximum text length that fits the budget, as a power of two; None for no limit."""
    texts = {text for pair in pairs for text in (pair["prompt"], *pair["chosen"], *pair["rejected"])}
    lengths = sorted(map(len, texts))
    if sum(lengths) <= budget:
        return None
    limit = 1 << 17
    while limit > 64 and sum(min(length, limit) for length in lengths) > budget:
        limit //= 2
    return limit
