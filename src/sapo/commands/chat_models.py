"""Who answers: one model, or the three of a run. Adapters of one base model share its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig, TextStreamer
from transformers.utils import logging

from sapo.data.chat_template import use_chat_template
from sapo.data.encoding import eos_token_ids
from sapo.data.rendering import TEMPLATE_FAULTS
from sapo.errors import ConfigurationError, ModelError, TokenizerError, brief
from sapo.generation.sampling import Sampling
from sapo.runs.layout import OPPONENT_FOLDER
from sapo.runs.reading import is_run, recipe_option, start_of
from sapo.weights.description import load_template_tokenizer, load_tokenizer, positions_of
from sapo.weights.embeddings import fit_model, known_tokens
from sapo.weights.loading import load_adapter, load_frozen
from sapo.weights.policy import generated, padding_token_id
from sapo.weights.source import find_source, holds_model

logger = logging.get_logger(__name__)

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class ChatModel:
    """A model under a name.

    Attributes:
        name: "policy", "opponent", "start", or the model's own.
        model: a causal language model, perhaps shared with other models.
        adapter: the adapter that is active while it speaks; None for none.
    """

    name: str
    model: Any
    adapter: str | None = None

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The model with this model's adapter, or without one."""
        if self.adapter is not None:
            self.model.set_adapter(self.adapter)
        if self.adapter is None and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.model


@dataclass(frozen=True, slots=True)
class ChatModels:
    """Models that share a tokenizer."""

    models: list[ChatModel]
    tokenizer: Any


class ConversationFullError(ConfigurationError):
    """The conversation leaves no tokens for a reply."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model has answered.

    Attributes:
        text: without what the tokenizer marks as special.
        end: "complete" with an EOS token, "length" if the maximum was reached, "stopped" by Ctrl-C.
    """

    text: str
    end: Literal["complete", "length", "stopped"]


def load_chat_models(
    target: str, *, revision: str = "main", device: str | None = None, chat_template_path: str | None = None
) -> ChatModels:
    """Load a model, or the start, the opponent and the policy of a run.

    Args:
        target: a model folder, an adapter folder, a Hub id, or the output folder of a run that has ended.
        revision: of a Hub id.
        device: where to; unset: the accelerator if there is one.
        chat_template_path: the template to use instead of the tokenizer's; see `use_chat_template`.

    Raises:
        ModelError: a model is missing or cannot be read.
        ConfigurationError: a run that has not saved its policy yet.
    """
    if not is_run(Path(target)):
        model, adapter = _load(target, revision, device)
        models = [ChatModel(Path(target).name, model, adapter)]
        return _with_template(models, load_tokenizer(target, revision), chat_template_path)
    folder = Path(target)
    if not holds_model(folder):
        raise ConfigurationError(
            f"{target}: this run has not saved its policy yet. Wait for its end, or chat with one of its checkpoints."
        )
    policy, adapter = _load(target, "main", device)
    models = [ChatModel("policy", policy, adapter)]
    opponent = folder / OPPONENT_FOLDER
    if opponent.is_dir() and adapter is not None:
        load_adapter(policy, str(opponent), name="opponent")
        models.insert(0, ChatModel("opponent", policy, "opponent"))
    elif opponent.is_dir():
        models.insert(0, ChatModel("opponent", _load(str(opponent), "main", device)[0]))
    start = start_of(folder)
    if adapter is not None:
        began = find_source(start).adapter if start is not None else None
        if began is not None and Path(began).absolute() in map(Path, find_source(target).merged):
            # The base has it already (adapter=merge): with the policy's off, the model is the start.
            began = None
        if began is not None:
            load_adapter(policy, began, name="start")
        models.insert(0, ChatModel("start", policy, None if began is None else "start"))
    elif start is not None:
        revision = recipe_option(folder, "model_revision") or "main"
        try:
            models.insert(0, ChatModel("start", *_load(start, revision, device)))
        except ModelError as error:
            logger.warning(f"{target}: without its start. {error}")
    return _with_template(models, load_tokenizer(target), chat_template_path)


def _with_template(models: list[ChatModel], tokenizer: Any, path: str | None) -> ChatModels:
    """The models with embeddings for all tokens: those that a run has added are new to the model it started from."""
    use_chat_template(tokenizer, path, load_template_tokenizer)
    for one in models:
        if path is not None or (one.name == "start" and not isinstance(one.model, PeftModel)):
            fit_model(one.model, tokenizer, seed=0)
    return ChatModels(models, tokenizer)


def _load(target: str, revision: str, device: str | None) -> tuple[Any, str | None]:
    """A model in evaluation mode on its device, and the name of its adapter, if it has one."""
    model = load_frozen(target, revision=revision, device=device, adapter_name="policy")
    return model, "policy" if isinstance(model, PeftModel) else None


def prompt_ids(tokenizer: Any, messages: list[Message], *, plain: bool) -> list[int]:
    """The tokens of a conversation that awaits a reply.

    Args:
        tokenizer: of the model.
        messages: the last one the user's.
        plain: without a template: the last message alone, as it is. So it is where the tokenizer has none.

    Raises:
        TokenizerError: the chat template refuses the conversation.
    """
    if plain or tokenizer.chat_template is None:
        ids: list[int] = tokenizer(messages[-1]["content"])["input_ids"]
        return ids
    try:
        rendered: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except TEMPLATE_FAULTS as error:
        reason = brief(error).rstrip(".")
        raise TokenizerError(
            f"the chat template refuses this conversation ({reason}). Leave out --system if it takes no "
            "system message, or name another template with --chat_template_path."
        ) from error
    return rendered


def reply(
    chat_model: ChatModel,
    tokenizer: Any,
    prompt: list[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int,
    write: Callable[[str], None],
) -> Reply:
    """Let a model answer; `write` receives the text as it comes, and Ctrl-C ends the reply.

    Every model that is given the same seed samples with the same random numbers.

    Raises:
        ConversationFullError: the conversation leaves no tokens for a reply.
        TokenizerError: it holds a token that the model has no embedding for.
    """
    pieces: list[str] = []

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            write(text)

    with chat_model.active() as model:
        positions = positions_of(model.config)
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
        if room < 1:
            raise ConversationFullError(
                f"the conversation has {len(prompt)} tokens, and {chat_model.name} takes {positions}. Start a new one."
            )
        ends = eos_token_ids(tokenizer, model.generation_config.eos_token_id)
        inputs = torch.tensor([known_tokens(prompt, tokenizer, model)], device=model.device)
        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=sampling.temperature > 0,
            eos_token_id=sorted(ends),
            pad_token_id=padding_token_id(tokenizer, ends),
            **(drawn if sampling.temperature > 0 else {}),
        )
        torch.manual_seed(seed)
        stream = Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            made = generated(model, inputs, config, streamer=stream)
        except KeyboardInterrupt:
            stream.end()
            return Reply("".join(pieces).strip(), "stopped")
    return Reply("".join(pieces).strip(), "complete" if int(made[0, -1]) in ends else "length")
