"""What to change when a run does not fit: flags in the order in which they cost least, each tried."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers.training_args import OptimizerNames

from sapo.estimate.devices import Device
from sapo.estimate.estimate import Memory, memory_of
from sapo.estimate.passes import Lengths
from sapo.weights.footprint import RunModels, Strategy, build_run_models


@dataclass(frozen=True, slots=True)
class Change:
    """A flag that saves memory.

    Attributes:
        flag: as typed.
        price: what it costs beside memory.
        memory: with it and all flags before it.
    """

    flag: str
    price: str
    memory: Memory


def changes_that_fit(roles: RunModels, device: Device, lengths: Lengths, before: Memory) -> list[Change]:
    """Flags that bring the memory under that of the device, one on top of the other; those that save nothing are left.

    As many as it takes; the last one's memory may still be too large, when nothing more is known. `before` is the
    memory without any change.
    """
    last, changes = before, list[Change]()
    for flag, price, options in _candidates(roles):
        if last.needed <= device.memory:
            break
        new = _changed(roles, **options)
        found = memory_of(new, lengths, on_gpu=device.overlaps)
        if found.most < 0.99 * last.most:
            roles, last = new, found
            changes.append(Change(flag, price, found))
    return changes


def gpus_that_fit(roles: RunModels, device: Device, lengths: Lengths) -> tuple[int, Memory] | None:
    """The fewest of 2, 4 or 8 GPUs on which the run fits as it is, sharded by ZeRO-3; None if they do not suffice.

    An adapter's base is sharded likewise; of a run that has shards already, and of quantized weights, which each
    process loads whole, more GPUs are not looked at.
    """
    if roles.strategy.shards_weights or roles.quantized or not device.overlaps:
        return None
    for count in (2, 4, 8):
        if count >= roles.strategy.processes:
            found = memory_of(_changed(roles, Strategy("zero3", count)), lengths, on_gpu=True)
            if found.needed <= device.memory:
                return count, found
    return None


def _changed(roles: RunModels, strategy: Strategy | None = None, **options: Any) -> RunModels:
    """The run with other options, which have been checked as they were: these changes clash with none."""
    model_args, args = copy.copy(roles.model_args), copy.copy(roles.args)
    for name, value in options.items():
        setattr(model_args if hasattr(model_args, name) else args, name, value)
    return build_run_models(roles.config, model_args, args, strategy or roles.strategy)


def _candidates(start: RunModels) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Flag, price, and what `_changed` is given."""
    args, model_args, strategy = start.args, start.model_args, start.strategy
    if not args.gradient_checkpointing:
        yield "--gradient_checkpointing true", "activations are computed twice", {"gradient_checkpointing": True}
    if args.per_device_train_batch_size > 1 and (args.pairs_per_forward or 2) > 1:
        yield "--pairs_per_forward 1", "nothing but a little time", {"pairs_per_forward": 1}
    if args.pair_source == "self_play" and (args.generation_batch_size or 16) > 8:
        yield "--generation_batch_size 8", "a slower opponent", {"generation_batch_size": 8}
    if strategy.processes > 1 and not strategy.shards_weights:
        spread = {"strategy": Strategy("zero3", strategy.processes)}
        yield "--accelerate_config zero3", "weights travel between the GPUs", spread
    if not model_args.use_peft:
        yield (
            "--use_peft --lora_target_modules all-linear",
            "an adapter learns, not the model; raise the learning rate",
            {"use_peft": True, "lora_target_modules": "all-linear"},
        )
        if "8bit" not in OptimizerNames(args.optim).value:
            price = 'states in 8 bits; needs the extra "quantization"'
            yield "--optim adamw_bnb_8bit", price, {"optim": "adamw_bnb_8bit"}
        if args.objective == "dpo" and args.reference in ("initial", "opponent_copy") and args.pair_source != "paired":
            price = "another method: the reference moves with the opponent"
            yield "--reference opponent", price, {"reference": "opponent"}
    if model_args.dtype in (None, "float32") and args.bf16:
        price = "opponent, reference and gradients are rounded; the optimizer steps a float32 master"
        yield "--dtype bfloat16", price, {"dtype": "bfloat16"}
    if not (model_args.load_in_4bit or strategy.shards_weights):
        price = 'the base model is rounded to 4 bits; needs the extra "quantization"'
        yield "--load_in_4bit", price, {"load_in_4bit": True}
