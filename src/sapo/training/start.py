"""From a model as it was given to one that can be trained: template, embeddings, adapter, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sapo.config import SAPOConfig
from sapo.data.chat_template import use_chat_template
from sapo.data.clock import forget_idle_date
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions
from sapo.errors import ConfigurationError
from sapo.estimate.checkpointing import resolve_checkpointing
from sapo.weights.description import load_template_tokenizer, load_tokenizer, positions_of
from sapo.weights.embeddings import embedding_rows, fit_model, refuse_new_rows, train_tokens
from sapo.weights.loading import load_named_policy, use_one_device
from sapo.weights.policy import disable_dropout, model_keyword_arguments, with_adapter


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
        policy: with its adapter, if it has one.
        tokenizer: with the chat template of the run.
        eos_ids: tokens that end a response.
        use_cache: of the configuration, before Trainer changes it.
        data: options to prepare rows with.
    """

    policy: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    use_cache: bool
    data: DataOptions


def prepare_start(model: Any, args: SAPOConfig, tokenizer: Any, peft_config: Any) -> Start:
    """Make a model ready to be trained.

    Args:
        model: a model, or the name or folder of one.
        args: `chat_template_path`, `gradient_checkpointing` and `disable_dropout` change it.
        tokenizer: of the model; may be None where that is named.
        peft_config: of a new adapter, or None.

    Raises:
        ConfigurationError, ModelError, TokenizerError: what clashes.
    """
    if not isinstance(args, SAPOConfig):
        raise ConfigurationError(f"args is of type {type(args).__name__}: pass a SAPOConfig, which has its options.")
    if model is None:
        raise ConfigurationError("model is missing: pass a model, or the name or folder of one.")
    use_one_device(args)
    model = str(model) if isinstance(model, Path) else model
    if isinstance(model, str):
        revision = model_keyword_arguments(args).get("revision", "main")
        tokenizer = tokenizer or load_tokenizer(model, revision)
        model = load_named_policy(model, args, adapter=peft_config is not None)
    if tokenizer is None:
        raise ConfigurationError("processing_class is missing: pass the model's tokenizer.")
    if args.chat_template_path is not None:
        new_tokens = use_chat_template(tokenizer, args.chat_template_path, load_template_tokenizer)
        if args.generation_backend != "transformers":
            refuse_new_rows(tokenizer, embedding_rows(model), args.generation_backend)
        grown = fit_model(model, tokenizer, seed=args.seed)
        peft_config = train_tokens(peft_config, model, {*new_tokens, *grown})
    forget_idle_date(args, tokenizer)
    args.check_positions(positions_of(model.config))
    resolve_checkpointing(args, model, peft_config)
    policy = with_adapter(model, peft_config, args)
    if args.disable_dropout:
        disable_dropout(policy)
    eos_ids = eos_token_ids(tokenizer, policy.generation_config.eos_token_id)
    use_cache = bool(policy.config.to_dict().get("use_cache", True))
    return Start(policy, tokenizer, eos_ids, use_cache, DataOptions.of(args, embedding_rows(policy)))
