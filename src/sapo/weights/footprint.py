"""What the models of a run take in memory, from a model's configuration alone: no weights are read.

Policy, opponent and reference are built by the package's own functions on the meta device, whose tensors have shapes
and no storage; what is counted is what a run makes. How the weights, gradients and optimizer states of each are divided
over processes follows DeepSpeed (ZeRO-2, ZeRO-3) and accelerate (FSDP2); see docs/estimate.md.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.training_args import OptimizerNames
from trl import ModelConfig

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError
from sapo.text.numbers import bytes_text
from sapo.weights.opponent import (
    ModelCopy,
    ShadowModel,
    make_opponent,
    make_reference,
    needs_float32_master,
    policy_tensors,
)
from sapo.weights.policy import adapter_config, disable_dropout, with_adapter

StrategyName = Literal["none", "multi_gpu", "zero2", "zero3", "fsdp2"]

_STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}
"""Optimizer states of a parameter's own size and type; Adam and everything else: 2."""

_EIGHT_BIT_STATE = 1 + 4 / 256
"""Bytes of a state in bitsandbytes' 8-bit optimizers: one, and a float32 scale for each block of 256."""

_BUCKET = 500_000_000
"""Elements of DeepSpeed's default reduce bucket."""

_LIVE = 1_000_000_000
"""Elements of gathered weights that ZeRO-3 keeps at most, by default."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a run is divided over processes, one a GPU; the name is of a file of `--accelerate_config`."""

    name: StrategyName = "none"
    processes: int = 1

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self.name in ("zero3", "fsdp2")

    @property
    def shards_gradients(self) -> bool:
        """Whether each process holds a part of the gradients only."""
        return self.name in ("zero2", "zero3", "fsdp2")


@dataclass(frozen=True, slots=True)
class RunModels:
    """A run with its models on the meta device.

    Attributes:
        config: of the model.
        model_args: type of the weights, adapter, quantization, attention.
        args: of the run.
        strategy: how it is divided over processes.
        policy: with its adapter, if it has one.
        opponent: None for paired data.
        reference: None without one, with the live opponent, and where the base model under an adapter stands for it.
        quantized: bytes of an element of those weights that are kept in 4 or 8 bits, by the weight's `id`.
    """

    config: Any
    model_args: ModelConfig
    args: SAPOConfig
    strategy: Strategy
    policy: nn.Module
    opponent: ShadowModel | None
    reference: ShadowModel | None
    quantized: dict[int, float]

    @property
    def width(self) -> int:
        """Bytes of an element in the precision of the computation."""
        return 2 if self.args.bf16 or self.args.fp16 else 4

    @property
    def trained(self) -> list[Tensor]:
        """Weights that the optimizer touches."""
        return [weight for weight in self.policy.parameters() if weight.requires_grad]


def running_strategy(args: SAPOConfig) -> Strategy:
    """How this run is divided over processes, as accelerate's launcher has told it by environment variables."""
    if args.world_size < 2:
        return Strategy()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return Strategy("fsdp2", args.world_size)
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0
    if stage == 3:
        return Strategy("zero3", args.world_size)
    return Strategy("zero2" if stage == 2 else "multi_gpu", args.world_size)


def build_run_models(config: Any, model_args: ModelConfig, args: SAPOConfig, strategy: Strategy) -> RunModels:
    """Policy, opponent and reference of a run, without storage; a strategy of ZeRO changes the type of the weights.

    A new adapter is assumed: continuing from an existing one, `reference: initial` costs an adapter more.
    """
    # A round trains on pairs that were written before: the opponent is not there any more.
    has_opponent = args.pair_source == "self_play" and args.num_rounds is None
    dtype = weight_type(config, model_args)
    if strategy.name in ("zero2", "zero3") and args.bf16:
        dtype = torch.bfloat16
    # The kernels of another attention need not be installed here; unset, transformers takes what the model has.
    attention = "eager" if model_args.attn_implementation == "eager" else None
    with _without_partitioning(args), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
        quantized = _quantize(model, model_args)
        policy: Any = with_adapter(model, adapter_config(model_args), args)
        if args.disable_dropout:
            disable_dropout(policy)
        adapter = isinstance(policy, PeftModel)
        if strategy.name == "fsdp2" and (args.bf16 or args.fp16):
            # accelerate keeps what is trained in float32 beside mixed precision.
            for weight in policy.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()
        opponent = make_opponent(policy, decay=args.ema_decay) if has_opponent else None
        reference = None
        if args.reference in ("initial", "opponent_copy"):
            base = adapter and args.reference == "initial"
            reference = None if base else make_reference(policy, may_be_base=False)
    return RunModels(config, model_args, args, strategy, policy, opponent, reference, quantized)


def model_memory(roles: RunModels) -> dict[str, int]:
    """Bytes on one device of what lasts from step to step, and of the gradients, by part."""
    policy, strategy = roles.policy, roles.strategy
    own = 1 / strategy.processes if strategy.shards_weights else 1
    whole = _left_whole(roles)
    base = [weight for weight in _base(roles) if id(weight) not in whole]
    parts = {"policy": _size(base, roles.quantized) * own + sum(whole.values())}
    if isinstance(policy, PeftModel):
        parts["policy's adapter"] = _size(policy_tensors(policy).values()) * own
    if roles.opponent is not None:
        kept = list(roles.opponent.tensors().values())
        if isinstance(roles.opponent, ModelCopy) and not strategy.shards_weights:
            parts["opponent"] = _size(roles.opponent.model.parameters()) * own
            parts["opponent's float32 master"] = _size(kept) * own if _has_master(roles) else 0
        else:
            parts["opponent"] = _size(kept) * own
    if roles.reference is not None:
        parts["reference"] = _size(roles.reference.tensors().values()) * own
    parts["gradients"] = gradient_memory(roles)
    parts["float32 master"] = 4 * _count(_mastered(roles))
    parts["optimizer"] = _optimizer_memory(roles)
    return {name: round(size) for name, size in parts.items() if size}


def check_memory(config: Any, model_args: ModelConfig, args: SAPOConfig) -> None:
    """Refuse a run whose models, gradients and optimizer exceed the device's memory; activations come on top."""
    parts = model_memory(build_run_models(config, model_args, args, running_strategy(args)))
    needed = sum(parts.values())
    available = free_memory(args)
    if needed > available:
        listed = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items())
        raise ConfigurationError(
            f"{model_args.model_name_or_path} needs about {bytes_text(needed)} ({listed}) before activations, and "
            f"{bytes_text(available)} are free on {args.device.type}. Use more GPUs with --accelerate_config zero3 or "
            "fsdp2, --use_peft, --optim adamw_bnb_8bit, a smaller model, or --skip_memory_check; sapo estimate tells "
            "what each saves."
        )


def free_memory(args: SAPOConfig) -> float:
    """Bytes that this process can still have on its device."""
    on_device = torch.get_device_module(args.device)
    if args.device.type == "cpu" or not hasattr(on_device, "mem_get_info"):
        # All processes of this machine share its memory; an accelerator without memory of its own, such as MPS, too.
        return float(psutil.virtual_memory().available / max(1, args.world_size))
    # What torch has reserved and not given out is free to it, too.
    unused = on_device.memory_reserved(args.device) - on_device.memory_allocated(args.device)
    return float(on_device.mem_get_info(args.device)[0] + unused)


def gradient_memory(roles: RunModels) -> float:
    """Bytes of the gradients on one device, and of what the processes exchange them in."""
    strategy, size, count = roles.strategy, _size(roles.trained), _count(roles.trained)
    if strategy.name == "multi_gpu":
        # DistributedDataParallel keeps buckets of all gradients beside them.
        return 2 * size
    if strategy.name == "fsdp2":
        # Between two passes without communication each process keeps whole gradients, in the type of the computation.
        return size / strategy.processes + (count * roles.width if _several_passes(roles.args) else 0)
    if strategy.shards_gradients:
        return size / strategy.processes + min(_BUCKET, count) * roles.width
    return size


def gathered_memory(roles: RunModels) -> int:
    """Bytes of the weights that are whole at one time in a forward or backward pass of a sharded policy."""
    if not roles.strategy.shards_weights:
        return 0
    if roles.strategy.name == "zero3":
        return min(_LIVE * roles.width, _gathered(roles.policy.parameters(), roles))
    layers = _layers(roles.policy)
    inside = sum(_gathered(layer.parameters(), roles) for layer in layers)
    largest = max((_gathered(layer.parameters(), roles) for layer in layers), default=0)
    # The layer at work, the one fetched ahead, its gradients; and what lies outside the layers.
    return 3 * largest + _gathered(roles.policy.parameters(), roles) - inside


def gather_shell_memory(roles: RunModels) -> int:
    """Bytes of the weights gathered whole on each device while a sharded opponent or reference computes."""
    return _gathered(roles.policy.parameters(), roles) if roles.strategy.shards_weights else 0


def _gathered(weights: Iterable[Tensor], roles: RunModels) -> int:
    """Bytes of `weights` gathered to compute with: codes of quantized ones as they are."""
    whole, codes = _left_whole(roles), roles.quantized
    return round(sum(w.numel() * codes.get(id(w), roles.width) for w in _different(weights) if id(w) not in whole))


def _left_whole(roles: RunModels) -> dict[int, float]:
    """Bytes, by `id`, of the weights that each process holds whole though others are sharded: quantized, with FSDP2."""
    if roles.strategy.name != "fsdp2":
        return {}
    codes = roles.quantized
    return {id(w): w.numel() * codes[id(w)] for w in roles.policy.parameters() if id(w) in codes}


def optimizer_scratch(roles: RunModels, *, on_gpu: bool) -> int:
    """Bytes that a step of the optimizer needs for itself."""
    name, strategy, trained = _optimizer(roles.args), roles.strategy, roles.trained
    # A master's gradient is the weight's in float32, which is given up as it is copied.
    casts = 2 * _count(_mastered(roles))
    if "fused" in name or "8bit" in name:
        return casts
    if strategy.name.startswith("zero"):
        # Gradients of the own part in float32.
        return 4 * _count(trained) // strategy.processes
    size = _stepped(roles) / (strategy.processes if strategy.shards_gradients else 1)
    # On a GPU torch steps all weights at once, elsewhere one by one.
    largest = max((weight.numel() * weight.element_size() for weight in trained), default=0)
    return casts + (round(size) if on_gpu else 2 * largest)


def weight_type(config: Any, model_args: ModelConfig) -> torch.dtype:
    """The type in which the weights are loaded."""
    name = model_args.dtype
    if name in (None, "auto"):
        own = config.get_text_config().dtype or torch.float32
        return own if isinstance(own, torch.dtype) else getattr(torch, str(own))
    return getattr(torch, str(name))  # type: ignore[no-any-return]


def _optimizer(args: SAPOConfig) -> str:
    return str(OptimizerNames(args.optim).value)


def _optimizer_memory(roles: RunModels) -> float:
    name, strategy, count = _optimizer(roles.args), roles.strategy, _count(roles.trained)
    states = next((number for key, number in _STATES.items() if key in name), 2)
    own = 1 / strategy.processes if strategy.shards_gradients else 1
    if "8bit" in name:
        size = count * states * _EIGHT_BIT_STATE
    elif strategy.name.startswith("zero"):
        size = 4.0 * count * states
    else:
        size = float(_stepped(roles) * states)
    if strategy.name.startswith("zero"):
        # DeepSpeed steps a float32 copy of what is trained.
        size += 4 * count
    return size * own


def _mastered(roles: RunModels) -> list[Tensor]:
    """Trained weights that have a float32 master beside them; DeepSpeed's is counted with its optimizer."""
    halves = (torch.bfloat16, torch.float16)
    return [w for w in roles.trained if w.dtype in halves] if roles.strategy.name in ("none", "multi_gpu") else []


def _stepped(roles: RunModels) -> float:
    """Bytes of what the optimizer steps: the masters where there are some, else the weights."""
    mastered = {id(weight): weight for weight in _mastered(roles)}
    rest = [weight for weight in roles.trained if id(weight) not in mastered]
    return _size(rest) + 4.0 * _count(mastered.values())


def _several_passes(args: SAPOConfig) -> bool:
    most = 1 if args.tokens_per_forward else args.pairs_per_forward or args.pairs_per_micro_batch
    return bool(args.gradient_accumulation_steps > 1 or most < args.pairs_per_micro_batch)


def _has_master(roles: RunModels) -> bool:
    decay = roles.args.ema_decay
    return any(needs_float32_master(weight.dtype, decay) for weight in roles.policy.parameters())


def _base(roles: RunModels) -> list[Tensor]:
    """The policy's weights, without those of adapters."""
    adapters = isinstance(roles.policy, PeftModel)
    return [w for name, w in roles.policy.named_parameters() if not (adapters and "lora_" in name)]


def _different(weights: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(weight): weight for weight in weights}.values()


def _count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in _different(weights))


def _size(weights: Iterable[Tensor], quantized: dict[int, float] | None = None) -> float:
    known = quantized or {}
    return sum(w.numel() * known.get(id(w), w.element_size()) for w in _different(weights))


def _layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of modules: the decoder's layers."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _quantize(model: Any, model_args: ModelConfig) -> dict[int, float]:
    """What bitsandbytes does to the linear layers, and peft to everything else."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return {}
    # In 4 bits there is a scale for each 64 weights, in float32, or in 8 bits when that is quantized in turn.
    width = 1.0 if model_args.load_in_8bit else 0.5 + (1 if model_args.use_bnb_nested_quant else 4) / 64
    head = model.get_output_embeddings()
    quantized = {id(m.weight): width for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    for weight in model.parameters():
        if id(weight) not in quantized:
            weight.data = weight.data.float()
    return quantized


@contextmanager
def _without_partitioning(args: SAPOConfig) -> Iterator[None]:
    """Keep transformers from cutting the model for ZeRO-3 as it is built."""
    plugin = args.deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()
