"""Float32 masters of weights that are trained in bfloat16, on one process and with DistributedDataParallel.

A weight of 0.02 has neighbours 1.2e-4 away in bfloat16, and a step of the published learning rate is 5e-7: without a
master the step rounds away. DeepSpeed and FSDP2 keep masters of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from sapo.errors import CheckpointError, ConfigurationError
from sapo.weights.rounding import round_to, rounded
from sapo.weights.sharding import local_shard, named_weights

_SAVED_AS = "float32_masters"


class MasterWeights(torch.optim.Optimizer):
    """Steps float32 masters of the bfloat16 weights that `optimizer` was made for, and rounds them to the weights.

    Forward pass, backward pass and gradients stay in bfloat16; the wrapped optimizer sees float32 only, so its state is
    float32. Weights of other types are stepped as they are. Parameter groups are those of the wrapped optimizer, so
    schedulers act on it; clip the gradients of the weights.

    Args:
        optimizer: its groups and state belong to the masters from now on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Not Optimizer.__init__: it would keep groups and state of its own beside those of the wrapped optimizer.
        self.optimizer = optimizer
        self._weights: list[Tensor] = []
        self._masters: list[Tensor] = []
        for group in optimizer.param_groups:
            group["params"] = [self._with_master(weight) for weight in group["params"]]

    def _with_master(self, weight: Tensor) -> Tensor:
        if weight.dtype != torch.bfloat16:
            return weight
        master = nn.Parameter(weight.detach().float())
        # Adagrad has a state before its first step, and one that was passed in may have stepped.
        for name, value in self.optimizer.state.pop(weight, {}).items():
            rounds = isinstance(value, Tensor) and value.dtype == weight.dtype
            self.optimizer.state[master][name] = value.float() if rounds else value
        self._weights.append(weight)
        self._masters.append(master)
        return master

    @property
    def state(self) -> Any:  # type: ignore[override]
        """State of the wrapped optimizer, by master."""
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        """Groups of the wrapped optimizer, which hold the masters."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        """Defaults of the wrapped optimizer."""
        return self.optimizer.defaults

    def masters(self) -> dict[int, Tensor]:
        """The masters by `id` of their weights."""
        return {id(weight): master for weight, master in zip(self._weights, self._masters, strict=True)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the masters with the weights' gradients, then round them to the weights.

        Each gradient is given up as it is copied to float32, so that the two are not held side by side.
        """
        if closure is not None:
            raise ValueError("an optimizer with float32 masters takes no closure")
        for weight, master in zip(self._weights, self._masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        for master in self._masters:
            master.grad = None
        self._round()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the weights."""
        for weight in self._weights:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def train(self) -> None:
        """Let an optimizer that keeps two sets of weights (schedule-free) show those to train."""
        self._switch("train")

    def eval(self) -> None:
        """Let it show those to evaluate."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        switch = getattr(self.optimizer, mode, None)
        if callable(switch):
            switch()
            self._round()

    @torch.no_grad()
    def take_changed_weights(self) -> None:
        """Start from the weights where they are no longer the rounded masters: something else has loaded them."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            master.copy_(torch.where(rounded(master, weight.dtype) == weight, master, weight.float()))

    def state_dict(self) -> dict[str, Any]:
        """State of the wrapped optimizer, and the masters."""
        return {**self.optimizer.state_dict(), _SAVED_AS: list(self._masters)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the weights are rounded from its masters.

        Raises:
            CheckpointError: it has no masters, or others.
        """
        state = dict(state_dict)
        masters = state.pop(_SAVED_AS, [])
        if [master.shape for master in masters] != [master.shape for master in self._masters]:
            raise CheckpointError(
                "the checkpoint's optimizer state lacks the float32 masters of these bfloat16 weights. Start afresh "
                "from its weights, in another output_dir."
            )
        self.optimizer.load_state_dict(state)
        for master, saved in zip(self._masters, masters, strict=True):
            master.copy_(saved)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            round_to(weight, master)


def needs_master(policy: nn.Module, accelerator: Accelerator) -> bool:
    """Whether this package has to keep float32 masters of the trained weights.

    Raises:
        ConfigurationError: steps would round away, and there can be no master.
    """
    trained = {weight.dtype for weight in policy.parameters() if weight.requires_grad}
    if accelerator.distributed_type == DistributedType.DEEPSPEED or not trained & {torch.bfloat16, torch.float16}:
        return False
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.mixed_precision == "no":
            raise ConfigurationError(
                "dtype=bfloat16 with FSDP2 and bf16=false: steps would round away, because FSDP2 keeps float32 masters "
                "only in mixed precision. Set bf16 to true, or dtype to float32."
            )
        return False
    if torch.float16 in trained:
        raise ConfigurationError(
            "dtype=float16: weights trained in float16 would lose small gradients and steps. Set dtype to bfloat16, or "
            "to float32 with fp16=true."
        )
    return True


def with_masters(optimizer: torch.optim.Optimizer) -> MasterWeights:
    """`optimizer` on float32 masters.

    Raises:
        ConfigurationError: it steps during the backward pass.
    """
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if kinds & {"LomoOptimizer", "Lomo", "AdaLomo", "LayerWiseDummyOptimizer"}:
        raise ConfigurationError(
            f"optim={type(optimizer).__name__} with dtype=bfloat16: it updates weights in the backward pass, where "
            "steps this small round away. Set dtype to float32, or choose another optimizer."
        )
    return MasterWeights(optimizer)


def stepped_tensors(policy: nn.Module, optimizer: Any, masters: Mapping[int, Tensor]) -> list[Tensor]:
    """What the optimizer steps on this process: trained weights, or their float32 masters (by `id` of the weight)."""
    zero = getattr(optimizer, "optimizer", None)
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        # DeepSpeed's ZeRO-3, and ZeRO-1 and ZeRO-2.
        if hasattr(zero, name):
            return list(getattr(zero, name))
    trained: Iterable[Tensor] = (weight for weight in named_weights(policy).values() if weight.requires_grad)
    return [masters.get(id(weight), local_shard(weight)) for weight in trained]


class MovedSample:
    """Which of what the optimizer steps a step changes, seen on a sample of at most about a million weights."""

    LARGEST = 1_000_000

    def __init__(self, tensors: Callable[[], list[Tensor]]) -> None:
        self._tensors = tensors
        self._before: list[Tensor] = []

    def take(self) -> None:
        """Remember the sampled weights before a step."""
        self._before = [part.clone() for part in self._sample()]

    def moved(self) -> tuple[float, int]:
        """Share of the sampled weights that have changed since `take`, and their number."""
        now, before = self._sample(), self._before
        self._before = []
        count = sum(part.numel() for part in before)
        if not count:
            return 0.0, 0
        changed = torch.stack([(a != b).sum() for a, b in zip(now, before, strict=True)]).sum()
        return float(changed) / count, count

    def _sample(self) -> list[Tensor]:
        tensors = [tensor.detach().flatten() for tensor in self._tensors()]
        # Odd, so that it does not always meet the same columns of a matrix.
        stride = -(-sum(tensor.numel() for tensor in tensors) // self.LARGEST) | 1
        return [tensor[::stride] for tensor in tensors]
