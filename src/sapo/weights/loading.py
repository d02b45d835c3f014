"""Model and tokenizer from a name or a folder, with the errors a user can act on, and a memory estimate first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError, ModelError, brief
from sapo.text import bytes_text
from sapo.weights.footprint import Strategy, build_run_models, model_memory
from sapo.weights.policy import model_keyword_arguments


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
        return kind.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_cannot_load(what, name, error)) from error


def generation_eos_ids(name: str, revision: str, config: Any) -> int | list[int] | None:
    """`eos_token_id` of the generation configuration that the model will have once it is loaded."""
    try:
        generation = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    eos_ids: int | list[int] | None = generation.eos_token_id
    return eos_ids


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
        **model_keyword_arguments(args),
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        options["quantization_config"] = quantization
    if args.use_cpu:
        options["device_map"] = None
    try:
        model = create_model_from_path(name, AutoModelForCausalLM, **options)
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(_cannot_load("model", name, error)) from error
    return model, get_peft_config(model_args)


def check_memory(config: Any, model_args: ModelConfig, args: SAPOConfig) -> None:
    """Compare what the models, gradients and optimizer take with the memory of the device; activations come on top.

    Raises:
        ConfigurationError: it does not fit; names the parts and what makes them smaller.
    """
    strategy = _strategy(args)
    parts = model_memory(build_run_models(config, model_args, args, strategy), args, strategy)
    needed = sum(parts.values())
    if torch.cuda.is_available() and not args.use_cpu:
        available, where = torch.cuda.mem_get_info()[0], "on the GPU"
    else:
        # All processes of this machine share its memory.
        available, where = psutil.virtual_memory().available // max(1, args.world_size), "in memory"
    if needed > available:
        listed = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items())
        raise ConfigurationError(
            f"{model_args.model_name_or_path} needs about {bytes_text(needed)} ({listed}) before activations, and "
            f"{bytes_text(available)} are free {where}. Use --use_peft, --dtype bfloat16, --reference opponent, a "
            "smaller model, more GPUs with --accelerate_config zero3, or --skip_memory_check; sapo estimate tells what "
            "each saves."
        )


def _strategy(args: SAPOConfig) -> Strategy:
    """How this run is divided over processes, as accelerate's launcher has told it by environment variables."""
    if args.world_size < 2:
        return Strategy()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return Strategy("fsdp2", args.world_size)
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0
    if stage == 3:
        return Strategy("zero3", args.world_size)
    return Strategy("zero2" if stage == 2 else "multi_gpu", args.world_size)


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
    return (
        f"{name}: the {what} cannot be loaded ({brief(error, 200)}). Give a complete local folder, or the id of a "
        "model on the hub that this machine can reach."
    )
