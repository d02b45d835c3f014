"""Load a model's tokenizer and configuration, without its weights and without peft.

As in `loading`, code from a model folder is never run.
"""

from __future__ import annotations

import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import is_torch_available, logging

from sapo.errors import ConfigurationError, ModelError, TokenizerError, brief
from sapo.network import hub_or_cache
from sapo.weights.source import (
    GENERATION_FILE,
    TOKENIZER_FILES,
    ModelSource,
    download_adapter,
    find_source,
    loading_error,
    not_in_repository,
    read_adapter_config,
    trained_rows,
)

if TYPE_CHECKING:
    from trl import ModelConfig

logger = logging.get_logger(__name__)

LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    UnpicklingError,
    struct.error,
)
"""What transformers and peft raise for folders that are incomplete, damaged, or need something else."""

_OTHER_HEADS = ("Classification", "QuestionAnswering", "ForMaskedLM", "RewardModel")
"""Ends of the names of architectures without a head for the next token."""


def load_tokenizer(name: str, revision: str = "main") -> Any:
    """The tokenizer of a model folder or Hub id; of an adapter its own, else that of its base model.

    Raises:
        ModelError: there is no such model.
        TokenizerError: its tokenizer cannot be read, or needs code of its own.
    """
    source = find(name, revision)
    path, options = source.tokenizer_folder, {"revision": source.revision}
    if path is None:
        path, options = source.base_path, source.base_options
    return _tokenizer_at(path, source, options)


def load_template_tokenizer(name: str) -> Any:
    """The tokenizer whose chat template is taken; a folder needs no model beside it.

    Raises:
        ModelError, TokenizerError: there is none, or it cannot be read.
    """
    if not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        return load_tokenizer(name)
    return _tokenizer_at(name, ModelSource(name, name, None, "main"), {})


def _tokenizer_at(path: str, source: ModelSource, options: dict[str, Any]) -> Any:
    try:
        with hub_or_cache(path):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    except LOADING_ERRORS as error:
        raise TokenizerError(str(loading_error("tokenizer", source, error))) from error


def read_config(name: str, revision: str = "main") -> Any:
    """The configuration of a model folder or Hub id, of an adapter that of its base model, without weights.

    Raises:
        ModelError: it cannot be found or read, needs code of its own, or is not of a causal language model.
    """
    return config_of(find_source(name, revision))


def load_config(model_args: ModelConfig) -> Any:
    """The configuration of the model of a run, without its weights.

    Raises:
        ConfigurationError: no model is named, or it is asked to run its own code.
        ModelError: as for `read_config`.
    """
    # An option of some versions of trl.
    if getattr(model_args, "trust_remote_code", False):
        raise ConfigurationError(
            "trust_remote_code: code from a model is never run. Leave it out; a model whose code you trust can be "
            "loaded in Python and passed to the trainer as an object."
        )
    return config_of(find_source(_name(model_args), model_args.model_revision))


def positions_of(config: Any) -> int | None:
    """The number of positions of a model, its greatest context in tokens; None if its configuration has none."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def vocabulary_of(config: Any) -> int | None:
    """The number of tokens that a model has embeddings for; None if its configuration does not say."""
    size: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return size


def generation_eos_ids(name: str, revision: str, config: Any) -> int | list[int] | None:
    """`eos_token_id` of the generation configuration that the model will have once it is loaded."""
    eos_ids: int | list[int] | None = load_generation_config(name, revision, config).eos_token_id
    listed = eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
    if not all(isinstance(one, int) for one in listed):
        raise ModelError(
            f"{name}: generation_config.json or config.json has eos_token_id {brief(eos_ids, 80)}; it must be a "
            "token id or a list of them."
        )
    return eos_ids


def load_generation_config(name: str, revision: str = "main", config: Any = None) -> GenerationConfig:
    """The generation configuration of a model; without one of its own, that which follows from `config`."""
    source = find(name, revision)
    if not source.is_gguf:
        try:
            with hub_or_cache(source.base):
                return GenerationConfig.from_pretrained(source.base, revision=source.revision)
        except OSError as error:
            if (Path(source.base) / GENERATION_FILE).is_file():
                raise ModelError(
                    f"{source.base}: {GENERATION_FILE} cannot be read ({brief(error)}). Correct or remove it."
                ) from error  # without the file, there is none
        except LOADING_ERRORS as error:
            raise ModelError(
                f"{source.base}: {GENERATION_FILE} cannot be used ({brief(error)}). Correct or remove it."
            ) from error
    return GenerationConfig.from_model_config(config_of(source) if config is None else config)


def source_of(model_args: ModelConfig) -> ModelSource:
    """Where the model of a run comes from; see `find`."""
    return find(_name(model_args), model_args.model_revision)


def find(name: str, revision: str) -> ModelSource:
    """`find_source`; the Hub is asked whether a name that is not in its cache is an adapter."""
    source = find_source(name, revision)
    return _resolved(source)[0] if _may_be_adapter(source) else source


def config_of(source: ModelSource) -> Any:
    """The configuration of a model; under an adapter, with as many embeddings as it needs; see `read_config`."""
    source, config = _resolved(source)
    _refuse_other_kinds(source.base, config)
    switch_off_router_logits(config)
    if source.adapter is not None:
        # The base's embeddings grow for tokens that the adapter was trained with.
        text, rows = config.get_text_config(), trained_rows(read_adapter_config(Path(source.adapter)))
        text.vocab_size = max(text.vocab_size, rows)
    return config


def is_causal(config: Any) -> bool:
    """Whether transformers has a causal language model for a configuration, or one was registered."""
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not is_torch_available():
        return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def switch_off_router_logits(config: Any) -> None:
    """Score a mixture of experts without its router loss, whose masks do not fit packed rows and cached decoding."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False
            logger.warning_once(
                "output_router_logits: switched off. The router's auxiliary loss is not part of the objective."
            )


def _refuse_other_kinds(name: str, config: Any) -> None:
    """Refuse what is no causal language model, or was saved as something else: transformers would make heads up."""
    kind = f"model_type {config.model_type} is not a causal language model in transformers"
    saved_as = (getattr(config, "architectures", None) or [""])[0] or ""
    other = next((end for end in _OTHER_HEADS if saved_as.endswith(end)), None)
    if is_causal(config):
        masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        if getattr(config, "is_encoder_decoder", False):
            kind = f"model_type {config.model_type} is an encoder with a decoder"
        elif other is not None:
            kind = f"it was saved as {saved_as}, which has no head for text"
        elif masked:
            kind = f"model_type {config.model_type} reads text in both directions (a masked language model)"
        else:
            return
    raise ModelError(f"{name}: {kind}. Use a model that generates text from left to right.")


def _name(model_args: ModelConfig) -> str:
    if not model_args.model_name_or_path:
        raise ConfigurationError("model_name_or_path is missing: name a model folder or a Hub id.")
    return str(model_args.model_name_or_path)


def _may_be_adapter(source: ModelSource) -> bool:
    return source.adapter is None and not source.is_gguf and not Path(source.base).is_dir()


def _resolved(source: ModelSource) -> tuple[ModelSource, Any]:
    """A source, on the Hub perhaps an adapter that is downloaded, and the configuration of its base."""
    try:
        with hub_or_cache(source.base_path):
            config = AutoConfig.from_pretrained(source.base_path, trust_remote_code=False, **source.base_options)
    except LOADING_ERRORS as error:
        adapter = (
            _may_be_adapter(source) and not_in_repository(error) and download_adapter(source.name, source.revision)
        )
        if not adapter:
            raise loading_error("model", source, error) from error
        return _resolved(find_source(source.name, source.revision))
    return source, config
