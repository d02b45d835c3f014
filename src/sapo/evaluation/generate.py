"""Generate responses with a loaded model and the package's own generator."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from jinja2 import TemplateError

from sapo.errors import ConfigurationError, EvaluationError, TokenizerError, brief
from sapo.evaluation.targets import LoadedModel
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling

_UNENDED = {
    "length": "reached max_new_tokens or the end of the context",
    "no_room": "had no tokens left after the prompt",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """A response as text, without special tokens.

    Attributes:
        text: the response.
        finish: "stop" at an EOS token, "length" at the budget, "no_room" if the prompt left no tokens.
    """

    text: str
    finish: str


def generator_of(loaded: LoadedModel, sampling: Sampling, batch_size: int) -> TransformersGenerator:
    """The package's own generator for a loaded model."""
    return TransformersGenerator(
        lambda: nullcontext(loaded.model),
        sampling,
        eos_ids=loaded.eos_ids,
        pad_token_id=loaded.pad_token_id,
        batch_size=batch_size,
    )


def replies(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Reply]:
    """Responses to prompts, of at most `max_new_tokens` tokens and no more than the model's context has left."""
    if max_new_tokens < 1:
        raise ConfigurationError(f"max_new_tokens={max_new_tokens}: must be 1 or more.")
    budgets = [max(0, loaded.max_length(len(prompt) + max_new_tokens) - len(prompt)) for prompt in prompts]
    responses = generator_of(loaded, sampling, batch_size).generate(prompts, budgets, seeds)
    found = []
    for tokens, budget in zip(responses, budgets, strict=True):
        ended = bool(tokens) and tokens[-1] in loaded.eos_ids
        finish = "no_room" if budget == 0 else "stop" if ended else "length"
        found.append(Reply(str(loaded.tokenizer.decode(tokens, skip_special_tokens=True)), finish))
    return found


def finish_notes(finishes: Sequence[str]) -> list[str]:
    """Notes about responses that did not end with an EOS token; see `Reply.finish`."""
    counts = {meaning: finishes.count(finish) for finish, meaning in _UNENDED.items()}
    return [f"{count} of {len(finishes)} responses {meaning}." for meaning, count in counts.items() if count]


def chat_ids(loaded: LoadedModel, name: str, messages: Sequence[dict[str, str]]) -> list[int]:
    """A conversation with the model `name` as the prompt of the next reply, if its template accepts it."""
    if not loaded.tokenizer.chat_template:
        raise TokenizerError(
            f"{name}: has no chat template, which a chat benchmark needs. Give one with --chat_template_path."
        )
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
