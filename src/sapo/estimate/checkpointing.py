"""`gradient_checkpointing: auto`: recompute activations only where memory asks for it."""

from __future__ import annotations

import copy
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers.utils import logging
from trl import ModelConfig

from sapo.config import HAS_ACTIVATION_CHECKPOINTING, SAPOConfig
from sapo.errors import ConfigurationError, brief
from sapo.estimate.estimate import FRAGMENTED, RESERVED, longest, memory_of
from sapo.text.numbers import bytes_text
from sapo.weights.description import is_causal
from sapo.weights.footprint import Strategy, build_run_models, free_memory, running_strategy
from sapo.weights.source import quantization_method

logger = logging.get_logger(__name__)

_TRACED = (1, 2)
"""Numbers of layers that are traced; memory grows in proportion to the layers, and a deep model takes long."""


def resolve_checkpointing(args: SAPOConfig, model: Any, peft_config: Any = None) -> None:
    """Set `gradient_checkpointing` to true or false where it is "auto", alike in all processes of a run.

    It is off where a step without recomputation fits into the memory of the device (on a CPU, into what is free) with
    pairs of the greatest length that `args` allow; and on where that cannot be estimated. A true that the model does
    not support is refused.

    Args:
        args: of the run; changed.
        model: the policy, loaded, before a new adapter is added.
        peft_config: of the new adapter, if there is one.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    supported = inner.supports_gradient_checkpointing
    if args.gradient_checkpointing != "auto":
        if args.gradient_checkpointing and not supported:
            raise ConfigurationError(
                f"gradient_checkpointing=true: {type(inner).__name__} does not support it. Set it to false."
            )
        return
    if not supported:
        set_checkpointing(args, False)
        return
    decided = [_needs_recomputation(args, model, peft_config) if args.process_index == 0 else True]
    if args.world_size > 1:
        # Sharded weights are gathered again for a recomputation: all processes must do alike.
        broadcast_object_list(decided)
    set_checkpointing(args, decided[0])


def set_checkpointing(args: SAPOConfig, value: bool) -> None:
    """Set the option under both of its names."""
    args.gradient_checkpointing = value
    if HAS_ACTIVATION_CHECKPOINTING:
        args.activation_checkpointing = value


def memory_without_recomputation(
    config: Any, model_args: ModelConfig, args: SAPOConfig, strategy: Strategy, *, on_gpu: bool
) -> float:
    """Bytes on one device while the policy trains on pairs of the greatest length, nothing computed twice.

    On a GPU the fused head is on by default, and memory goes to driver and allocator.
    """
    args = copy.copy(args)
    set_checkpointing(args, False)
    layers = config.get_text_config().num_hidden_layers
    counts = [min(count, layers) for count in _TRACED]
    found = []
    for count in counts:
        roles = build_run_models(_with_layers(config, count), model_args, args, strategy)
        found.append(memory_of(roles, longest(args), on_gpu=on_gpu, generates=False).phases["training"])
    slope = (found[1] - found[0]) / max(1, counts[1] - counts[0])
    needed = found[1] + (layers - counts[1]) * slope
    return float(needed * (1 + FRAGMENTED) + RESERVED if on_gpu else needed)


def _needs_recomputation(args: SAPOConfig, model: Any, peft_config: Any) -> bool:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    config = inner.config
    if not is_causal(config) or not hasattr(config.get_text_config(), "num_hidden_layers"):
        logger.info("gradient_checkpointing=auto: true, since this architecture's memory cannot be estimated.")
        return True
    adapter = peft_config or (model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None)
    on_gpu = args.device.type != "cpu"
    try:
        needed = memory_without_recomputation(
            config, _described(inner, adapter), args, running_strategy(args), on_gpu=on_gpu
        )
    except Exception as error:  # noqa: BLE001  whatever the architecture raises: its memory cannot be estimated
        logger.info(f"gradient_checkpointing=auto: true, since the memory cannot be estimated ({brief(error, 200)}).")
        return True
    free = free_memory(args) + sum(weight.nbytes for weight in inner.parameters())
    logger.info(
        f"gradient_checkpointing=auto: {str(needed > free).lower()}; without recomputation a step needs "
        f"{bytes_text(needed)}, and there are {bytes_text(free)}."
    )
    return bool(needed > free)


def _described(model: Any, adapter: Any) -> ModelConfig:
    """The options with which `sapo train` would have loaded the model."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    options: dict[str, Any] = {"attn_implementation": model.config._attn_implementation}
    method = quantization_method(model.config)
    if method is not None:
        described = model.config.to_dict()["quantization_config"]
        options["load_in_4bit"] = bool(described.get("load_in_4bit"))
        options["load_in_8bit"] = not options["load_in_4bit"]
        dtype = str(described.get("bnb_4bit_compute_dtype") or "bfloat16").removeprefix("torch.")
    if adapter is not None:
        targets = adapter.target_modules
        options |= {
            "use_peft": True,
            "lora_r": getattr(adapter, "r", 16),
            "lora_target_modules": targets if targets is None or isinstance(targets, str) else sorted(targets),
        }
    return ModelConfig(dtype=dtype, **options)


def _with_layers(config: Any, count: int) -> Any:
    """The configuration with its first `count` layers."""
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    text.num_hidden_layers = count
    for name, value in vars(text).items():
        if name.endswith("layer_types") and isinstance(value, list):
            setattr(text, name, value[:count])
    return smaller
