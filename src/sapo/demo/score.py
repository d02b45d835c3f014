"""Exact match of a model on held-out rows, with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from sapo.demo.tasks import MAX_REPLY_TOKENS, Row, correct
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """Exact match, overall and by task, with a 95% interval.

    Attributes:
        right: answers that are correct.
        total: all answers.
        by_task: fraction of correct answers of each task.
    """

    right: int
    total: int
    by_task: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Overall exact match."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval of the accuracy."""
        return wilson_interval(self.right, self.total)


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95% confidence interval of a proportion of at least one trial (Wilson 1927)."""
    if total < 1:
        raise ValueError("no trials: the proportion has no interval")
    z = 1.959964
    share = successes / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return middle - half, middle + half


def score(model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, batch_size: int = 250) -> ScoreReport:
    """Greedy answers of `model` to `rows`, compared character for character."""
    generator = TransformersGenerator(
        lambda: nullcontext(model),
        Sampling(temperature=0.0),
        eos_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        batch_size=batch_size,
    )
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        for row in rows
    ]
    replies = generator.generate(prompts, [MAX_REPLY_TOKENS] * len(rows), [0] * len(rows))
    right = [answers(row, reply, tokenizer) for row, reply in zip(rows, replies, strict=True)]
    by_task: dict[str, list[bool]] = {}
    for row, good in zip(rows, right, strict=True):
        by_task.setdefault(row["task"], []).append(good)
    return ScoreReport(sum(right), len(right), {task: sum(goods) / len(goods) for task, goods in by_task.items()})


def answers(row: Row, reply: Sequence[int], tokenizer: Any) -> bool:
    """Whether the tokens of `reply` are the correct answer to `row` followed by exactly one EOS token."""
    # Special tokens are not skipped: one in the middle of a reply makes it wrong.
    return list(reply[-1:]) == [tokenizer.eos_token_id] and correct(row, tokenizer.decode(reply[:-1]))
