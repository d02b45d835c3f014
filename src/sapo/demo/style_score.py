"""What `sapo demo --chat` measures: replies in house style, and the distance from the start on general prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sapo.data.examples import DataOptions
from sapo.data.unanswered import general_prompts
from sapo.demo.house_style import RULES, HelpDeskRow, broken_rules
from sapo.demo.score import wilson_interval
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.measures.intervals import Estimate
from sapo.measures.retention import (
    REPLY_SAMPLING,
    REPLY_TOKENS,
    Forced,
    StartStates,
    fixed_head,
    generate_replies,
    kl_estimate,
    score_forced,
    spread,
    states_of,
)
from sapo.seeds import derive_seed

MAX_REPLY_TOKENS = 96
"""Half as many again as the longest answer of the data; a reply that does not end by then breaks the style."""
BATCH = 64
GENERAL = 24
"""General prompts on which a model is compared with the start."""
MAX_LENGTH = 1024

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
        start: opens a context that yields the model before training, which answers the general prompts; None where
            only style is measured.
        tokenizer: of all models.
        eos_ids: EOS tokens.
        pad_token_id: pads prompts.
        rows: held-out questions.
    """

    def __init__(
        self,
        start: ModelContext | None,
        tokenizer: Any,
        *,
        eos_ids: frozenset[int],
        pad_token_id: int,
        rows: Sequence[HelpDeskRow],
    ) -> None:
        self.rows = list(rows)
        self._tokenizer, self._eos_ids, self._pad = tokenizer, eos_ids, pad_token_id
        self._forced: list[Forced] = []
        if start is not None:
            self._prepare(start)

    def _prepare(self, start: ModelContext) -> None:
        """Let the start answer the general prompts, and keep what it predicts there."""
        options = DataOptions(max_length=MAX_LENGTH, max_prompt_length=MAX_LENGTH - REPLY_TOKENS)
        prompts = general_prompts(self._tokenizer, self._eos_ids, options)
        prompts = [prompts[place] for place in spread(GENERAL, len(prompts))]
        limits = {"max_new_tokens": REPLY_TOKENS, "max_length": MAX_LENGTH}
        replies = generate_replies(self._generator(start, REPLY_SAMPLING), prompts, **limits)
        self._forced = [Forced(prompt, tuple(reply)) for prompt, reply in zip(prompts, replies, strict=True)]
        with start() as model:
            states = states_of(model, self._forced, pad_token_id=self._pad, batch_size=8)
            self._start = StartStates(states, fixed_head(model))

    def replies(self, model: ModelContext, *, temperature: float) -> Replies:
        """Replies to all held-out questions; temperature 0 is greedy."""
        texts = self.answers(model, [row.question for row in self.rows], temperature=temperature)
        return Replies(texts, [broken_rules(row, text) for row, text in zip(self.rows, texts, strict=True)])

    def answers(self, model: ModelContext, questions: Sequence[str], *, temperature: float = 0.0) -> list[str]:
        """Replies to any questions."""
        prompts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            for question in questions
        ]
        seeds = [derive_seed("house style", place) for place in range(len(prompts))]
        generator = self._generator(model, Sampling(temperature=temperature))
        replies = generator.generate(prompts, [MAX_REPLY_TOKENS] * len(prompts), seeds)
        return [self._tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in replies]

    def divergence(self, model: ModelContext) -> Estimate | None:
        """KL(start || model) in nats per token of the start's replies to general prompts; None without a start."""
        if not self._forced:
            return None
        with model() as loaded:
            return kl_estimate(score_forced(loaded, self._forced, self._start, pad_token_id=self._pad, batch_size=8))

    def _generator(self, model: ModelContext, sampling: Sampling) -> TransformersGenerator:
        return TransformersGenerator(model, sampling, eos_ids=self._eos_ids, pad_token_id=self._pad, batch_size=BATCH)
