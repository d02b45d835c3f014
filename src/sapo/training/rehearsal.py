"""What a run does at its end, tried before its first step: a run of days must not fail on what was wrong all along."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError, ModelError, brief
from sapo.preference.objectives import ReferenceLogps
from sapo.preference.pair_loss import pair_loss
from sapo.preference.scoring import PairScores
from sapo.runs.metrics import EVAL
from sapo.text.numbers import bytes_text
from sapo.training.context import RunContext
from sapo.weights.opponent import policy_tensors
from sapo.weights.sharding import global_numel

_TIMES = ("runtime", "samples_per_second", "steps_per_second")


def rehearse_saving(context: RunContext, folder: Path, *, checkpoints: bool) -> None:
    """Save everything but the weights to a temporary folder, and compare the weights with the room on the disk.

    Args:
        context: of the run, its models ready; only the first process does anything.
        folder: of the run.
        checkpoints: whether the run saves any.

    Raises:
        ConfigurationError: the folder cannot be written, or the disk is too small.
        ModelError: transformers or peft refuses to save this model or tokenizer.
    """
    if not context.world.first:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=folder) as trial:
            _save_without_weights(context, Path(trial))
    except OSError as error:
        raise ConfigurationError(
            f"output_dir={folder} cannot be written ({brief(error)}). Choose a folder of yours on a disk with room."
        ) from error
    except Exception as error:
        # Whatever it is, it would cost the run at its end.
        raise ModelError(
            f"this model could not be saved at the end of the run ({type(error).__name__}: {brief(error)}). Correct "
            "the configuration or the tokenizer in the model's folder."
        ) from error
    _check_room(context, folder, checkpoints=checkpoints)


def _save_without_weights(context: RunContext, folder: Path) -> None:
    roles, policy = context.roles, context.roles.policy()
    context.tokenizer.save_pretrained(folder)
    if roles.is_adapter:
        if not roles.sharded:
            roles.save_policy(folder, writes=True)
        return
    if roles.sharded:
        policy.config.save_pretrained(folder)
        policy.generation_config.save_pretrained(folder)
        return
    name, weight = min(policy.named_parameters(), key=lambda named: named[1].numel())
    policy.save_pretrained(folder, state_dict={name: weight.detach()})


def _check_room(context: RunContext, folder: Path, *, checkpoints: bool) -> None:
    """The optimizer's state is not counted: how large it will be only its first step tells."""
    roles = context.roles
    weights = policy_tensors(roles.policy()).values() if roles.is_adapter else roles.policy().parameters()
    model = sum(global_numel(weight) * weight.element_size() for weight in weights)
    final = model * (2 if roles.opponent is not None else 1)
    needed = final + (model * (1 + len(roles.kept())) if checkpoints else 0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        parts = f"{bytes_text(final)} at the end"
        parts += f" and at least {bytes_text(needed - final)} a checkpoint" if checkpoints else ""
        raise ConfigurationError(
            f"output_dir={folder}: the run writes {parts}, and {bytes_text(free)} are free there. Make room, choose a "
            "folder on another disk" + (", or set save_strategy to no." if checkpoints else ".")
        )


def check_length(loader_length: int, rows: int, args: SAPOConfig) -> None:
    """Refuse a run of no steps.

    Args:
        loader_length: batches of an epoch on this process.
        rows: of the training data.
        args: of the run.

    Raises:
        ConfigurationError: there is no complete batch.
    """
    if loader_length > 0:
        return
    batch = args.per_device_train_batch_size * args.world_size
    raise ConfigurationError(
        f"dataloader_drop_last leaves nothing to train on: {rows} rows, and a batch over all processes has {batch}. "
        "Lower per_device_train_batch_size, or leave dataloader_drop_last out."
    )


def check_best_metric(args: SAPOConfig, eval_dataset: Any) -> None:
    """Refuse a `metric_for_best_model` that no evaluation will measure.

    Raises:
        ConfigurationError: names those that there are.
    """
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == "no":
        return
    known = _evaluated(args)
    if isinstance(eval_dataset, Mapping):
        known = [f"{name}_{metric}" for name in eval_dataset for metric in known]
    if wanted.removeprefix(EVAL) not in known:
        shown = [metric for metric in known if not metric.endswith(_TIMES)]
        postponed = " every time" if wanted.startswith("eval_local/") else ""
        raise ConfigurationError(
            f"metric_for_best_model={wanted}: no evaluation of this run measures it{postponed}. It measures "
            f"{', '.join(shown)}."
        )


def _evaluated(args: SAPOConfig) -> list[str]:
    """Names of all that each evaluation measures: those of the loss of a pair."""
    one = torch.zeros(1)
    scores = PairScores(one - 1, one - 2, one + 1, one + 1, one[0] if args.nll_scope == "all" else None)
    if args.kl_weight:
        scores = scores._replace(divergences=one)
    reference = None if args.reference == "none" else ReferenceLogps(one - 1, one - 2)
    return [*pair_loss(scores, reference, args).metrics, *_TIMES]
