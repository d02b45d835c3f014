"""Embeddings that follow a tokenizer: rows for tokens that a chat template has added, trained under LoRA too."""

from __future__ import annotations

import copy
import logging as standard_logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import set_seed

from sapo.errors import ConfigurationError, TokenizerError
from sapo.seeds import derive_seed, random_state_restored
from sapo.weights.sharding import will_shard_weights


def fit_model(model: Any, tokenizer: Any, *, seed: int) -> tuple[int, ...]:
    """Give a model the EOS token of `tokenizer`, and embeddings for all of its tokens; returns the ids of new rows.

    New rows begin at the mean of the others, as transformers initializes them, alike in every process and every run of
    `seed`. The generation configuration keeps the model's other EOS tokens.

    Raises:
        ConfigurationError: the embeddings of a model with an adapter are too small.
    """
    eos = tokenizer.eos_token_id
    if eos is not None:
        model.config.get_text_config().eos_token_id = eos
        generation = model.generation_config
        others = generation.eos_token_id
        others = [] if others is None else [others] if isinstance(others, int) else list(others)
        others = [one for one in others if one != eos]
        generation.eos_token_id = [eos, *others] if others else eos
    return grow(model, max(tokenizer.get_vocab().values()) + 1, seed=seed)


def grow(model: Any, size: int, *, seed: int = 0) -> tuple[int, ...]:
    """Grow the embeddings to `size` rows, unless they have as many; returns the ids of the new rows.

    Raises:
        ConfigurationError: the model has an adapter, whose shapes belong to the smaller embeddings.
    """
    rows = embedding_rows(model)
    if rows >= size:
        return ()
    if isinstance(model, PeftModel):
        raise ConfigurationError(
            f"the tokenizer has {size} tokens and the model under the adapter {rows} embeddings. Grow the base model "
            "before the adapter is put on it, or use a chat template whose tokens the model has."
        )
    # transformers tells at length how new rows are initialized.
    with random_state_restored(), without_messages("The new "):
        set_seed(derive_seed(seed, "rows of new tokens") % 2**32)
        model.resize_token_embeddings(size)
    return tuple(range(rows, size))


def embedding_rows(model: Any) -> int:
    """Number of rows of the input embeddings, also where ZeRO-3 has partitioned them."""
    weight = model.get_input_embeddings().weight
    return int(weight.ds_shape[0] if hasattr(weight, "ds_shape") else weight.shape[0])


def known_tokens(ids: list[int], tokenizer: Any, model: Any) -> list[int]:
    """`ids`, if the model has an embedding for each; else a `TokenizerError`: a GPU would end the process."""
    size = embedding_rows(model)
    if max(ids, default=0) >= size:
        raise TokenizerError(
            f"{model.name_or_path}: its tokenizer gives token {max(ids)} "
            f"({tokenizer.convert_ids_to_tokens(max(ids))!r}), and the model has {size} embeddings. Take the tokenizer "
            "that belongs to it."
        )
    return ids


def refuse_new_rows(tokenizer: Any, rows: int, backend: str) -> None:
    """Refuse tokens beyond the `rows` embeddings of the model that vLLM was started with."""
    size = max(tokenizer.get_vocab().values()) + 1
    if size > rows:
        raise ConfigurationError(
            f"generation_backend={backend} with a chat_template_path that adds {size - rows} tokens: vLLM holds the "
            "model without their embeddings. Set generation_backend to transformers, use a template without new tokens "
            "(zephyr), or start from a model that was saved with them, such as the output of the recipe llama3-8b-sft."
        )


def train_tokens(peft_config: Any, model: Any, tokens: Collection[int]) -> Any:
    """The configuration of a new LoRA adapter that trains the rows of `tokens` too, in input and output embeddings.

    Raises:
        ConfigurationError: the adapter is on the embeddings itself, or the weights will be sharded.
    """
    if peft_config is None or not tokens:
        return peft_config
    if will_shard_weights():
        raise ConfigurationError(
            f"chat_template_path adds {len(tokens)} tokens, and peft cannot train single rows of sharded embeddings. "
            "Train all weights (leave use_peft out), or use --accelerate_config zero2 or multi_gpu."
        )
    names = [_name_of(model, model.get_input_embeddings())]
    head = model.get_output_embeddings()
    if head is not None and not model.config.get_text_config().tie_word_embeddings:
        names.append(_name_of(model, head))
    full = set(peft_config.modules_to_save or ())
    names = [name for name in names if name not in full]
    targets = peft_config.target_modules
    clash = [name for name in names if not isinstance(targets, str) and name in set(targets or ())]
    if clash:
        raise ConfigurationError(
            f"lora_target_modules holds {clash[0]}, whose rows for {len(tokens)} new tokens of chat_template_path are "
            "trained in full. Leave it out there, or name it in lora_modules_to_save."
        )
    indices = peft_config.trainable_token_indices
    indices = dict(indices) if isinstance(indices, Mapping) else {name: list(indices or ()) for name in names[:1]}
    adapted = copy.deepcopy(peft_config)
    rows = {name: sorted({*indices.get(name, ()), *tokens}) for name in names}
    adapted.trainable_token_indices = {**indices, **rows} or None
    return adapted


def _name_of(model: nn.Module, module: nn.Module) -> str:
    found: str = next(name for name, one in model.named_modules() if one is module)
    return found.rpartition(".")[2]


@contextmanager
def without_messages(text: str) -> Iterator[None]:
    """Keep transformers from logging what has `text` in it while it builds, loads or resizes a model."""

    def passes(record: standard_logging.LogRecord) -> bool:
        return text not in record.getMessage()

    loud = standard_logging.getLogger("transformers.modeling_utils")
    loud.addFilter(passes)
    try:
        yield
    finally:
        loud.removeFilter(passes)
