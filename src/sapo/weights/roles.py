"""Policy, opponent and reference of a run: one place that decides how each is kept, placed and computed with.

What is set here is set for all of them alike: the type of the weights, sharding, the fused head, autocast. A role that
was forgotten would compute in another way than the policy, and the first margin would differ from 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from sapo.config import HAS_FUSED_LM_HEAD, SAPOConfig
from sapo.errors import ConfigurationError
from sapo.generation.weight_layout import weights_cast
from sapo.weights.digest import weights_digest
from sapo.weights.master import MasterWeights, needs_master, stepped_tensors, with_masters
from sapo.weights.opponent import (
    POLICY_ADAPTER,
    ModelCopy,
    MovingAverage,
    ShadowModel,
    ShardedCopy,
    make_opponent,
    make_reference,
    policy_tensors,
    save_adapter,
    save_sharded,
    squared_distance,
)
from sapo.weights.sharding import GatherShell, shards_weights, zero_stage
from sapo.weights.source import quantization_method


class Roles:
    """The models of a run.

    Args:
        policy: not wrapped, not yet sharded by FSDP2 (by ZeRO-3 it may be); before anything closes over its modules.
        args: `pair_source`, `objective`, `reference`, `ema_decay`, `bf16`, `fp16` and `fused_lm_head` decide.
        accelerator: of the run.
        unwrapped: returns the policy without wrappers, at any later time.
        use_cache: of the configuration that is saved; Trainer sets it to false while it trains.

    Attributes:
        opponent: the moving average that generates; None where pairs come from the data, and of a sharded policy
            before `create_copies`.
        reference: the reference of DPO, perhaps the opponent itself; None without one.
        sharded: whether each process holds shards of the weights only, so that computing with a copy and saving take
            all processes.
        fused_head: whether log-probabilities come from trl's fused head.
    """

    def __init__(
        self,
        policy: nn.Module,
        args: SAPOConfig,
        accelerator: Accelerator,
        unwrapped: Callable[[], nn.Module],
        *,
        use_cache: bool = True,
    ) -> None:
        self._args = args
        self._use_cache = use_cache
        self._accelerator = accelerator
        self._unwrapped = unwrapped
        self._created = False
        self._start_digest: str | None = None
        self.opponent: MovingAverage | None = None
        self.reference: ShadowModel | None = None
        self.sharded = shards_weights(accelerator)
        self._master: MasterWeights | None = None
        self._keeps_master = needs_master(policy, accelerator)
        self._half = half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        if zero_stage(accelerator) in (1, 2):
            _as_deepspeed_takes_it(policy, args.device, half)
        if accelerator.distributed_type == DistributedType.FSDP:
            _return_float32(accelerator)
        self._shell = GatherShell(policy, args.device, half) if self.sharded else None
        if self._shell is None:
            self.create_copies()
        self.fused_head = self._fuse_heads(policy)

    # ---- Construction ----

    def create_copies(self) -> None:
        """Opponent and reference, equal to the policy now; once. Of a sharded policy, when it has been sharded."""
        if self._created:
            return
        self._created = True
        args, policy, shell = self._args, self._unwrapped(), self._shell
        if args.pair_source == "self_play":
            decay = args.ema_decay
            self.opponent = (
                make_opponent(policy, decay=decay) if shell is None else ShardedCopy(policy, shell, decay=decay)
            )
        if args.reference == "none":
            return
        if args.reference == "opponent":
            self.reference = self.opponent
        elif shell is not None:
            self.reference = ShardedCopy(policy, shell)
        else:
            self.reference = make_reference(policy, may_be_base=args.reference == "initial")

    def _fuse_heads(self, policy: nn.Module) -> bool:
        """Fuse the heads of all roles, or of none.

        Only now: a fused forward closes over its module, so a copy made after it would run the policy's weights.
        """
        wanted = self._args.fused_lm_head
        if wanted is None:
            wanted = HAS_FUSED_LM_HEAD and self._args.device.type == "cuda"
        if not wanted:
            return False
        if zero_stage(self._accelerator) == 3:
            # Its backward pass gathers the head's weight and has freed it again when the gradient is added.
            if self._args.fused_lm_head:
                raise ConfigurationError(
                    "fused_lm_head=true with ZeRO-3: trl's fused head fails in the backward pass of a sharded head. "
                    "Leave the option out, or use --accelerate_config fsdp2 or zero2."
                )
            return False
        if isinstance(policy.get_output_embeddings(), (BaseTunerLayer, TrainableTokensWrapper)):  # type: ignore[operator]
            if self._args.fused_lm_head:
                raise ConfigurationError(
                    "fused_lm_head=true with LoRA on the output head: trl's fused head reads the base weight alone. "
                    "Leave the option out, or leave the head out of lora_target_modules."
                )
            return False
        from trl.trainer.utils import add_fused_lm_head

        models: list[Any] = [policy]
        models += [copy.model for copy in (self.opponent, self.reference) if isinstance(copy, ModelCopy)]
        if self._shell is not None:
            models.append(self._shell.architecture)
        for model in {id(model): model for model in models}.values():
            add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model)
        return True

    # ---- Use ----

    def policy(self) -> Any:
        """The policy without wrappers."""
        return self._unwrapped()

    @property
    def is_adapter(self) -> bool:
        """Whether the policy is an adapter on a base model."""
        return isinstance(self.policy(), PeftModel)

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed precision in which the policy computes, for every other role."""
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def ready_opponent(self) -> MovingAverage:
        """The opponent; a `ConfigurationError` where a sharded policy has none before training."""
        if self.opponent is None:
            raise ConfigurationError("a sharded run has no opponent before training: evaluate after train() has begun.")
        return self.opponent

    @contextmanager
    def opponent_module(self) -> Iterator[nn.Module]:
        """The opponent as a module to generate with; sharded, all processes take part."""
        with self.ready_opponent().using() as module, self._to_generate(module):
            yield module

    @contextmanager
    def policy_module(self) -> Iterator[nn.Module]:
        """The policy as a module to generate with; not sharded."""
        with self._to_generate(self.policy()):
            yield self.policy()

    @contextmanager
    def _to_generate(self, module: nn.Module) -> Iterator[None]:
        """Autocast, with float32 weights cast once for the call: it would cast every weight again for each token."""
        cast = self._half is not None and not self.sharded
        with self.autocast(), weights_cast(module.parameters(), self._half) if cast else nullcontext():
            yield

    # ---- The optimizer ----

    def with_master(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer to train the policy with: on float32 masters where its weights are bfloat16, made once."""
        if self._keeps_master and self._master is None:
            self._master = with_masters(optimizer)
            return self._master
        return optimizer

    def loaded(self) -> None:
        """A checkpoint may have been loaded into the policy since the optimizer was made."""
        if self._master is not None:
            self._master.take_changed_weights()

    def stepped_tensors(self, optimizer: Any) -> list[Tensor]:
        """What the optimizer of the run steps, on this process: trained weights, or their float32 masters."""
        return stepped_tensors(self.policy(), optimizer, self._masters())

    def policy_tensors(self) -> dict[str, Tensor]:
        """The weights that the opponent follows, float32 masters where there are some; of sharded ones all shards."""
        masters = self._masters()
        return {name: masters.get(id(weight), weight) for name, weight in policy_tensors(self.policy()).items()}

    def _masters(self) -> dict[int, Tensor]:
        return self._master.masters() if self._master is not None else {}

    # ---- After a step ----

    def follow(self, step: int) -> None:
        """The opponent follows the policy. Once per optimizer step: accumulation must not speed up the average."""
        if self.opponent is not None:
            every = self._args.opponent_refresh_steps
            renewed = every is not None and step % every == 0
            self.opponent.follow(self.policy_tensors(), 0.0 if renewed else self._args.ema_decay)

    def renew_reference(self, step: int) -> bool:
        """Copy the opponent to the reference where `step` is due; whether it was."""
        args = self._args
        due = args.reference == "opponent_copy" and step % args.ref_model_sync_steps == 0
        if not due or self.reference is None or self.opponent is None:
            return False
        self.reference.copy_from(self.opponent.tensors())
        return True

    def opponent_distance(self) -> float | None:
        """Norm of policy - opponent over the norm of the policy; None without an opponent; all processes take part."""
        if self.opponent is None:
            return None
        squares: Tensor = squared_distance(self.opponent.tensors(), self.policy_tensors())
        if self.sharded:
            squares = self._accelerator.reduce(squares, "sum")
        difference, norm = squares.tolist()
        return float((difference / max(norm, 1e-30)) ** 0.5)

    # ---- Saving ----

    def _start_as_reference(self) -> nn.Module | None:
        """The reference if at any time it is what a resumed run copies before it loads its checkpoint."""
        initial = self._args.reference == "initial"
        return self.reference.model if initial and isinstance(self.reference, ModelCopy) else None

    def start_digest(self) -> str | None:
        """What the start model of a resumed run must agree with, where no checkpoint holds the reference; else None."""
        start = self._start_as_reference()
        if start is not None and self._start_digest is None:
            self._start_digest = weights_digest(start)
        return self._start_digest

    def kept(self) -> dict[str, ShadowModel]:
        """What a checkpoint keeps: opponent and reference, unless they are one or never change by themselves."""
        found: dict[str, ShadowModel] = {}
        if self.opponent is not None:
            found["opponent"] = self.opponent
        changes = self.reference is not self.opponent and self._start_as_reference() is None
        if self.reference is not None and changes:
            found["reference"] = self.reference
        return {role: shadow for role, shadow in found.items() if shadow.tensors()}

    def save_policy(self, folder: Path, *, writes: bool) -> None:
        """Write the policy, with LoRA its adapter alone, on the process that `writes`; sharded, all take part."""
        policy = self.policy()
        with self._config_as_loaded():
            if self._shell is not None:
                save_sharded(policy, self._shell, folder)
            elif writes and isinstance(policy, PeftModel):
                save_adapter(policy, POLICY_ADAPTER, folder)
            elif writes:
                policy.save_pretrained(folder)

    def save_opponent(self, folder: Path, *, writes: bool) -> None:
        """Write the opponent, if there is one, likewise."""
        if self.opponent is not None and (writes or self.opponent.collective):
            with self._config_as_loaded():
                self.opponent.save_pretrained(folder)

    @contextmanager
    def _config_as_loaded(self) -> Iterator[None]:
        """Undo, while a model is saved, what Trainer changed in its configuration."""
        models: list[Any] = [self.policy()]
        models += [self.opponent.model] if isinstance(self.opponent, ModelCopy) else []
        models += [self._shell.architecture] if self._shell is not None else []
        changed = {id(model.config): model.config for model in models if hasattr(model.config, "use_cache")}
        before = {name: config.use_cache for name, config in changed.items()}
        try:
            for config in changed.values():
                config.use_cache = self._use_cache
            yield
        finally:
            for name, config in changed.items():
                config.use_cache = before[name]


def _as_deepspeed_takes_it(policy: nn.Module, device: torch.device, half: torch.dtype | None) -> None:
    """Place and cast the policy as ZeRO-1 and ZeRO-2 will, before it is copied: the copies must be like it.

    Trainer leaves both to DeepSpeed, which moves everything and casts weights, not buffers.
    """
    # Quantized weights do not move: they were loaded onto their device.
    if quantization_method(policy.config) is None:
        policy.to(device)
    for weight in policy.parameters():
        if half is not None and weight.is_floating_point():
            weight.data = weight.data.to(half)


def _return_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 return what the model returns: accelerate's policy rounds log-probabilities to bfloat16."""
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)
