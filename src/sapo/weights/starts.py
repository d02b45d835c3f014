"""What a run can start from besides a full model: an adapter that is merged into its base, and a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from trl import ModelConfig

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError, ModelError
from sapo.weights.rounding import rounded
from sapo.weights.sharding import will_shard_weights
from sapo.weights.source import ModelSource, quantization_method


def with_run_adapter(source: ModelSource, folder: Path | None = None, *, merge: bool) -> ModelSource:
    """The source of a run's policy: its own adapter merged if asked for, and that of `folder` on it."""
    source = source.with_adapter_merged() if merge else source
    return source if folder is None else replace(source, name=str(folder), adapter=str(folder))


def check_start(source: ModelSource, model_args: ModelConfig, args: SAPOConfig) -> None:
    """Refuse what an adapter to merge or a GGUF file as the start cannot be combined with."""
    if args.adapter == "merge" and source.adapter is None:
        raise ConfigurationError(
            f"adapter=merge with model_name_or_path={source.name}, which is not an adapter. Leave adapter out."
        )
    if not source.is_gguf and not source.merged and args.adapter != "merge":
        return
    what = "a GGUF file" if source.is_gguf else "a merged adapter"
    clash = None
    if model_args.load_in_4bit or model_args.load_in_8bit:
        clash = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit"
    elif args.generation_backend != "transformers":
        clash = f"generation_backend={args.generation_backend}"
    elif will_shard_weights():
        clash = "sharded weights"
    if clash is not None:
        raise ConfigurationError(
            f"{clash} with {what} ({source.name}) as the start is not supported. Export it first (sapo export "
            f"{source.name} OUT), then start from OUT."
        )


def forget_gguf(model: Any, source: ModelSource) -> None:
    """Make a dequantized model an ordinary one, which can be trained and saved; adapters on it name the file."""
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.name_or_path = model.config.name_or_path = str(Path(source.base).absolute())


def merge_adapters(model: Any, source: ModelSource, load: Callable[[Any, str], PeftModel]) -> Any:
    """The base `model`, changed in place, with the adapters of `source.merged`, put on it by `load`, merged into it."""
    method = quantization_method(model.config)
    if method is not None:
        raise ModelError(
            f"{source.base}: its weights are stored quantized ({method}), so {source.merged[0]} cannot be merged into "
            "them. Leave out adapter=merge to continue the adapter, or name the unquantized model as its base."
        )
    for folder in source.merged:
        model = merge_adapter(load(model, folder))
        # Absolute: peft would ask the hub for the configuration of runs/mine, which has the form of a Hub id.
        model.name_or_path = model.config.name_or_path = str(Path(folder).absolute())
    return model


def merge_adapter(model: PeftModel) -> Any:
    """The base model, changed in place, with the active adapter merged in float32, then rounded back."""
    base = model.get_base_model()
    kinds = {weight: weight.dtype for weight in base.parameters()}
    for weight in kinds:
        weight.data = weight.data.float()
    merged: Any = model.merge_and_unload()
    for weight in merged.parameters():
        weight.data = rounded(weight.data, kinds.get(weight, weight.dtype))
    # peft would take it for a model that still has an adapter.
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged
