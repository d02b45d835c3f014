"""Generate responses with a loaded model and the package's own generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from torch import nn

from sapo.errors import ConfigurationError, EvaluationError, TokenizerError, brief
from sapo.evaluation.targets import LoadedModel
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling


@contextmanager
def in_use(loaded: LoadedModel) -> Iterator[nn.Module]:
    """Context that yields the model, for a generator."""
    yield loaded.model


def generator_of(loaded: LoadedModel, sampling: Sampling, batch_size: int) -> TransformersGenerator:
    """The package's own generator for a loaded model."""
    return TransformersGenerator(
        lambda: in_use(loaded),
        sampling,
        eos_ids=loaded.eos_ids,
        pad_token_id=loaded.pad_token_id,
        batch_size=batch_size,
    )


def require_chat_template(loaded: LoadedModel, name: str) -> None:
    """Refuse a model without a chat template.

    Raises:
        TokenizerError: it has no chat template.
    """
    if not loaded.tokenizer.chat_template:
        raise TokenizerError(
            f"{name}: has no chat template, which a chat benchmark needs. Give one with --chat_template_path."
        )


def chat_ids(loaded: LoadedModel, messages: Sequence[dict[str, str]]) -> list[int]:
    """A conversation as the prompt of the next reply.

    Raises:
        EvaluationError: the template refuses the conversation.
    """
    try:
        text: str = loaded.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"the chat template refuses a conversation ({brief(error)}). Use another template."
        ) from error
    return loaded.checked(list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]))


def plain_ids(loaded: LoadedModel, text: str) -> list[int]:
    """Plain text as a prompt, with the tokenizer's BOS token (but no EOS token)."""
    whole = list(loaded.tokenizer(text)["input_ids"])
    bare = list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    places = (start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare)
    return loaded.checked(whole[: next(places, 0) + len(bare)])


def max_reply_tokens(loaded: LoadedModel, prompt: Sequence[int], max_new_tokens: int) -> int:
    """Maximum tokens of a response: `max_new_tokens`, or what the prompt leaves of the model's context; may be 0.

    Raises:
        ConfigurationError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ConfigurationError(f"max_new_tokens={max_new_tokens}: must be 1 or more.")
    if loaded.positions is None:
        return max_new_tokens
    return max(0, min(max_new_tokens, loaded.positions - len(prompt)))


def text_of(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    """A response as text, without EOS and other special tokens."""
    decoded: Any = loaded.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return str(decoded)


def finish_reason(loaded: LoadedModel, tokens: Sequence[int], budget: int) -> str:
    """Why a response ended: "stop" at an EOS token, "length" at the budget, "no_room" if the prompt left no tokens."""
    if budget == 0:
        return "no_room"
    return "stop" if tokens and tokens[-1] in loaded.eos_ids else "length"
