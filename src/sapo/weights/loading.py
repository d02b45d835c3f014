"""The only place that loads models and adapters; `description` loads tokenizers and configurations.

Code from a model folder is never run: `trust_remote_code=False` is passed to every call, so that nobody is asked. What
cannot be loaded in full is refused in one line. Every process holds its weights on its own device, unless they are
sharded, in which case DeepSpeed or FSDP places them.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, PeftType, get_peft_model_state_dict, prepare_model_for_kbit_training
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging
from trl import ModelConfig, get_quantization_config

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError, ModelError, SapoError
from sapo.network import hub_or_cache
from sapo.weights.description import (
    LOADING_ERRORS,
    config_of,
    find,
    load_config,
    source_of,
    switch_off_router_logits,
)
from sapo.weights.embeddings import grow, without_messages
from sapo.weights.footprint import check_memory
from sapo.weights.policy import adapter_config, check_finite, model_keyword_arguments
from sapo.weights.rounding import round_to
from sapo.weights.sharding import will_shard_weights
from sapo.weights.source import (
    ModelSource,
    loading_error,
    other_base,
    quantization_method,
    read_adapter_config,
    trained_rows,
)
from sapo.weights.starts import check_start, forget_gguf, merge_adapters, with_run_adapter
from sapo.weights.stored import changed_base, check_stored_types, check_weights, two_models, weight_files

logger = logging.get_logger(__name__)

_NUMBER = re.compile(r"\.\d+\.")
"""Of a layer, in the name of a weight."""

# ---- Models ----


def check_model(model_args: ModelConfig, args: SAPOConfig, *, trains: bool = True) -> None:
    """Find out before data or weights are read whether the model can be trained here.

    Args:
        model_args: names the model.
        args: of the run.
        trains: whether it is trained; else it only generates, and its weights may be stored quantized.

    Raises:
        ModelError: the folder is missing, incomplete, or its weights cannot be trained.
        ConfigurationError: no model, quantization without LoRA, or not enough memory for the copies.
    """
    use_one_device(args)
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise ConfigurationError("load_in_4bit and load_in_8bit train an adapter only. Add --use_peft.")
    config = load_config(model_args)
    described = with_stored_adapter(model_args, merge=args.adapter == "merge")
    source = source_of(model_args)
    if trains:
        _check_trainable(source, config, adapter=described.use_peft)
    else:
        _check_readable(source, config)
    method = quantization_method(config)
    if (model_args.load_in_4bit or model_args.load_in_8bit) and method not in (None, "bitsandbytes"):
        raise ConfigurationError(
            f"load_in_{4 if model_args.load_in_4bit else 8}bit with {source.base}, which is stored quantized already "
            f"({method}). Leave it out, or use the unquantized checkpoint."
        )
    check_start(source, model_args, args)
    if args.skip_memory_check:
        return
    try:
        with model_errors(source):
            check_memory(config, described, args)
    except ConfigurationError as error:
        if described is model_args or not str(error).startswith(("lora_", "the adapter does not fit")):
            raise
        raise ModelError(
            f"{source.adapter}: does not fit {source.base} ({str(error).rstrip('.')}). Name the model that it was "
            "trained on in adapter_config.json."
        ) from error


@contextmanager
def model_errors(source: ModelSource) -> Iterator[None]:
    """Say in one line, a `ModelError`, what a library raises as it builds or loads the model of a source."""
    try:
        yield
    except SapoError:
        raise
    except LOADING_ERRORS as error:
        raise loading_error("model", source, error) from error


def load_policy(model_args: ModelConfig, args: SAPOConfig, adapter: Path | None = None) -> tuple[Any, Any]:
    """The model to train, and the configuration of the adapter to add: None for full training or a stored adapter.

    Args:
        model_args: names the model; the folder of an adapter gives its base model with that adapter, to train on.
        args: device, strategy and `model_init_kwargs`.
        adapter: folder of an adapter on the named model, to train on.

    Raises:
        ModelError: the folder is missing or incomplete, or its weights cannot be trained.
    """
    merge = args.adapter == "merge"
    source = with_run_adapter(source_of(model_args), adapter, merge=merge)
    described = with_stored_adapter(model_args, merge=merge)
    options = _options(model_args, args)
    _check_trainable(source, config_of(source), adapter=described.use_peft or source.adapter is not None)
    model = _load_model(source, options, trainable=True)
    return model, adapter_config(model_args) if source.adapter is None else None


def load_named_policy(name: str, args: SAPOConfig, *, adapter: bool) -> Any:
    """The model that the trainer is given by name, loaded with `args.model_init_kwargs`, in float32 by default.

    Args:
        name: model folder, adapter folder (loaded with its base, to train on) or Hub id.
        args: of the run.
        adapter: whether a new adapter will be trained on it.

    Raises:
        ModelError: the folder is missing or incomplete, or its weights cannot be trained.
    """
    options = {"dtype": "float32", **model_keyword_arguments(args), "device_map": device_map(args)}
    source = with_run_adapter(find(name, options.pop("revision", "main")), merge=args.adapter == "merge")
    _check_trainable(source, config_of(source), adapter=adapter or source.adapter is not None)
    return _load_model(source, options, trainable=True)


def load_generating(model_args: ModelConfig, args: SAPOConfig, adapter: Path | None = None) -> Any:
    """The model of a run to generate with, perhaps with the adapter of a folder: frozen, on this process's device.

    Raises:
        ModelError: a folder is missing or incomplete.
    """
    source = with_run_adapter(source_of(model_args), adapter, merge=args.adapter == "merge")
    return _frozen(_load_model(source, _options(model_args, args)), args.device)


def load_frozen(
    name: str, *, revision: str = "main", dtype: str = "auto", device: Any = None, adapter_name: str = "default"
) -> Any:
    """A model that is not trained: in evaluation mode, on one device.

    Args:
        name: model folder, adapter folder (loaded with its base) or Hub id.
        revision: of a Hub id.
        dtype: of the weights; "auto" as they are stored.
        device: unset, the accelerator if there is one.
        adapter_name: what the model calls the adapter, if it has one.

    Raises:
        ModelError: it is missing or incomplete.
    """
    where = torch.device(device or default_device())
    options = {"dtype": dtype, "device_map": None if where.type in ("cpu", "mps") else {"": where}}
    return _frozen(_load_model(find(name, revision), options, adapter_name=adapter_name), where)


def load_adapter(model: Any, folder: str, *, name: str = "default", trainable: bool = False) -> PeftModel:
    """Put the adapter of a folder on a base model or `PeftModel` under `name`, beside others that it has.

    Raises:
        ModelError: it cannot be read, or lacks weights.
    """
    stored = read_adapter_config(Path(folder))
    rows = trained_rows(stored)
    trained_on = other_base(stored, str(model.name_or_path))
    if trained_on is not None:
        logger.warning(f"{folder}: was trained on {trained_on}, and is put on {model.name_or_path}.")
    elif changed_base(Path(folder), str(model.name_or_path)):
        logger.warning(
            f"{folder}: the weights of {model.name_or_path} have changed since this adapter was trained on them. It is "
            "no longer the model that was trained. Restore the base model, or train again."
        )
    if stored.get("peft_type") not in PeftType.__members__:
        raise ModelError(
            f"{folder}: this version of peft has no adapters of type {stored.get('peft_type')}. Run: pip install "
            "--upgrade peft"
        )
    if not isinstance(model, PeftModel):
        # What new rows begin with does not matter: the adapter holds them all.
        grow(model, rows)
    try:
        with warnings.catch_warnings():
            # peft would go on with random weights in their place.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name, is_trainable=trainable)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable)
    except (*LOADING_ERRORS, UserWarning) as error:
        raise loading_error("adapter", ModelSource(folder, folder, None, "main"), error) from error
    _check_adapter_used(model, folder, name)
    return model


def _check_adapter_used(model: PeftModel, folder: str, name: str) -> None:
    """Refuse an adapter that has weights for modules which its base lacks: peft leaves them out without a word."""
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check_finite(own.items(), folder)
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as content:
        stored = set(content.keys())
    unused = sorted(stored - own.keys() - model.state_dict().keys())
    if unused:
        raise ModelError(
            f"{folder}: the base model has no place for {_and_more(unused)} of the adapter, so it was trained on "
            "another one. Name that in adapter_config.json."
        )


def with_stored_adapter(model_args: ModelConfig, *, merge: bool) -> ModelConfig:
    """The options of a run's model; where that is an adapter, its base model's.

    Args:
        model_args: names the model.
        merge: whether the stored adapter is merged; else the LoRA options become like its own.

    Raises:
        ConfigurationError: a new adapter is asked for on top of the stored one.
    """
    source = source_of(model_args)
    if source.adapter is None:
        return model_args
    if model_args.use_peft and not merge:
        raise ConfigurationError(
            f"use_peft with model_name_or_path={source.name}, which is an adapter: leave use_peft out to continue that "
            "adapter, or add --adapter merge to merge it and train a new one."
        )
    stored = read_adapter_config(Path(source.adapter))
    described = copy.copy(model_args)
    described.model_name_or_path, described.model_revision = source.base, source.revision
    if merge:
        return described
    described.use_peft = True
    described.lora_r = int(stored.get("r") or model_args.lora_r)
    described.lora_target_modules = stored.get("target_modules")
    described.lora_modules_to_save = stored.get("modules_to_save")
    return described


def _check_readable(source: ModelSource, config: Any) -> None:
    """Refuse weight files that are missing, or would be taken for something else than they are."""
    check_weights(source)
    check_stored_types(source, config)
    method = quantization_method(config)
    # bitsandbytes is in transformers' table by its number of bits.
    if method not in (None, "bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise ModelError(
            f"{source.base}: its weights are stored quantized ({method}), which transformers would take for "
            "weights. Use the unquantized checkpoint."
        )


def _check_trainable(source: ModelSource, config: Any, *, adapter: bool) -> None:
    _check_readable(source, config)
    method = quantization_method(config)
    if method is not None and not adapter:
        raise ModelError(
            f"{source.base}: its weights are stored quantized ({method}), and full training would change codes, not "
            "weights. Use the unquantized checkpoint, or train an adapter with --use_peft."
        )


def _options(model_args: ModelConfig, args: SAPOConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for the model of a run."""
    given = model_keyword_arguments(args)
    if "revision" in given:
        raise ConfigurationError(
            "model_init_kwargs sets revision, which tokenizer and configuration would not follow. Use "
            f"--model_revision {given['revision']} instead."
        )
    for name in ("dtype", "attn_implementation"):
        if name in given:
            raise ConfigurationError(
                f"model_init_kwargs sets {name}, which has an option of its own: --{name} {given[name]}. Leave it out."
            )
    options: dict[str, Any] = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
        "device_map": device_map(args),
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        options["quantization_config"] = quantization
    return options


def _load_model(
    source: ModelSource, options: Mapping[str, Any], *, trainable: bool = False, adapter_name: str = "default"
) -> Any:
    """Weights and, if the source has one, the adapter."""
    _check_readable(source, config_of(source))
    given = {**source.base_options, **options}
    if source.is_gguf:
        given["quantization_config"] = GgufConfig(dequantize=True)
    # Its table of missing weights is said in one line by `_check_complete`.
    with model_errors(source), without_messages("LOAD REPORT"), hub_or_cache(source.base_path):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.base_path, trust_remote_code=False, output_loading_info=True, **given
        )
    _check_complete(source, model, report)
    _keep_small_steps(model, source)
    _follow_ties(model)
    switch_off_router_logits(model.config)
    if trainable and hasattr(model.config, "vision_config"):
        logger.warning(
            f"{source.base}: a vision-language model, trained as a language model. What reads images gets no gradient "
            "and is saved as it is."
        )
    if source.is_gguf:
        forget_gguf(model, source)
        if trainable:
            logger.warning(
                f"{source.base}: dequantized to {str(model.dtype).removeprefix('torch.')}. Training starts from the "
                "quantized values; what is saved is safetensors, not GGUF."
            )
    if source.merged:
        model = merge_adapters(model, source, load_adapter).requires_grad_(trainable)
    if source.adapter is None:
        return model
    if trainable and quantization_method(model.config) is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return load_adapter(model, source.adapter, name=adapter_name, trainable=trainable)


def _check_complete(source: ModelSource, model: Any, report: Mapping[str, Any]) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{source.base}: transformers put an adapter on this model by itself. Download the adapter, and give its "
            "folder, or a model without adapter_config.json."
        )
    # A weight of another shape is replaced by random numbers like one that is missing, if transformers is told so.
    missing = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    unused = sorted(report["unexpected_keys"])
    if missing or report["error_msgs"]:
        what = _and_more(missing) if missing else str(report["error_msgs"][0])
        instead = f" It has {_and_more(unused)}, which the model has no place for." if unused else ""
        no_head = not unused and any("lm_head" in name for name in missing)
        tied = " A missing lm_head may mean tie_word_embeddings is wrong in config.json." if no_head else ""
        raise ModelError(
            f"{source.base}: the checkpoint lacks {what}, which would be random.{instead} Use a complete checkpoint of "
            f"this architecture, with the names that transformers gives its weights.{tied}"
        )
    parts = _parts_of(model, unused)
    if parts:
        raise ModelError(
            f"{source.base}: the checkpoint has {_and_more(parts)}, for which the model of config.json has no place: "
            "it would compute something else. Use the config.json that belongs to the checkpoint."
        )
    saved_as = (getattr(model.config, "architectures", None) or [""])[0]
    if saved_as and not hasattr(transformers, saved_as):
        logger.warning(f"{source.base}: saved as {saved_as}, which transformers lacks; used as {type(model).__name__}.")
    if unused:
        logger.warning(f"{source.base}: {len(unused)} weights of the checkpoint are not used, such as {unused[0]}.")
    both = two_models(Path(source.base))
    if both is not None:
        logger.warning(both)


def _and_more(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more weights" if len(names) > 1 else "")


def _parts_of(model: Any, names: Sequence[str]) -> list[str]:
    """Those of `names` that belong to a layer which the model has, or would have if it were deeper."""
    modules, own = dict(model.named_modules()), model.state_dict().keys()

    def is_part(name: str) -> bool:
        owner, _, last = name.rpartition(".")
        if last in ("weight", "bias") and owner in modules and "weight" in modules[owner]._parameters:
            return True
        return _NUMBER.search(name) is not None and _NUMBER.sub(".0.", name) in own

    return [name for name in names if is_part(name)]


@torch.no_grad()
def _keep_small_steps(model: Any, source: ModelSource) -> None:
    """Round float32 weights of a local folder to bfloat16 by the thresholds: transformers has, to the nearest.

    What a float32 run has changed by less than a rounding error would be gone. Sharded weights are left.
    """
    own = {name: weight for name, weight in model.named_parameters() if weight.dtype == torch.bfloat16}
    if source.is_gguf or quantization_method(model.config) is not None or not own or not Path(source.base).is_dir():
        return
    for file in weight_files(Path(source.base)):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="pt") as content:
            for name in own.keys() & set(content.keys()):
                stored, weight = content.get_slice(name), own[name]
                if stored.get_dtype() == "F32" and stored.get_shape() == list(weight.shape) and not weight.is_meta:
                    round_to(weight, content.get_tensor(name).to(weight.device))


def _follow_ties(model: Any) -> None:
    """Let the configuration say what was loaded: a head of its own, where the checkpoint has one."""
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    if text.tie_word_embeddings and head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = text.tie_word_embeddings = False


def _frozen(model: Any, device: torch.device) -> Any:
    # Quantized weights do not move: they were loaded onto their device.
    if quantization_method(model.config) is None and next(model.parameters()).device != device:
        model = model.to(device)
    check_finite(model.named_parameters(), model.config.name_or_path)
    return model.requires_grad_(False).eval()


# ---- Devices ----


def default_device() -> torch.device:
    """The accelerator of this machine if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def device_map(args: SAPOConfig) -> dict[str, torch.device] | None:
    """Where `from_pretrained` puts the weights of a run, never left to a library to choose: on this process's device.

    None where ZeRO-3 or FSDP2 shards them, and on a CPU or MPS, where Trainer moves them.
    """
    if args.use_cpu or will_shard_weights() or args.device.type in ("cpu", "mps"):
        return None
    return {"": args.device}


def use_one_device(args: SAPOConfig) -> None:
    """Train on one GPU where one process sees several, and say so: Trainer would wrap the model in nn.DataParallel.

    DataParallel splits a batch by its first dimension, which the packed rows of pairs do not have.
    """
    visible = args.n_gpu
    if visible < 2:
        return
    # Trainer has no option for it; it sets the same attribute for models that span GPUs.
    args._n_gpu = 1
    logger.warning(
        f"{visible} GPUs are visible and one is used ({args.device}). To use all: sapo train ... "
        "--accelerate_config multi_gpu"
    )
