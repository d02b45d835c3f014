"""SAPOConfig: every option of a run, checked before a model loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import transformers
import trl
from packaging.version import Version
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from sapo.errors import ConfigurationError, brief, nearest, require
from sapo.options import own_options, resume_fixed
from sapo.options.own import VLLM_URL
from sapo.options.rendezvous import processes_told, waiting_told
from sapo.options.rules import OptionRules

__all__ = ["HAS_ACTIVATION_CHECKPOINTING", "HAS_FUSED_LM_HEAD", "VLLM_URL", "SAPOConfig"]

HAS_ACTIVATION_CHECKPOINTING = Version(transformers.__version__) >= Version("5.23")
"""Whether transformers calls gradient checkpointing `activation_checkpointing` and deprecates the older name."""

HAS_FUSED_LM_HEAD = Version(trl.__version__) >= Version("1.16")
"""Whether trl has `add_fused_lm_head`; the newest trl for Python 3.10 does not."""


@dataclass
class SAPOConfig(OptionRules, TrainingArguments):
    """Options of the trainer: those of `transformers.TrainingArguments`, plus those of SAPO.

    Defaults are the published settings where there are any (section 4.1 and the published recipes). Each option is
    declared in `sapo.options`; `sapo train --help-all` prints all of them, `sapo train --help NAME` one.

    Raises:
        ConfigurationError: an option is out of range, has no effect, or conflicts with another.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        self._check()
        if self.bf16 is None:
            on_accelerator = torch.accelerator.is_available() and not self.use_cpu
            faster = _accelerator_has_bf16() if on_accelerator else processor_gains_from_bfloat16()
            self.bf16 = faster and not self.fp16
            self.use_cpu: bool
            if self.bf16 and not on_accelerator:
                # transformers takes bf16 on a processor only with this option, which is how the run goes anyway.
                self.use_cpu = True
        self.eval_steps: Any
        by_steps = str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "steps"
        if self.load_best_model_at_end and by_steps and self.eval_steps is None:
            # A model can be the best only where it is both evaluated and saved.
            self.eval_steps = self.save_steps
        # The older name stays the option, because trl's users type it; TrainingArguments lets it follow the newer one.
        self.activation_checkpointing: Any
        self.activation_checkpointing_kwargs: Any
        if HAS_ACTIVATION_CHECKPOINTING and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if HAS_ACTIVATION_CHECKPOINTING and self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        if self.deepspeed:
            require(f"deepspeed={brief(self.deepspeed, 80)}", "deepspeed")
        _check_optimizer(self.optim)
        # accelerate would initialize half of a process group for it, in one process too.
        backend = self.ddp_backend
        self.ddp_backend: str | None = backend if processes_told() > 1 else None
        try:
            with waiting_told():
                super().__post_init__()
        except (ValueError, ImportError) as error:
            if "MASTER_ADDR" in str(error):
                left = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ}
                raise ConfigurationError(
                    f"the environment has {', '.join(f'{name}={value}' for name, value in left.items())}, as launchers "
                    "of several processes set them, and no MASTER_ADDR. Train in one process with "
                    f"`unset {' '.join(left)}`, or in several with --accelerate_config multi_gpu."
                ) from error
            raise ConfigurationError(brief(error)) from error
        except (AttributeError, TypeError) as error:
            if not self.deepspeed:
                raise
            raise ConfigurationError(
                f"deepspeed={brief(self.deepspeed, 80)}: not a configuration of DeepSpeed ({brief(error, 100)}). Give "
                "a JSON file, or use --accelerate_config zero2."
            ) from error
        self.ddp_backend = backend
        if self.deepspeed:
            stage = self.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
            if type(stage) is not int or not 0 <= stage <= 3:
                raise ConfigurationError(
                    f"deepspeed={brief(self.deepspeed, 80)}: zero_optimization.stage is {brief(stage, 40)}; it must be "
                    "0, 1, 2 or 3."
                )
        # JSON text is a mapping from here on.
        if isinstance(self.model_init_kwargs, dict) and "token" in self.model_init_kwargs:
            raise ConfigurationError(
                "model_init_kwargs contains a token, which would be written into the run folder. Remove it, and log in "
                "with `hf auth login` or set HF_TOKEN."
            )

    def resume_facts(self) -> dict[str, Any]:
        """What a resumed run must share with its checkpoint: every option not declared free, and `world_size`.

        Returns:
            JSON values by option name.
        """
        names = sorted(name for name in resume_fixed() if hasattr(self, name))
        return {name: _as_json(getattr(self, name)) for name in [*names, "world_size"]}

    def _check(self) -> None:
        """As `OptionRules._check`, and what this machine and the installed libraries demand."""
        super()._check()
        self._check_device()

    def _check_device(self) -> None:
        if self.fused_lm_head and not HAS_FUSED_LM_HEAD:
            raise ConfigurationError(
                f"fused_lm_head=true requires trl 1.16 or newer, not {trl.__version__}. Leave the option out, or "
                "upgrade."
            )
        backends = torch.distributed.Backend.backend_list if torch.distributed.is_available() else []
        if self.ddp_backend is not None and self.ddp_backend not in backends:
            raise ConfigurationError(f"ddp_backend={self.ddp_backend}: must be one of {', '.join(backends[1:])}.")
        if self.use_cpu:
            if self.fp16:
                raise ConfigurationError(
                    "fp16=true with use_cpu: float16 needs an accelerator, and accelerate would leave the policy in "
                    "float32. Leave one of the two out, or set bf16."
                )
            return
        if self.bf16 and torch.accelerator.is_available() and not _accelerator_has_bf16():
            raise ConfigurationError(
                "bf16=true: the accelerator of this machine has no bfloat16 of its own (T4, V100 and older GPUs, MPS). "
                "Set bf16 to false and dtype to float32; or, on a GPU, fp16 to true."
            )
        if self.bf16 and not _accelerator_has_bf16():
            raise ConfigurationError(
                "bf16=true: no accelerator with bfloat16 on this machine. Add --bf16 false, or --use_cpu to "
                "train in bfloat16 on the CPU (slow on older ones)."
            )
        if self.fp16 and not torch.accelerator.is_available():
            raise ConfigurationError("fp16=true: no accelerator on this machine. Leave the option out.")


def _check_optimizer(name: Any) -> None:
    known = [one.value for one in OptimizerNames]
    if getattr(name, "value", name) not in known:
        raise ConfigurationError(
            f"optim={brief(name, 80)}: not an optimizer of transformers{nearest(str(name), known, cutoff=0.3)}. It has "
            f"{', '.join(known)}."
        )


def _as_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return json.loads(json.dumps(value, default=str, sort_keys=True))
    return list(value) if isinstance(value, (list, tuple)) else value


def processor_gains_from_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 on this processor, by its instructions.

    With the matrix units of AMX it is, several times. With the AVX-512 instructions alone it is not: matrix products of
    a 135M Llama ran at 0.5 to 0.6 of the speed of float32, and a full step at 0.7 of it (docs/performance.md).
    """
    return bool(torch.cpu._is_amx_tile_supported())


def _accelerator_has_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type in ("xpu", "npu")  # type: ignore[union-attr]


def _with_options(text: str) -> str:
    """A docstring with SAPO's own options, for `help()` and editors; made from their declarations."""
    lines = [f"    {one.name}: {one.help} Default: {one.default_text}." for one in own_options() if one.help]
    before, raises, after = text.partition("    Raises:")
    return before + "\n".join(["    Args:", *(f"    {line}" for line in lines), "", raises]) + after


SAPOConfig.__doc__ = _with_options(SAPOConfig.__doc__ or "")
