"""A model made ready to be the policy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging
from trl import ModelConfig, get_peft_config

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError, ModelError, TokenizerError, brief
from sapo.weights.description import switch_off_router_logits
from sapo.weights.stored import stored_digest

logger = logging.get_logger(__name__)

_REFUSED_KEYWORDS = {
    "trust_remote_code": "code from a model is never run; load a model whose code you trust in Python, and pass it as "
    "an object",
    "allow_all_kernels": "kernels of unknown publishers are never run",
}
"""Keyword arguments of `from_pretrained` that would run foreign code when they are true."""


_FIRST = ("do_sample", "num_beams")


def model_keyword_arguments(args: SAPOConfig) -> dict[str, Any]:
    """What `from_pretrained` is given for a model named by a string, besides what the loader sets itself.

    Raises:
        ConfigurationError: `model_init_kwargs` is not a mapping, would run foreign code, or sets what is the loader's.
    """
    given = args.model_init_kwargs or {}
    if not isinstance(given, dict):
        raise ConfigurationError(f"model_init_kwargs={given}: give a mapping, on the command line as JSON.")
    for name, reason in _REFUSED_KEYWORDS.items():
        if given.get(name):
            raise ConfigurationError(f"model_init_kwargs sets {name}: {reason}. Leave it out.")
    if not given.get("weights_only", True):
        raise ConfigurationError("model_init_kwargs sets weights_only to false: pickles can run code. Leave it out.")
    if given.get("subfolder"):
        raise ConfigurationError(
            "model_init_kwargs sets subfolder, which tokenizer and configuration would not follow. Name the folder "
            "itself as the model."
        )
    for name in ("device_map", "output_loading_info"):
        if name in given:
            raise ConfigurationError(f"model_init_kwargs sets {name}, which follows from the run. Leave it out.")
    if "torch_dtype" in given:
        # transformers has renamed it, and lets the new name win.
        given = {"dtype": given["torch_dtype"]} | given
    return {name: value for name, value in given.items() if name not in (*_REFUSED_KEYWORDS, "torch_dtype")}


def repair_generation_config(model: Any) -> str | None:
    """Leave out what transformers refuses to save: sampling parameters beside greedy decoding, which ignores them.

    transformers loads such a configuration and raises when a changed one is saved: at the end of a run.

    Returns:
        What was left out, as a sentence; None for a valid configuration.
    """
    given = getattr(model, "generation_config", None)
    if given is None or _is_valid(given):
        return None
    repaired, left = GenerationConfig(), []
    # First what decides whether the others are valid.
    for name, value in sorted(given.to_diff_dict().items(), key=lambda one: (one[0] not in _FIRST, one[0])):
        default = getattr(repaired, name, None)
        setattr(repaired, name, value)
        if not _is_valid(repaired):
            setattr(repaired, name, default)
            left.append(f"{name}={value}")
    model.generation_config = repaired
    return (
        f"left out {', '.join(left)}, which transformers refuses to save beside the other settings. Greedy decoding "
        "ignores sampling parameters; set do_sample to true in the model to use them."
    )


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


def adapter_config(model_args: ModelConfig) -> Any:
    """The configuration of the new adapter of a run; None without one.

    trl makes a pattern for whole names of a list that holds one name, and `q_proj` alone would match nothing.
    """
    config = get_peft_config(model_args)
    given = getattr(config, "target_modules", None)
    if isinstance(given, str) and re.fullmatch(r"[\w.]+", given):
        config.target_modules = {given}
    if config is not None and model_args.model_revision != "main":
        # So that the adapter finds its base again.
        config.revision = model_args.model_revision
    return config


def with_adapter(
    model: PreTrainedModel | PeftModel,
    peft_config: Any,
    args: SAPOConfig,
) -> PreTrainedModel | PeftModel:
    """The model with the adapter to be trained, if there is one.

    Raises:
        ConfigurationError: the model has an adapter already and another is asked for, the adapter's target modules
            are not in the model, or every weight is frozen.
        ModelError: a weight is not finite.
    """
    repaired = repair_generation_config(model.get_base_model() if isinstance(model, PeftModel) else model)
    if repaired is not None:
        logger.warning(f"generation_config.json: {repaired}")
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ConfigurationError("peft_config: the model already has an adapter. Pass one of the two.")
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ConfigurationError(
                "peft_config: the model still has the adapter of an earlier trainer, which peft has put into it. Load "
                "the model again."
            )
        _check_target_modules(model, peft_config)
        if model.config.to_dict().get("quantization_config"):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        # The adapter begins at random: alike in every run of a seed, and in all processes of a run.
        set_seed(args.seed)
        try:
            model = get_peft_model(model, peft_config)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"the adapter does not fit the model ({brief(error)}). The model has {_linear_names(model)}."
            ) from error
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigurationError(
            "every weight of the model is frozen, so nothing would be trained. Pass a peft_config (--use_peft), load "
            "an adapter with is_trainable=True, or set requires_grad of the weights to train."
        )
    check_finite(model.named_parameters(), model.config.name_or_path or "the model")
    if isinstance(model, PeftModel):
        model.base_digest = stored_digest(str(model.get_base_model().name_or_path))
    switch_off_router_logits(model.config)
    _check_quantized(model, args)
    if isinstance(model, PeftModel) and args.gradient_checkpointing is True:
        # Only the adapters train, so nothing before the first of them would carry a gradient to recompute for.
        model.enable_input_require_grads()
    return model


def check_finite(weights: Iterable[tuple[str, Tensor]], whose: str) -> None:
    """Refuse weights with which a model computes nothing but NaN.

    Args:
        weights: with their names.
        whose: folder or Hub id that they are from.

    Raises:
        ModelError: names the first of them.
    """
    for name, weight in weights:
        # Shards of other processes have no elements, and codes of quantized weights are always finite.
        if weight.is_meta or not weight.numel() or not weight.is_floating_point() or weight.element_size() < 2:
            continue
        if not all(bool(bound.isfinite()) for bound in weight.detach().aminmax()):
            raise ModelError(
                f"{whose}: {name} holds NaN or infinite values, so the model would compute nothing else. Use a "
                "checkpoint without them; bfloat16 weights converted to float16 may overflow."
            )


def _check_quantized(model: Any, args: SAPOConfig) -> None:
    """Keep bitsandbytes from computing otherwise in training than in evaluation, as opponent and reference are.

    On processors with AVX512-BF16 it packs 4-bit weights in place at the first pass in evaluation mode, in a form
    without a backward pass: no gradient would get past the last layer. That is switched off. 8-bit weights on a
    processor have no such switch.
    """
    quantized = model.config.to_dict().get("quantization_config") or {}
    if quantized.get("load_in_8bit") and args.device.type in ("cpu", "xpu"):
        raise ConfigurationError(
            f"load_in_8bit on {args.device.type}: bitsandbytes computes with 8-bit weights in another way in training "
            "than in evaluation there, so that policy and reference would differ from the start. Use load_in_4bit."
        )
    for name, module in model.named_modules():
        if "support_avx512bf16_for_cpu" not in vars(module):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ConfigurationError(
                f"the 4-bit weights of {name} were packed for inference on this processor when the model was used, "
                "and cannot be trained any more. Load the model again, and pass it unused."
            )
        module.support_avx512bf16_for_cpu = False


def _check_target_modules(model: nn.Module, peft_config: Any) -> None:
    """Refuse a name that no module has; peft accepts it as long as another name matches."""
    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise ConfigurationError(
            f"lora_task_type={task}: the adapter of a model that generates text is CAUSAL_LM. Leave it out."
        )
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for name in getattr(peft_config, "target_parameters", None) or ():
        if not any(own == name or own.endswith(f".{name}") for own in parameters):
            raise ConfigurationError(
                f"lora_target_parameters: the model has no parameter {name}. It has names such as {parameters[-1]}."
            )
    for option in ("target_modules", "modules_to_save"):
        wanted = getattr(peft_config, option, None) or ()
        unknown = sorted(
            name
            for name in (() if isinstance(wanted, str) else wanted)
            if not any(module == name or module.endswith(f".{name}") for module in modules)
        )
        if not unknown:
            continue
        raise ConfigurationError(
            f"lora_{option}: the model has no module {unknown[0]}. It has {_linear_names(model)}; all-linear "
            "takes all but the head."
        )


def _linear_names(model: nn.Module) -> str:
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return ", ".join(sorted(names))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: modules, numbers that modules pass to functions, and the configuration.

    Attention and layer dropout (Llama, Granite, OPT) are plain floats, read from the module or the configuration in
    each forward pass.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_dropouts(module)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            for part in _configs(config):
                _zero_dropouts(part)


def _zero_dropouts(holder: object) -> None:
    for name, value in vars(holder).items():
        if isinstance(value, float) and value and "drop" in name:
            setattr(holder, name, 0.0)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def generated(model: Any, inputs: Tensor, config: GenerationConfig, **more: Any) -> Tensor:
    """What `model.generate` writes after one row of tokens [1, tokens], prompt included, by `config` alone.

    transformers takes what `config` leaves open from the model's generation_config.json: beams, which cannot be shown
    as they are written, and penalties, which training and evaluation do not apply.
    """
    holders = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        written: Tensor = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=config, **more
        )
    finally:
        for holder, its in zip(holders, own, strict=True):
            holder.generation_config = its
    return written


def padding_token_id(tokenizer: Any, eos_ids: frozenset[int]) -> int:
    """What fills rows: the tokenizer's pad token, else an EOS token; it is never attended to."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    if not eos_ids:
        raise TokenizerError("the tokenizer has neither a pad nor an EOS token. Set tokenizer.eos_token.")
    return min(eos_ids)
