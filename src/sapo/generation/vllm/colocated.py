"""vLLM in the training process: the engine shares the device with the policy and sleeps during training."""

from __future__ import annotations

import gc
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sapo.errors import ConfigurationError, GenerationError, SapoError, brief, pip_line
from sapo.generation.protocol import Weights, check_request
from sapo.generation.sampling import Sampling
from sapo.generation.vllm.limits import check_temperature, completion_options, max_lora_rank
from sapo.seeds import random_state_restored

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

_OLDEST = "0.32"
"""First vLLM with layer-wise reloading, weight versions and in-place adapter replacement."""

_ADAPTER = "opponent", 1
"""Name and id of the only adapter."""

_TOKENS_PER_STEP = 4096
"""Tokens per engine step, which determine activation memory; vLLM's default on large GPUs is four times as high."""


class ColocatedVLLM:
    """An `Engine`: `vllm.LLM` in this process, on this process's device.

    With several processes each has its own engine, and all must construct theirs together. The engine starts without
    weights (with LoRA: with the base model's), so call `load` or `load_tensors` before `generate`.

    Where vLLM supports it (CUDA, ROCm, XPU; not a CPU), the engine sleeps after construction and after each `generate`:
    its cache is freed and its weights move to CPU memory, which must be large enough. Weights are kept, because they
    may be used again before new ones are loaded. Loading wakes the engine, and it stays awake until it has generated:
    load right before generating.

    The random state, the thread count and the matmul precision of the process are restored.

    Args:
        model: folder or Hub name; without LoRA only its configuration is read.
        sampling: how the next token is drawn.
        eos_ids: the only EOS tokens; may be empty.
        max_model_len: maximum tokens of context plus reply.
        dtype: of weights and computation.
        gpu_memory_utilization: fraction of the device's memory for the engine's weights, activations and cache, between
            0 and 1. On a CPU a fraction of main memory, unless VLLM_CPU_KVCACHE_SPACE (GiB) sets the cache size.
        lora_rank: rank of the adapters; None for full models.

    Attributes:
        version: name of the engine's weights; None without usable weights.

    Raises:
        ConfigurationError: vLLM is missing or too old, or an option is out of range.
        GenerationError: vLLM cannot serve the model on this device.
    """

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        *,
        eos_ids: Collection[int],
        max_model_len: int,
        dtype: torch.dtype,
        gpu_memory_utilization: float,
        lora_rank: int | None = None,
    ) -> None:
        check_temperature(sampling)
        options: dict[str, Any] = {"load_format": "dummy"}
        if lora_rank is not None:
            options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_lora_rank(lora_rank)}
        self.version: str | None = None
        self._sampling = sampling
        self._end_ids = frozenset(eos_ids)
        self._max_model_len = max_model_len
        self._has_adapter = lora_rank is not None
        self._adapter_folder: Path | None = None
        self._names: frozenset[str] | None = None
        self._half_loaded = False
        # vLLM joins the run's process group, or creates its own, which it may also destroy.
        self._joined = dist.is_initialized()
        self._closed = False
        _import_vllm()
        from vllm import LLM
        from vllm.platforms import current_platform

        self._sleeps = current_platform.is_sleep_mode_available()
        with _restore_process_state(), _as_generation_error(f"vLLM cannot serve {model} in this process"):
            self._llm: LLM = LLM(
                model=model,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_batched_tokens=_TOKENS_PER_STEP,
                gpu_memory_utilization=gpu_memory_utilization,
                distributed_executor_backend=_launcher(),
                enable_sleep_mode=self._sleeps,
                # On a CPU, compilation takes longer than it saves in small runs.
                enforce_eager=current_platform.is_cpu(),
                skip_tokenizer_init=True,
                generation_config="vllm",
                trust_remote_code=False,
                use_tqdm_on_load=False,
                **options,
            )
            self._vocabulary = self._llm.model_config.get_vocab_size()
            if current_platform.is_cpu() and self._llm.model_config.is_moe and not self._has_adapter:
                self.close()
                raise GenerationError(
                    f"vLLM on a CPU keeps using the old weights of experts after new ones are loaded, and {model} "
                    "has experts. Train an adapter, or use another generation backend."
                )
            self._sleep()

    def load(self, weights: Weights, version: str) -> None:
        """Serve `weights`; see `Engine.load`."""
        if isinstance(weights, Mapping):
            self.load_tensors(weights.items(), version)
            return
        folder = weights
        if not self._has_adapter:
            self.load_tensors(_tensors_in(folder), version)
            return
        from vllm.lora.request import LoRARequest

        name, number = _ADAPTER
        self.version = None
        # On a CPU vLLM uses the process's random state.
        with random_state_restored(), _as_generation_error(f"vLLM cannot load the adapter in {folder}"):
            self._wake_up()
            swapped = self._llm.llm_engine.add_lora(LoRARequest(name, number, str(folder), load_inplace=True))
        if not swapped:
            raise GenerationError(f"vLLM did not load the adapter in {folder} and gave no reason.")
        self._adapter_folder = folder
        self._serve(version)

    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Serve the weights `tensors`, which are copied into the engine's weights one layer at a time.

        Args:
            tensors: all weights by their names in a model folder, on any device, in any floating dtype. Each must stay
                unchanged until its layer is complete, so an iterator that gathers weights must yield a new tensor
                each time. It is read once, completely, in every process.
            version: name of the weights, unique within a run.

        Raises:
            ConfigurationError: the engine serves adapters.
            GenerationError: weights are missing, unexpected or of other shapes. The engine then serves nothing until
                all of them are loaded; if vLLM itself failed half-way, it cannot be used any more.
        """
        if self._has_adapter:
            raise ConfigurationError("this engine serves LoRA adapters: load an adapter folder.")
        if self._half_loaded:
            raise GenerationError("an earlier load failed half-way. Restart the engine.")
        self.version = None
        names: set[str] = set()

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                names.add(name)
                yield name, tensor.detach()

        with random_state_restored(), _as_generation_error(f"vLLM cannot load the weights {version}"):
            self._wake_up()
            self._half_loaded = True
            (missing,) = self._llm.collective_rpc(_copy_weights, args=(noted(),))
            self._half_loaded = False
        # vLLM fuses weights, and counts a fused one as loaded after one of its parts.
        missing += sorted((self._names or names) - names)
        if missing:
            raise GenerationError(
                f"the weights {version} lack {len(missing)} of the model's weights, such as {missing[0]}. "
                "Pass all of them."
            )
        self._names = frozenset(names)
        self._serve(version)

    def generate(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Continue each context; see `Generator.generate`. No cached keys and values of an earlier call are used."""
        check_request(contexts, max_new_tokens, seeds)
        for row, (context, budget) in enumerate(zip(contexts, max_new_tokens, strict=True)):
            if len(context) + budget > self._max_model_len:
                raise ConfigurationError(
                    f"row {row}: {len(context)} tokens and {budget} new ones exceed max_model_len="
                    f"{self._max_model_len} of the engine. Raise it to {len(context) + budget}."
                )
            if not 0 <= min(context) <= max(context) < self._vocabulary:
                raise ConfigurationError(
                    f"row {row}: the context contains tokens outside the model's vocabulary of {self._vocabulary}. Use "
                    "the model's tokenizer."
                )
        if self.version is None:
            raise GenerationError("the engine has no weights. Load them first.")
        rows = [row for row, budget in enumerate(max_new_tokens) if budget > 0]
        replies: list[list[int]] = [[] for _ in contexts]
        if not rows:
            return replies
        with random_state_restored(), _as_generation_error("vLLM failed to generate"):
            self._wake_up()
            # Cached keys and values may be of other weights, and would make this call depend on an earlier one.
            if not self._llm.reset_prefix_cache():
                raise GenerationError("vLLM did not reset its prefix cache, so stale keys and values might be used.")
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(contexts[row])} for row in rows],
                [self._parameters(max_new_tokens[row], seeds[row]) for row in rows],
                lora_request=self._adapter(),
                use_tqdm=False,
            )
            self._sleep()
        if len(outputs) != len(rows):
            raise GenerationError(f"vLLM returned {len(outputs)} of {len(rows)} rows.")
        for row, output in zip(rows, outputs, strict=True):
            (completion,) = output.outputs
            other = {span.version for span in completion.weight_versions or ()} ^ {self.version}
            if other:
                raise GenerationError(
                    f"row {row}: vLLM generated with weights other than {self.version}: {sorted(other)}."
                )
            replies[row] = self._checked(row, list(completion.token_ids), max_new_tokens[row])
        return replies

    def close(self) -> None:
        """Free the engine's resources; it must not be used afterwards."""
        if self._closed:
            return
        from vllm.distributed.parallel_state import destroy_model_parallel
        from vllm.v1.engine import core

        clean_up = core.cleanup_dist_env_and_memory
        if self._joined:
            # Keep the run's process group, which vLLM would destroy too.
            core.cleanup_dist_env_and_memory = destroy_model_parallel
        try:
            self._llm.llm_engine.engine_core.shutdown()
        finally:
            core.cleanup_dist_env_and_memory = clean_up
        self.version = None
        self._closed = True
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _serve(self, version: str) -> None:
        self._llm.llm_engine.set_weight_version(version)
        self.version = version

    def _adapter(self) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(*_ADAPTER, str(self._adapter_folder)) if self._has_adapter else None

    def _parameters(self, budget: int, seed: int) -> SamplingParams:
        from vllm import SamplingParams

        options = completion_options(self._sampling, budget, seed, self._end_ids)
        return SamplingParams(**options, detokenize=False)

    def _checked(self, row: int, tokens: list[int], budget: int) -> list[int]:
        """`tokens`, after checking that they are a valid reply."""
        ends = [place for place, token in enumerate(tokens) if token in self._end_ids]
        stopped = ends[:1] == [len(tokens) - 1]
        if len(tokens) > budget or (ends and not stopped) or (len(tokens) < budget and not stopped):
            raise GenerationError(
                f"row {row}: vLLM generated {len(tokens)} of {budget} tokens with EOS tokens at {ends}. A row must end "
                "at its first EOS token or at the budget."
            )
        if not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            raise GenerationError(
                f"row {row}: vLLM generated tokens outside the model's vocabulary of {self._vocabulary}."
            )
        return tokens

    def _wake_up(self) -> None:
        if self._sleeps and self._llm.llm_engine.is_sleeping():
            if torch.cuda.is_available():
                # The engine's allocator cannot use memory cached by torch's.
                torch.cuda.empty_cache()
            self._llm.wake_up()

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)


def _import_vllm() -> None:
    """Import vLLM with quiet logging and in one process, unless the environment sets otherwise."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise ConfigurationError(
            f"vLLM cannot be imported: {brief(error)}. Install it beside sapo: {pip_line('vllm')} (docs/engines.md), "
            "or use another generation backend."
        ) from error
    if Version(vllm.__version__) < Version(_OLDEST):
        raise ConfigurationError(f"vLLM {vllm.__version__} is too old to run in this process: install {_OLDEST}.")


def _launcher() -> str:
    """Name of vLLM's executor: with several processes, the one that joins the run's."""
    return "external_launcher" if dist.is_initialized() and dist.get_world_size() > 1 else "uni"


def _copy_weights(worker: Any, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Copy `tensors` into the weights of vLLM's worker; return the names of weights that were not loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.platforms import current_platform

    model = worker.model_runner.get_model()
    with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        loaded = model.load_weights(tensors)
        finalize_layerwise_reload(model, worker.model_config)
        if current_platform.is_cpu():
            # There the head has a packed copy of its weights, which is not rebuilt if they are tied to the embeddings.
            for module in model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)
    # Some vLLM models do not report what they loaded.
    return [] if loaded is None else sorted(dict(model.named_parameters()).keys() - loaded)


def _tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a model folder, one in memory at a time."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise GenerationError(f"{folder} contains no .safetensors file.")
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                yield name, weights.get_tensor(name)


@contextmanager
def _as_generation_error(what: str) -> Iterator[None]:
    """Re-raise vLLM's errors as a one-line `GenerationError` that begins with `what`."""
    from vllm.exceptions import VLLMError

    try:
        yield
    except SapoError:
        raise
    except (VLLMError, ValueError, RuntimeError, KeyError, AssertionError, OSError, SafetensorError) as error:
        raise GenerationError(f"{what}: {type(error).__name__} {brief(error)}".rstrip()) from error


@contextmanager
def _restore_process_state() -> Iterator[None]:
    """Restore the process-wide settings that vLLM changes when it starts."""
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    precision = torch.get_float32_matmul_precision()
    try:
        # vLLM seeds the process when it starts.
        with random_state_restored():
            yield
    finally:
        # On a CPU vLLM replaces the function by one that does nothing.
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
