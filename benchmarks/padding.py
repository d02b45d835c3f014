"""Share of padding in batches of 8 pairs with the lengths of real conversations.

    python benchmarks/padding.py

Lengths are those of the data under SAPO_TEST_DATA (default ../shared/data), four bytes to a token; a segment of 64
tokens is rewritten where `choose_segment` puts it, and every fourth rewritten one ends the response.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

from sapo import Pair
from sapo.preference.batches import padding_share, split_pairs
from sapo.preference.segments import Segment, choose_segment

SEGMENT, MOST = 64, 2048


def texts(data: Path, name: str) -> Iterator[tuple[str, str]]:
    """Prompt and response of each row."""
    if name == "gsm8k":
        for line in (data / name / "train.jsonl").read_text().splitlines():
            row = json.loads(line)
            yield row["question"], row["answer"]
    elif name == "gpteacher_roleplay":
        for row in json.loads((data / name / "roleplay.json").read_text()):
            yield f"{row['instruction']} {row['input']}", row["response" if "response" in row else "output"]
    else:
        for line in (data / name / "en_100_tree.jsonl").read_text().splitlines():
            yield from _replies(json.loads(line)["prompt"], "")


def _replies(message: dict, before: str) -> Iterator[tuple[str, str]]:
    said = before + message["text"]
    for reply in message.get("replies", []):
        if reply["role"] == "assistant":
            yield said, reply["text"]
        yield from _replies(reply, said)


def real_pairs(data: Path, name: str, rng: random.Random, *, count: int) -> list[Pair]:
    """Pairs of the lengths of `count` rows drawn at random."""
    rows = list(texts(data, name))
    pairs = []
    for prompt, response in rng.sample(rows, min(count, len(rows))):
        size = max(4, min(MOST // 2, len(response.encode()) // 4))
        segment = choose_segment(size, SEGMENT, rng)
        after = 0 if rng.random() < 0.25 else size - segment.stop
        rejected = segment.stop + after
        words = min(MOST // 2, len(prompt.encode()) // 4 + 1)
        pairs.append(
            Pair(0, 0, (1,) * words, (1,) * size, (1,) * rejected, segment, Segment(segment.start, segment.stop))
        )
    return pairs


def share(batches: list[list[Pair]]) -> float:
    """Share of padding over all of `batches` in the plain layout, by tokens."""
    used = padded = 0.0
    for batch in batches:
        width = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in batch)
        padded += 2 * len(batch) * width
        used += 2 * len(batch) * width * (1 - padding_share(batch))
    return 1 - used / padded


def main() -> None:
    data = Path(os.environ.get("SAPO_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
    print(f"{'':22}{'one pass':>10}{'cut':>8}{'passes':>8}{'4 a pass, cut':>15}{'passes':>8}{'shared':>8}")
    for name in ("gsm8k", "gpteacher_roleplay", "oasst_sample"):
        rng = random.Random(0)
        pairs = real_pairs(data, name, rng, count=2000)
        batches = [rng.sample(pairs, 8) for _ in range(500)]
        cuts = {most: [part for b in batches for part in split_pairs(b, most, layout="plain")] for most in (None, 4)}
        print(
            f"{name:22}{share(batches):10.1%}{share(cuts[None]):8.1%}{len(cuts[None]) / 500:8.2f}"
            f"{share(cuts[4]):15.1%}{len(cuts[4]) / 500:8.2f}{0:8.1%}"
        )


if __name__ == "__main__":
    main()
