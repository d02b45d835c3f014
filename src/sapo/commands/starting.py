"""The libraries under a run, asked before anything is loaded; what they raise before the first step, in one line."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sapo.commands.arguments import RunArguments
from sapo.config import VLLM_URL, SAPOConfig
from sapo.errors import ConfigurationError, SapoError, brief, nearest, pip_line, process_lost, require
from sapo.generation.vllm.installed import refuse_absent_servers

_TRACKERS = ("wandb", "tensorboard", "mlflow", "comet_ml", "clearml", "trackio", "swanlab")
_NEED_THE_MODEL = ("lomo",)
"""Optimizers that transformers does not make without the model."""


def check_packages(run: RunArguments) -> None:
    """Find out before a model is loaded whether what generates and what quantizes is here.

    Raises:
        ConfigurationError: a package is missing, or a server that cannot be starting.
    """
    config, model = run.config, run.model
    if config.generation_backend == "vllm_colocate":
        require("generation_backend=vllm_colocate", "vllm")
    if config.generation_backend == "vllm_server" and config.vllm_server_timeout is None:
        refuse_absent_servers(config.vllm_server_url or [VLLM_URL])
    if model.load_in_4bit or model.load_in_8bit:
        require(f"load_in_{4 if model.load_in_4bit else 8}bit=true", "bitsandbytes")


def check_libraries(config: SAPOConfig) -> None:
    """Make trackers, optimizer and schedule on nothing, to see whether they can be made.

    Raises:
        ConfigurationError: a package is missing, or an option is not one of its own.
    """
    for name in config.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = INTEGRATION_TO_CALLBACK
            raise ConfigurationError(
                f"report_to={brief(name, 80)}: not a tracker{nearest(name, known)}. There are {', '.join(known)}."
            )
        with _of("report_to", name):
            callbacks = get_reporting_integration_callbacks([name])
        if name in _TRACKERS and name not in get_available_reporting_integrations():
            # Its callback would say so when it is made, and some complain once more when they are deleted.
            require(f"report_to={name}", name)
            raise ConfigurationError(f"report_to={name}: not usable here. Run: pip install --upgrade {name}")
        if name not in _TRACKERS:
            with _of("report_to", name):
                for callback in callbacks:
                    callback()
    weight = nn.Parameter(torch.zeros(2, 2))
    optim = str(getattr(config.optim, "value", config.optim))
    with _of("optim", optim, "optim_args", config.optim_args):
        if not any(name in optim for name in _NEED_THE_MODEL):
            kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
            kind([weight], **options)
    _check_optimizer_arguments(config)
    scheduler = str(config.lr_scheduler_type.value)
    if scheduler in ("reduce_lr_on_plateau", "greedy") and config.eval_strategy == "no":
        raise ConfigurationError(f"lr_scheduler_type={scheduler} follows evaluations. Set eval_strategy to steps.")
    with _of("lr_scheduler_type", scheduler, "lr_scheduler_kwargs", config.lr_scheduler_kwargs):
        get_scheduler(
            scheduler,
            torch.optim.SGD([weight], lr=1.0),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    if config.gradient_checkpointing and config.gradient_checkpointing_kwargs:
        _check_checkpointing(config.gradient_checkpointing_kwargs)


def _check_optimizer_arguments(config: SAPOConfig) -> None:
    """Refuse an argument that changes nothing, whatever its value: transformers leaves out those it does not know.

    Raises:
        ConfigurationError: names it.
    """
    given = [one.partition("=") for one in (config.optim_args or "").replace(" ", "").split(",") if one]

    def made(optim_args: str | None) -> object:
        changed = copy.copy(config)
        changed.optim_args = optim_args
        try:
            return Trainer.get_optimizer_cls_and_kwargs(changed)
        except Exception as error:  # noqa: BLE001 - it has read the value, and refuses it
            return type(error)

    without = made(None)
    for name, _, value in given:
        if all(made(f"{name}={tried}") == without for tried in (value, "0.123", "7", "False")):
            raise ConfigurationError(
                f"optim_args={config.optim_args}: {getattr(config.optim, 'value', config.optim)} takes no {name}. "
                "Leave it out; weight_decay, adam_beta1, adam_beta2 and adam_epsilon are options of their own."
            )


def _check_checkpointing(given: Any) -> None:
    known = [*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, "every_n_layers", "offload"]
    for name in given if isinstance(given, Mapping) else ():
        if name not in known:
            raise ConfigurationError(
                f"gradient_checkpointing_kwargs: torch's checkpointing has no argument {name}. It has use_reentrant, "
                "preserve_rng_state, determinism_check, debug."
            )


@contextmanager
def _of(name: str, value: Any, more: str = "", setting: Any = None) -> Iterator[None]:
    """Tell which option a library means."""
    try:
        yield
    except Exception as error:
        given = f"{name}={value}" + (f" with {more}={brief(setting, 80)}" if setting else "")
        raise ConfigurationError(f"{given}: {_said(error)}") from error


@contextmanager
def library_errors(options: Mapping[str, Any], begun: Callable[[], bool]) -> Iterator[None]:
    """Answer in one line what a library raises before the first step; with --debug its traceback is shown.

    What this package raises that is no `SapoError` is a fault of its own and keeps its traceback.

    Args:
        options: that differ from their defaults; those that an error names are named with it.
        begun: whether the first step is done.

    Raises:
        ConfigurationError: in place of the library's error.
        TrainingError: in place of that of an ended process.
    """
    try:
        yield
    except (SapoError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        lost = process_lost(error)
        if lost is not None:
            raise lost from error
        if begun() or Path(where).is_relative_to(Path(__file__).parents[1]):
            raise
        named = [
            f"{name}={brief(value, 60)}"
            for name, value in options.items()
            if name in str(error) or (isinstance(value, str) and len(value) > 2 and value in str(error))
        ]
        meant = f" Given here: {', '.join(named)}." if named else ""
        raise ConfigurationError(
            f"the run cannot start: {_said(error)}{meant} `sapo train --help NAME` explains an option, --debug shows "
            "where it failed."
        ) from error


def _said(error: Exception) -> str:
    text = brief(error)
    if isinstance(error, ImportError) and error.name and "pip install" not in text:
        text += f": {pip_line(error.name.partition('.')[0])}"
    said = text if type(error) in (ValueError, ImportError, RuntimeError) else f"{type(error).__name__}: {text}"
    return said if said.endswith((".", "!", "?")) else f"{said}."
