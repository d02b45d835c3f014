"""Model and tokenizer from a name or a folder, with the errors a user can act on, and a memory estimate first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError, ModelError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_OPTIMIZER_BYTES = {"sgd": 0, "rmsprop": 4, "adafactor": 1}
"""Bytes of state a trained parameter; Adam and everything else: 8, its 8-bit forms: 2."""


def load_tokenizer(name: str, revision: str = "main") -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be found or read.
    """
    return _load("tokenizer", AutoTokenizer, name, revision)


def load_config(model_args: ModelConfig) -> Any:
    """The configuration of a model, without its weights.

    Raises:
        ConfigurationError: no model is named.
        ModelError: it cannot be found or read.
    """
    if not model_args.model_name_or_path:
        raise ConfigurationError("model_name_or_path is missing: name a model folder or a hub id.")
    return _load("model", AutoConfig, model_args.model_name_or_path, model_args.model_revision)


def _load(what: str, kind: Any, name: str, revision: str) -> Any:
    _check_folder(name)
    try:
        return kind.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_cannot_load(what, name, error)) from error


def generation_end_ids(name: str, revision: str, config: Any) -> int | list[int] | None:
    """`eos_token_id` of the generation configuration that the model will have once it is loaded."""
    try:
        generation = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    end_ids: int | list[int] | None = generation.eos_token_id
    return end_ids


def check_model(model_args: ModelConfig, args: SAPOConfig) -> None:
    """Find out before data or weights are read whether the model can be trained here.

    Raises:
        ModelError: the folder is missing or incomplete.
        ConfigurationError: no model, quantization without LoRA, or not enough memory for the copies.
    """
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise ConfigurationError("load_in_4bit and load_in_8bit train an adapter only. Add --use_peft.")
    config = load_config(model_args)
    if not args.skip_memory_check:
        check_memory(config, model_args, args)


def load_policy(model_args: ModelConfig, args: SAPOConfig) -> tuple[Any, Any]:
    """The model to train and the adapter configuration (or None).

    Raises:
        ModelError: the folder is missing or incomplete.
    """
    name = str(model_args.model_name_or_path)
    _check_folder(name)
    options: dict[str, Any] = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        options["quantization_config"] = quantization
    if args.use_cpu:
        options["device_map"] = None
    try:
        model = create_model_from_path(name, AutoModelForCausalLM, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(_cannot_load("model", name, error)) from error
    return model, get_peft_config(model_args)


def estimate_memory(config: Any, model_args: ModelConfig, args: SAPOConfig) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state by part; activations come on top."""
    with init_empty_weights():
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    dtype = model_args.dtype if model_args.dtype in _BYTES else str(config.dtype or "float32").removeprefix("torch.")
    size = _BYTES.get(dtype, 4)
    if model_args.load_in_4bit:
        size_of_base = parameters // 2
    elif model_args.load_in_8bit:
        size_of_base = parameters
    else:
        size_of_base = parameters * size
    if model_args.use_peft:
        # Adapters of the usual ranks are below 2 % of the base; policy, opponent, reference, gradients, Adam.
        return {"model": size_of_base, "adapters": parameters * 4 * 7 // 50}
    copies = {"policy": size_of_base, "gradients": parameters * size}
    optimizer = str(args.optim).rsplit(".", 1)[-1].lower()
    per_parameter = next(
        (b for name, b in _OPTIMIZER_BYTES.items() if name in optimizer), 2 if "8bit" in optimizer else 8
    )
    copies["optimizer"] = parameters * per_parameter
    if args.pair_source == "self_play" and args.num_iterations is None:
        copies["opponent"] = parameters * size
        if size == 2 and 0.5 < args.ema_decay < 1:
            copies["opponent's float32 master"] = parameters * 4
    if args.objective == "dpo" and args.reference in ("initial", "opponent_copy"):
        copies["reference"] = parameters * size
    return copies


def check_memory(config: Any, model_args: ModelConfig, args: SAPOConfig) -> None:
    """Compare the estimate with the memory of the device.

    Raises:
        ConfigurationError: it does not fit; names the parts and what makes them smaller.
    """
    parts = estimate_memory(config, model_args, args)
    needed = sum(parts.values())
    if torch.cuda.is_available() and not args.use_cpu:
        available, where = torch.cuda.mem_get_info()[0] * torch.cuda.device_count(), "on the GPUs"
    else:
        available, where = psutil.virtual_memory().available, "in memory"
    if needed > available:
        listed = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())
        raise ConfigurationError(
            f"{model_args.model_name_or_path} needs about {_gigabytes(needed)} ({listed}) before activations, and "
            f"{_gigabytes(available)} are free {where}. Use --use_peft, --dtype bfloat16, --reference opponent, a "
            "smaller model, or --skip_memory_check."
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _check_folder(name: str) -> None:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            raise ModelError(
                f"{name}: no config.json in this folder"
                + (
                    ": it holds an adapter. Merge it into its base model first."
                    if adapter
                    else ". Give a model folder."
                )
            )
    elif name.startswith((".", "/", "~")) or (folder.parent.is_dir() and str(folder.parent) != "."):
        raise ModelError(f"{name}: no such model folder. Check model_name_or_path.")


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 200 else reason[:197] + "..."
    return (
        f"{name}: the {what} cannot be loaded ({reason}). Give a complete local folder, or the id of a model on the "
        "hub that this machine can reach."
    )
