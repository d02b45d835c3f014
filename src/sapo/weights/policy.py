"""A model made ready to be the policy."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel, set_seed

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError, TokenizerError


def model_keyword_arguments(args: SAPOConfig) -> dict[str, Any]:
    """What `from_pretrained` is given for a model named by a string; code of the model's own is not run.

    Raises:
        ConfigurationError: `model_init_kwargs` is not a mapping.
    """
    given = args.model_init_kwargs or {}
    if not isinstance(given, dict):
        raise ConfigurationError(f"model_init_kwargs={given}: give a mapping, on the command line as JSON.")
    return {"trust_remote_code": False, **given}


def with_adapter(
    model: PreTrainedModel | PeftModel,
    peft_config: Any,
    args: SAPOConfig,
) -> PreTrainedModel | PeftModel:
    """The model with the adapter to be trained, if there is one.

    Raises:
        ConfigurationError: the model has an adapter already, and another is asked for.
    """
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ConfigurationError("peft_config: the model already has an adapter. Pass one of the two.")
        if model.config.to_dict().get("quantization_config"):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        # The adapter begins at random: alike in every run of a seed, and in all processes of a run.
        set_seed(args.seed)
        model = get_peft_model(model, peft_config)
    if isinstance(model, PeftModel) and args.gradient_checkpointing:
        # Only the adapters train, so nothing before the first of them would carry a gradient to recompute for.
        model.enable_input_require_grads()
    return model


def padding_token_id(tokenizer: Any, eos_ids: frozenset[int]) -> int:
    """What fills rows: the tokenizer's pad token, else an end token; it is never attended to.

    Raises:
        TokenizerError: it has neither.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    if not eos_ids:
        raise TokenizerError("the tokenizer has neither a pad nor an end token. Set tokenizer.eos_token.")
    return min(eos_ids)
