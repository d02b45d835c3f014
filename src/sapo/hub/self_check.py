"""Whether two forms of a model answer alike: greedy replies, and the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sapo.weights.policy import generated, padding_token_id

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in two sentences why the sky is blue.",
)
"""What is asked, through the chat template if there is one."""
MAX_NEW_TOKENS = 24
"""Tokens of a greedy reply that the exported model must repeat."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A greedy reply.

    Attributes:
        prompt: token ids.
        tokens: of the reply, the EOS token included; at most `MAX_NEW_TOKENS`.
        logps: log-probabilities of every token of the vocabulary at each of them, `[len(tokens), vocabulary]` float32.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logps: Tensor


@dataclass(frozen=True, slots=True)
class Agreement:
    """How another form of the model agrees with replies.

    Attributes:
        replies: number of replies.
        equal: of these, generated alike.
        ties: of these, different from a token on whose probability is as high as the reply's, within `allowed`.
        mean: mean absolute difference of the log-probabilities of the replies' tokens, in nats.
        most: maximum of the same.
        allowed: maximum of `mean`, in nats.
    """

    replies: int
    equal: int
    ties: int
    mean: float
    most: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether they agree as far as their precision goes."""
        return self.equal + self.ties == self.replies and self.mean <= self.allowed

    def line(self) -> str:
        """The agreement in words."""
        ties = f" ({self.ties} differ from a token on that is as likely within this tolerance)" if self.ties else ""
        return (
            f"{self.equal} of {self.replies} greedy replies are equal{ties}; log-probabilities of their tokens differ "
            f"by {self.mean:.2g} nats on average, {self.most:.2g} at most (allowed: {self.allowed:.2g} on average)"
        )


def prompts(tokenizer: Any) -> list[list[int]]:
    """`QUESTIONS` as token ids, rendered for a reply."""
    if tokenizer.chat_template is None:
        return [tokenizer(text)["input_ids"] for text in QUESTIONS]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in QUESTIONS
    ]


def greedy_replies(
    model: Any, tokenizer: Any, rendered: Sequence[Sequence[int]], eos_ids: Collection[int]
) -> list[Reply]:
    """Replies of `model`, in evaluation mode, to prompts."""
    replies = []
    for prompt in rendered:
        tokens = _generate(model, tokenizer, prompt, eos_ids)
        replies.append(Reply(tuple(prompt), tuple(tokens), _logps(model, prompt, tokens)))
    return replies


def agreement(
    model: Any, tokenizer: Any, replies: Sequence[Reply], eos_ids: Collection[int], *, allowed: float
) -> Agreement:
    """Let another form of the model answer the same prompts, and score the same replies; see `Agreement`."""
    equal = ties = 0
    differences = []
    for reply in replies:
        tokens = tuple(_generate(model, tokenizer, reply.prompt, eos_ids))
        equal += tokens == reply.tokens
        if tokens != reply.tokens:
            pairs = zip(reply.tokens, tokens, strict=False)
            place = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
            if place is not None:
                here = reply.logps[place]
                ties += bool(here[reply.tokens[place]] - here[tokens[place]] <= 4 * allowed)
        picked = torch.tensor(reply.tokens).unsqueeze(1)
        other = _logps(model, reply.prompt, reply.tokens)
        differences.append((reply.logps.gather(1, picked) - other.gather(1, picked)).abs().flatten())
    together = torch.cat(differences)
    return Agreement(len(replies), equal, ties, float(together.mean()), float(together.max()), allowed)


def allowed_difference(dtype: torch.dtype) -> float:
    """Mean difference of log-probabilities that rounding to `dtype` may explain, in nats: 16 of its steps (a guess)."""
    return max(1e-4, 16 * torch.finfo(dtype).eps)


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompt: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    inputs = torch.tensor([list(prompt)], device=model.device)
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=sorted(eos_ids),
        pad_token_id=padding_token_id(tokenizer, frozenset(eos_ids)),
    )
    tokens: list[int] = generated(model, inputs, config)[0, len(prompt) :].tolist()
    return tokens


@torch.no_grad()
def _logps(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    row = torch.tensor([[*prompt, *tokens]], device=model.device)
    logits: Tensor = model(row, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).cpu()
