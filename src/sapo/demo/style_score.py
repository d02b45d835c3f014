"""What `sapo demo --chat` measures: replies in house style, and what a model has forgotten of general prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sapo.data.examples import Turn
from sapo.demo.house_style import GENERAL_PROMPTS, RULES, HelpDeskRow, broken_rules
from sapo.demo.score import wilson_interval
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.measures.intervals import Estimate, paired_change
from sapo.measures.measure import score_responses
from sapo.seeds import derive_seed

MAX_REPLY_TOKENS = 96
"""Half as many again as the longest answer of the data; a reply that does not end by then breaks the style."""
BATCH = 64

ModelContext = Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True, slots=True)
class Replies:
    """Replies to the held-out questions, decoded one way.

    Attributes:
        texts: one per question.
        broken: the rules that each breaks.
    """

    texts: list[str]
    broken: list[set[str]]

    @property
    def in_style(self) -> int:
        """Number of replies that keep every rule."""
        return sum(not rules for rules in self.broken)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval of the share in style."""
        return wilson_interval(self.in_style, len(self.broken))

    def kept(self) -> dict[str, float]:
        """Share of replies that keep each rule."""
        return {rule: sum(rule not in rules for rules in self.broken) / len(self.broken) for rule in RULES}


class StyleScorer:
    """Measures models with the same prompts and random numbers.

    Args:
        tokenizer: of all models.
        eos_ids: EOS tokens.
        pad_token_id: pads prompts.
        rows: held-out questions.
        general: number of general prompts.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_ids: frozenset[int],
        pad_token_id: int,
        rows: Sequence[HelpDeskRow],
        general: int = len(GENERAL_PROMPTS),
    ) -> None:
        self.rows = list(rows)
        self._tokenizer, self._eos_ids, self._pad = tokenizer, eos_ids, pad_token_id
        self._general = GENERAL_PROMPTS[:general]
        self._own: list[list[int]] = []
        self._before: list[float] = []

    def replies(self, model: ModelContext, *, temperature: float) -> Replies:
        """Replies to all held-out questions; temperature 0 is greedy."""
        texts = self.answers(model, [row.question for row in self.rows], temperature=temperature)
        return Replies(texts, [broken_rules(row, text) for row, text in zip(self.rows, texts, strict=True)])

    def answers(self, model: ModelContext, questions: Sequence[str], *, temperature: float = 0.0) -> list[str]:
        """Replies to any questions."""
        replies = self._generate(model, questions, Sampling(temperature=temperature))
        return [self._tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in replies]

    def remember(self, start: ModelContext) -> None:
        """Let the start answer the general prompts; `forgotten` is relative to these replies."""
        self._own = self._generate(start, self._general, Sampling(temperature=0.0))
        self._before = self._logps(start)

    def forgotten(self, model: ModelContext) -> Estimate | None:
        """Change of the log-probability of the start's own replies to general prompts, nats per token."""
        lengths = [float(len(reply)) for reply in self._own]
        return paired_change(self._logps(model), self._before, weights=lengths)

    def _logps(self, model: ModelContext) -> list[float]:
        turns = [
            Turn(0, tuple(self._prompt(one)), tuple(own)) for one, own in zip(self._general, self._own, strict=True)
        ]
        with model() as loaded:
            return score_responses(loaded, turns, self._own, pad_token_id=self._pad, batch_size=8)

    def _generate(self, model: ModelContext, questions: Sequence[str], sampling: Sampling) -> list[list[int]]:
        generator = TransformersGenerator(
            model, sampling, eos_ids=self._eos_ids, pad_token_id=self._pad, batch_size=BATCH
        )
        seeds = [derive_seed("house style", place) for place in range(len(questions))]
        return generator.generate([self._prompt(one) for one in questions], [MAX_REPLY_TOKENS] * len(seeds), seeds)

    def _prompt(self, question: str) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        return ids
