"""Weights spread over processes: FSDP2's distributed tensors and the partitions of DeepSpeed ZeRO-3.

A sharded model computes by gathering a layer at a time, which decoding would repeat for each token. So nothing here
computes with a sharded copy: a copy is kept as bare shards, cut like the policy's, and for one call its weights are
gathered into a shell, a module of the same architecture without weights or hooks of its own.

Sources: `distributed.md` of the design notes; torch.distributed.fsdp.fully_shard; DeepSpeed's ZeRO-3 attributes of a
parameter (`ds_tensor`, `ds_shape`, `ds_numel`, `ds_process_group`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers.integrations import is_deepspeed_zero3_enabled

from sapo.errors import ConfigurationError


def shutdown_process_group() -> bool:
    """Wait for the other processes, then destroy the process group, if there is one: once, at the end of a run.

    Returns:
        Whether there was one. What is left of its connections may have threads still.
    """
    if not dist.is_initialized():
        return False
    dist.barrier()
    dist.destroy_process_group()
    return True


def will_shard_weights() -> bool:
    """Whether accelerate's launcher has set this process up for ZeRO-3 or FSDP."""
    return is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether this run spreads the policy's weights over its processes.

    Raises:
        ConfigurationError: it would do so by the first version of FSDP, or load them on one process only.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ConfigurationError("fsdp_version=1: version 2 is needed. Set fsdp_version: 2 in the configuration.")
        if plugin.cpu_ram_efficient_loading:
            raise ConfigurationError(
                "fsdp_cpu_ram_efficient_loading: true leaves all processes but one without weights to copy. Set it "
                "to false in the configuration."
            )
        return True
    return accelerator.distributed_type == DistributedType.DEEPSPEED and zero_stage(accelerator) == 3


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.state.deepspeed_plugin.zero_stage)


@contextmanager
def local_gradients(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """For all but the last pass of a micro-batch: gradients stay on their process, as within an accumulation."""
    state = accelerator.gradient_state
    due = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(due)


def sharding_of(accelerator: Accelerator) -> str:
    """How the state of the optimizer is spread, on which a checkpoint's form depends: "none", "fsdp2", "zero3", ..."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    stage = zero_stage(accelerator)
    return f"zero{stage}" if stage else "none"


def local_shard(weight: Any) -> Tensor:
    """What this process holds of `weight`, sharing its memory; the weight itself where it is whole."""
    if isinstance(weight, DTensor):
        local: Tensor = weight.to_local()
        return local
    if hasattr(weight, "ds_tensor"):
        shard: Tensor = weight.ds_tensor.data
        # The last partition is padded to the length of the others.
        return shard[: max(0, min(len(shard), weight.ds_numel - _partition_start(weight)))]
    whole: Tensor = weight
    return whole


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights by name, spread over the processes again where a forward pass of FSDP2 has left them gathered.

    Not between a forward pass and its backward pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def global_numel(weight: Any) -> int:
    """Number of elements of `weight` over all processes."""
    return int(weight.ds_numel) if hasattr(weight, "ds_numel") else weight.numel()


def gather(shard: Tensor, weight: Any, device: torch.device) -> Tensor:
    """The whole of which every process holds a shard, cut as `weight` is; all processes take part.

    Args:
        shard: of any floating type, with the shape of `local_shard(weight)`.
        weight: tells how the whole was cut.
        device: where the result lies, and where the collective runs.
    """
    shard = shard.detach().to(device)
    if isinstance(weight, DTensor):
        spread = DTensor.from_local(
            shard, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
        return spread.full_tensor()
    if hasattr(weight, "ds_tensor"):
        size = len(weight.ds_tensor.data)
        padded = shard.new_zeros(size)
        padded[: len(shard)] = shard
        group = weight.ds_process_group
        row = shard.new_empty(size * dist.get_world_size(group))
        dist.all_gather_into_tensor(row, padded, group=group)
        return row[: weight.ds_numel].view(weight.ds_shape)
    return shard


def gather_full_state_dict(weights: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of `shards`, cut as `weights` are, on the first process and in its main memory; empty elsewhere.

    One at a time, so that no device holds them all; all processes take part.
    """
    whole = {}
    first = not dist.is_initialized() or dist.get_rank() == 0
    for name, weight in weights.items():
        gathered = gather(shards[name], weight, _collective_device(weight))
        if first:
            whole[name] = gathered.cpu()
    return whole


def shard_like(whole: Tensor, weight: Any) -> Tensor:
    """This process's shard of `whole`, cut as `weight` is, without communication; shapes that differ are refused."""
    shape = _global_shape(weight)
    if tuple(whole.shape) != shape:
        raise ValueError(f"weights do not match: {list(whole.shape)}, expected {list(shape)}")
    if isinstance(weight, DTensor):
        for dimension, placement in enumerate(weight.placements):
            if isinstance(placement, Shard):
                parts = whole.chunk(weight.device_mesh.size(dimension), placement.dim)
                place = weight.device_mesh.get_local_rank(dimension)
                whole = parts[place] if place < len(parts) else whole.narrow(placement.dim, 0, 0)
    elif hasattr(weight, "ds_tensor"):
        start = _partition_start(weight)
        whole = whole.flatten()[start : start + len(local_shard(weight))]
    return whole


class GatherShell:
    """A module of the policy's architecture, empty but while its weights are gathered.

    Args:
        policy: not yet wrapped; may already be partitioned by ZeRO-3. Build the shell before anything closes over the
            policy's modules (a fused head does).
        device: to compute on.
        dtype: to compute in; None for that of each weight.
    """

    def __init__(self, policy: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        empty: dict[int, Any] = {
            id(weight): nn.Parameter(torch.empty(_global_shape(weight), device="meta"), requires_grad=False)
            for weight in policy.parameters()
        }
        self._device, self._dtype = device, dtype
        self._module: Any = copy.deepcopy(policy, empty).eval()
        for module in self._module.modules():
            module._buffers |= {name: buffer.to(device) for name, buffer in module.named_buffers(recurse=False)}
        self._slots = [
            (module, name, weight)
            for module in self._module.modules()
            for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        self._names = {id(weight): name for name, weight in self._module.named_parameters()}

    @property
    def architecture(self) -> Any:
        """The empty module: its configuration, its way to save itself."""
        return self._module

    @contextmanager
    def filled(self, policy: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Yield the module with `own` shards and, for all other weights, the policy's; all processes take part."""
        try:
            whole: dict[str, nn.Parameter] = {}
            for name, weight in policy.items():
                shard = own[name] if name in own else local_shard(weight)
                # Codes of quantized weights are no numbers to be cast.
                dtype = self._dtype if weight.is_floating_point() else None
                gathered = gather(shard.to(dtype or weight.dtype), weight, self._device)
                whole[name] = nn.Parameter(gathered, requires_grad=False)
            for module, name, weight in self._slots:
                module._parameters[name] = whole[self._names[id(weight)]]
            del whole, gathered
            yield self._module
        finally:
            for module, name, weight in self._slots:
                module._parameters[name] = weight


def _collective_device(weight: Any) -> torch.device:
    """Where this weight's processes can talk: weights may be kept in main memory, NCCL needs those of a GPU."""
    if isinstance(weight, DTensor):
        kind = weight.device_mesh.device_type
    else:
        kind = "cuda" if dist.get_backend(getattr(weight, "ds_process_group", None)) == "nccl" else "cpu"
    return torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device("cpu")


def _partition_start(weight: Any) -> int:
    return len(weight.ds_tensor.data) * dist.get_rank(weight.ds_process_group)


def _global_shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.ds_shape if hasattr(weight, "ds_shape") else weight.shape)
