"""The models that follow the policy: the opponent, an exponential moving average, and the reference.

Three kinds behind one small interface. Full models are copied. With LoRA there is one base model and one adapter a
role ("default" is the policy's), so that a run costs hardly more memory than SFT with the same adapter. Of a policy
whose weights are spread over processes each process keeps a copy of its shards.

Source: section 3.3 of the paper; `performance.md` of the design notes for the float32 master.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from sapo.errors import ConfigurationError
from sapo.weights.adapter_switch import AdapterSwitch
from sapo.weights.rounding import round_to
from sapo.weights.sharding import GatherShell, gather_full_state_dict, local_shard, named_weights, shard_like
from sapo.weights.stored import note_base

POLICY_ADAPTER = "default"


class ShadowModel(ABC):
    """Weights of the policy's architecture that no optimizer touches.

    Attributes:
        own_module: whether it computes with a module of its own; else with the policy's, adapters switched.
    """

    own_module = True

    @abstractmethod
    def using(self) -> AbstractContextManager[nn.Module]:
        """A context manager that yields a module computing with these weights; sharded, all processes take part."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, in the precision in which they are kept; empty when nothing has to be saved.

        Of sharded weights, the shards of this process.
        """

    def full(self) -> dict[str, Tensor]:
        """`tensors()` of all processes together, on the first of them; all take part."""
        return self.tensors()

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over `tensors`, which have the names and shapes of `self.tensors()`; else a `ValueError`."""
        _copy(self.tensors(), tensors)
        self._publish()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `full()` returned, on each process; a `ValueError` if names or shapes differ."""
        self.copy_from(tensors)

    def _publish(self) -> None:  # noqa: B027 - nothing to do but for a master beside the weights
        """Let what computes have changed `tensors()`."""


class MovingAverage(ShadowModel):
    """A `ShadowModel` that follows the policy and can be saved as a model.

    Attributes:
        collective: whether saving takes all processes.
    """

    collective = False

    @torch.no_grad()
    def follow(self, policy: Mapping[str, Tensor], decay: float) -> None:
        """Self <- decay x self + (1 - decay) x policy, shard by shard: no communication.

        The average of the factors A and B of LoRA is not the average of their product; for factors 5 % apart the two
        differ by 6e-4 of its norm (departure 13).
        """
        own = self.tensors()
        _lerp(own, {name: local_shard(policy[name]) for name in own}, 1 - decay)
        self._publish()

    def in_memory(self) -> dict[str, Tensor] | None:
        """All weights of the model by name if this process holds them unsharded and without adapters; else None."""
        return None

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write an ordinary model folder (with LoRA, an ordinary adapter folder); `collective`: all take part."""


def needs_float32_master(dtype: torch.dtype, decay: float) -> bool:
    """Whether a moving average of weights of `dtype` has to be kept in float32 to follow them in full.

    Kept in bfloat16 it follows 22 % of 60 steps of 5e-7 at a decay of 0.5, and 2 % at 0.9. A copy (0 or 1) needs none.
    """
    return dtype in (torch.float16, torch.bfloat16) and 0 < decay < 1


def policy_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The weights that the opponent follows: all parameters, or those of the policy's adapter.

    Tied parameters appear once.
    """
    if isinstance(policy, PeftModel):
        return _adapter_tensors(policy, POLICY_ADAPTER)
    return named_weights(policy)


class ModelCopy(MovingAverage):
    """A frozen copy of a full model, in evaluation mode.

    Args:
        policy: copied as it is now. Copy before anything closes over the policy's modules (a fused head does).
        decay: of the moving average that it will be; decides about the float32 master. 1 when it is only copied to.
    """

    def __init__(self, policy: nn.Module, *, decay: float = 1.0) -> None:
        self.model = copy.deepcopy(policy).requires_grad_(False).eval()
        weights = dict(self.model.named_parameters())
        self._master = {
            name: weight.detach().float()
            for name, weight in weights.items()
            if needs_float32_master(weight.dtype, decay)
        }

    def using(self) -> AbstractContextManager[nn.Module]:
        """The copy itself."""
        return nullcontext(self.model)

    def tensors(self) -> dict[str, Tensor]:
        """All parameters, the float32 master where there is one."""
        return {**dict(self.model.named_parameters()), **self._master}

    def in_memory(self) -> dict[str, Tensor]:
        """All of them, as they compute."""
        return dict(self.model.named_parameters())

    def _publish(self) -> None:
        weights = dict(self.model.named_parameters())
        for name, master in self._master.items():
            round_to(weights[name], master)

    def save_pretrained(self, folder: Path) -> None:
        """Write a model folder."""
        self.model.save_pretrained(folder)  # type: ignore[operator]


class AdapterCopy(MovingAverage):
    """A frozen adapter beside the policy's on the same base model.

    Args:
        policy: the model; its adapter "default" is copied.
        name: of the new adapter: "opponent" or "reference".

    Raises:
        ConfigurationError: a PEFT method other than LoRA.
    """

    own_module = False

    def __init__(self, policy: PeftModel, name: str) -> None:
        config = policy.peft_config[POLICY_ADAPTER]
        if config.peft_type != PeftType.LORA or config.bias != "none":
            kind = PeftType(config.peft_type).value
            what = kind if kind != "LORA" else f"LORA with bias={config.bias}"
            raise ConfigurationError(
                f"the adapter is of type {what}, and opponent and reference are adapters beside it, which needs LORA "
                "without biases. Add --adapter merge to merge it into its base and train that (with --use_peft, by an "
                "adapter of LoRA)."
            )
        self._policy = policy
        self._switch = AdapterSwitch(policy)
        self.name = name
        with _adapter_state_restored(policy):
            policy.add_adapter(name, copy.deepcopy(config))
        self.copy_from(policy_tensors(policy))
        for weight in self.tensors().values():
            weight.requires_grad_(False)

    def using(self) -> AbstractContextManager[nn.Module]:
        """The base model with this adapter active; afterwards the policy's is."""
        return self._switch.to(self.name)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's weights under the policy adapter's names."""
        return _adapter_tensors(self._policy, self.name)

    def save_pretrained(self, folder: Path) -> None:
        """Write an adapter folder."""
        save_adapter(self._policy, self.name, folder)


class BaseModel(ShadowModel):
    """The base model with its adapters off: what a fresh LoRA adapter starts from, so a reference for nothing."""

    own_module = False

    def __init__(self, policy: PeftModel) -> None:
        self._switch = AdapterSwitch(policy)

    def using(self) -> AbstractContextManager[nn.Module]:
        """The model with adapters off; afterwards they are on again."""
        return self._switch.to(None)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the base model never changes."""
        return {}


class ShardedCopy(MovingAverage):
    """The shards that this process holds of a frozen copy, cut like the policy's.

    With LoRA only those of the adapter; everything else is the policy's own.

    Args:
        policy: wrapped, its weights spread over the processes; copied as it is now.
        shell: computes with the weights while they are gathered.
        decay: see `ModelCopy`.
    """

    collective = True

    def __init__(self, policy: nn.Module, shell: GatherShell, *, decay: float = 1.0) -> None:
        self._policy = policy
        self._shell = shell
        self._shards = {}
        for name, weight in policy_tensors(policy).items():
            dtype = torch.float32 if needs_float32_master(weight.dtype, decay) else weight.dtype
            self._shards[name] = local_shard(weight).detach().to(dtype, copy=True)

    def using(self) -> AbstractContextManager[nn.Module]:
        """A module that computes with the gathered weights, which are freed afterwards."""
        return self._shell.filled(named_weights(self._policy), self._shards)

    def tensors(self) -> dict[str, Tensor]:
        """The shards of this process."""
        return self._shards

    def full(self) -> dict[str, Tensor]:
        """All weights on the first process, gathered one at a time; empty elsewhere."""
        return gather_full_state_dict(policy_tensors(self._policy), self._shards)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over this process's shards of full tensors."""
        cuts = policy_tensors(self._policy)
        _same_names(self._shards, tensors)
        self.copy_from({name: shard_like(full, cuts[name]) for name, full in tensors.items()})

    def save_pretrained(self, folder: Path) -> None:
        """Write a model folder, with LoRA an adapter folder, on the first process."""
        cuts = policy_tensors(self._policy)
        save_full(self._shell, {name: weight.to(cuts[name].dtype) for name, weight in self.full().items()}, folder)


def make_opponent(policy: nn.Module, *, decay: float) -> MovingAverage:
    """The opponent of `policy`, equal to it now."""
    if isinstance(policy, PeftModel):
        return AdapterCopy(policy, "opponent")
    return ModelCopy(policy, decay=decay)


def make_reference(policy: nn.Module, *, may_be_base: bool) -> ShadowModel:
    """A reference equal to `policy` now.

    Args:
        policy: copied, unless it is a base model under an adapter that does nothing yet.
        may_be_base: whether the reference never changes, so that the base with adapters off can stand for it.
    """
    if not isinstance(policy, PeftModel):
        return ModelCopy(policy)
    if may_be_base and is_neutral(policy):
        return BaseModel(policy)
    return AdapterCopy(policy, "reference")


@torch.no_grad()
def squared_distance(weights: Mapping[str, Tensor], policy: Mapping[str, Tensor]) -> Tensor:
    """Squared norms of policy - weights and of the policy, `[2]`; of sharded weights, this process's part of both."""
    # One tensor at a time and summed on the device: no second copy of the model.
    parts = []
    for name, weight in weights.items():
        own = local_shard(policy[name]).float()
        parts.append(torch.stack([(own - weight.float()).pow(2).sum().double(), own.pow(2).sum().double()]))
    return torch.stack(parts).sum(0)


def save_adapter(policy: PeftModel, name: str, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write adapter `name` alone into `folder`, as the folder's only adapter; with the weights of `state_dict`."""
    with warnings.catch_warnings():
        # A base that is a GGUF file or a merged adapter has no configuration to compare the vocabulary with.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        policy.save_pretrained(
            str(folder),
            selected_adapters=[name],
            state_dict=state_dict,
            save_embedding_layers=saves_embeddings(policy, name),
        )
    if name != POLICY_ADAPTER:
        # peft's card is a form with nothing filled in; the run's own describes the opponent too.
        (folder / "README.md").unlink(missing_ok=True)
    nested = folder / name
    # PEFT puts every adapter but "default" into a folder of its own.
    if nested.is_dir():
        for file in nested.iterdir():
            file.replace(folder / file.name)
        nested.rmdir()
    note_base(folder, base_digest(policy))


def base_digest(policy: Any) -> str | None:
    """`stored_digest` of the base model of a policy that is an adapter, as it was loaded; None where it is unknown."""
    digest: str | None = getattr(policy, "base_digest", None)
    return digest


def saves_embeddings(policy: PeftModel, name: str) -> Literal["auto", False]:
    """Whether peft stores the embeddings of the base with adapter `name`, or decides that itself.

    It would do so where the base has grown, though the adapter holds all of the new rows.
    """
    return "auto" if getattr(policy.peft_config[name], "trainable_token_indices", None) is None else False


def save_sharded(policy: nn.Module, shell: GatherShell, folder: Path) -> None:
    """Write a sharded policy as an ordinary folder on the first process; all take part."""
    tensors = policy_tensors(policy)
    save_full(
        shell, gather_full_state_dict(tensors, {name: local_shard(weight) for name, weight in tensors.items()}), folder
    )


def save_full(shell: GatherShell, full: Mapping[str, Tensor], folder: Path) -> None:
    """Write gathered weights with the architecture of `shell`; nothing where nothing was gathered."""
    if not full:
        return
    architecture = shell.architecture
    if isinstance(architecture, PeftModel):
        save_adapter(architecture, POLICY_ADAPTER, folder, full)
    else:
        buffers = {name: buffer for name, buffer in architecture.state_dict().items() if not buffer.is_meta}
        architecture.save_pretrained(folder, state_dict={**buffers, **full})


def _adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    tensors = {}
    for name, weight in named_weights(model).items():
        parts = name.split(".")
        if adapter in parts:
            place = len(parts) - 1 - parts[::-1].index(adapter)
            tensors[".".join([*parts[:place], POLICY_ADAPTER, *parts[place + 1 :]])] = weight
    return tensors


def is_neutral(model: PeftModel) -> bool:
    """Whether the policy's adapter adds nothing: every factor B is zero, as LoRA starts."""
    factors = [
        weight
        for name, weight in _adapter_tensors(model, POLICY_ADAPTER).items()
        if "lora_B" in name or "lora_embedding_B" in name
    ]
    return bool(factors) and not any(bool(weight.any()) for weight in factors)


@contextmanager
def _adapter_state_restored(model: PeftModel) -> Iterator[None]:
    """Restore the active adapter and every `requires_grad`: PEFT moves both when it switches."""
    active = model.active_adapter
    trainable = {name: weight.requires_grad for name, weight in model.named_parameters()}
    try:
        yield
    finally:
        model.set_adapter(active)
        for name, weight in model.named_parameters():
            weight.requires_grad_(trainable.get(name, False))


def _lerp(own: Mapping[str, Tensor], policy: Mapping[str, Tensor], weight: float) -> None:
    targets = list(own.values())
    sources = [policy[name].detach() for name in own]
    same = [(t, s) for t, s in zip(targets, sources, strict=True) if t.dtype == s.dtype]
    if same:
        torch._foreach_lerp_([t for t, _ in same], [s for _, s in same], weight)
    for target, source in zip(targets, sources, strict=True):
        if target.dtype != source.dtype:
            round_to(target, torch.lerp(target.float(), source.float(), weight))


def _same_names(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    if own.keys() != tensors.keys():
        different = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"weights do not match: {len(different)} names differ, such as {different[0]}")


def _copy(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    _same_names(own, tensors)
    for name, target in own.items():
        if target.shape != tensors[name].shape:
            raise ValueError(
                f"weights do not match: {name} is {list(tensors[name].shape)}, expected {list(target.shape)}"
            )
        round_to(target, tensors[name])
