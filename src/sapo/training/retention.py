"""What the policy has kept of its start, measured while a run trains, at its evaluations, in a stated share of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from sapo.data.examples import DataOptions, collate_examples
from sapo.data.unanswered import general_prompts
from sapo.errors import ConfigurationError
from sapo.measures.retention import (
    REPLY_TOKENS,
    Forced,
    ForcedScore,
    StartStates,
    fixed_head,
    gain_estimate,
    has_trained_head,
    kl_estimate,
    score_forced,
    spread,
    states_of,
)
from sapo.preference.token_distributions import Head
from sapo.runs.folder import RunFolder
from sapo.runs.layout import RETENTION_PART
from sapo.runs.metrics import RETENTION_GAIN, RETENTION_GENERAL, RETENTION_TASK, RETENTION_TIME
from sapo.runs.tensors import read_tensors, write_tensors
from sapo.training.context import RunContext
from sapo.training.metrics import MetricAverages
from sapo.training.replay import replies_of_start
from sapo.training.time_share import TimeShare

logger = logging.get_logger(__name__)

_GROUPS = ("general", "task", "gain")


class RetentionSignals:
    """Measures KL(start || policy) per token on the start's own replies, and the gain on evaluation rows.

    All of it is teacher-forced. Before the first step the start, which is the policy then, replies to general prompts
    and to prompts of the training rows; its hidden states on them are kept on the host and in the run folder, with a
    copy of its output head where that is trained. The first process measures.

    Args:
        context: of the run.
        averages: receives the numbers of an evaluation.
        train: prepared training rows.
        rows: a prepared evaluation set, for the gain.
        folder: of the run.
        clock: gives seconds.

    Raises:
        ConfigurationError: the weights are sharded.
    """

    def __init__(
        self,
        context: RunContext,
        averages: MetricAverages,
        train: Any,
        rows: Any,
        folder: RunFolder,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if context.roles.sharded:
            raise ConfigurationError(
                "eval_retention=true with sharded weights is not supported. Leave it out, and run sapo evaluate "
                "--suite retention on a checkpoint."
            )
        self.rows = rows
        self._context, self._averages, self._train, self._folder = context, averages, train, folder
        self._time = TimeShare(context.args.eval_retention_max_time_fraction, clock)
        self._forced: dict[str, list[Forced]] = {}
        self._start: dict[str, StartStates] = {}
        self._before: list[ForcedScore] = []
        self._warned = self._told = False

    # ---- The start ----

    def begin(self, checkpoint: Path | None) -> None:
        """Keep the start as it is now, or as the run kept it before `checkpoint`.

        Raises:
            CheckpointError: the run that is resumed did not measure this.
        """
        if self._context.world.first:
            if checkpoint is None:
                self._keep_start()
            else:
                self._restore(checkpoint)
        self._context.world.barrier()
        self._time.begin()

    def _keep_start(self) -> None:
        roles, size = self._context.roles, self._context.args.eval_retention_size
        self._forced = {
            "general": self._replies(self._general_prompts(size)),
            "task": self._replies([turn.prompt_ids for turn in self._turns(self._train, size)]),
            "gain": [Forced(turn.prompt_ids, turn.response_ids) for turn in self._turns(self.rows, size)],
        }
        self._time.cost = None
        with roles.policy_module() as model:
            began = self._time.clock()
            head = fixed_head(model)
            for group in _GROUPS[:2]:
                states = states_of(model, self._forced[group], **self._batches)
                self._start[group] = StartStates(states, head)
            self._before = score_forced(model, self._forced["gain"], None, **self._batches)
            self._time.cost = self._time.clock() - began
        self._save(head)

    def _general_prompts(self, size: int) -> list[tuple[int, ...]]:
        context = self._context
        prompts = general_prompts(context.tokenizer, context.eos_ids, DataOptions.of(context.args))
        return [prompts[place] for place in spread(size, len(prompts))]

    @staticmethod
    def _turns(rows: Any, size: int) -> list[Any]:
        places = spread(size, len(rows))
        return [example.turns[-1] for example in collate_examples([rows[place] for place in places])["examples"]]

    def _replies(self, prompts: Sequence[Sequence[int]]) -> list[Forced]:
        kept = replies_of_start(self._context, self._folder, prompts, REPLY_TOKENS)
        return [Forced(prompt, tuple(reply)) for prompt, reply in kept]

    # ---- At an evaluation ----

    def observe(self, *, last: bool = False) -> None:
        """Measure if there is time, at the `last` evaluation too, for the averages of the evaluation."""
        world = self._context.world
        if world.first_decides(world.first and self._time.fits()):
            if world.first:
                with self._time.spending():
                    self._measure()
        elif not self._told:
            self._told = True
            logger.warning(
                "Measuring retention would take more than eval_retention_max_time_fraction="
                f"{self._context.args.eval_retention_max_time_fraction:g} of the run's time so far; it is postponed. "
                "Lower eval_retention_size, or raise the share, for more of it."
            )
        if world.first:
            self._averages.add(RETENTION_TIME.name, self._time.share)

    def _measure(self) -> None:
        with self._context.roles.policy_module() as model:
            scores = {
                group: score_forced(model, rows, self._start.get(group), **self._batches)
                for group, rows in self._forced.items()
            }
        general = kl_estimate(scores["general"], resamples=0)
        estimates = {
            RETENTION_GENERAL.name: general,
            RETENTION_TASK.name: kl_estimate(scores["task"], resamples=0),
            RETENTION_GAIN.name: gain_estimate(scores["gain"], self._before, resamples=0),
        }
        for name, estimate in estimates.items():
            if estimate is not None:
                self._averages.add(name, estimate.value)
        limit = self._context.args.retention_kl_limit
        if general is not None and limit is not None and general.value > limit and not self._warned:
            self._warned = True
            logger.warning(
                f"{RETENTION_GENERAL.name} is {general.value:.3g} nats per token, above retention_kl_limit={limit:g}: "
                "the policy is losing what it could do before. Stop, lower the learning rate, or set replay_share or, "
                "with objective=sft, kl_weight."
            )

    @property
    def _batches(self) -> dict[str, int]:
        return {
            "pad_token_id": self._context.pad_token_id,
            "batch_size": self._context.args.per_device_eval_batch_size,
        }

    # ---- Across a resume ----

    def _save(self, head: Head) -> None:
        tensors: dict[str, Tensor] = {
            "gain_logps": torch.tensor([one.logp for one in self._before], dtype=torch.float64)
        }
        for group, rows in self._forced.items():
            for name in ("prompt_ids", "reply_ids"):
                ids = [getattr(one, name) for one in rows]
                tensors[f"{group}_{name}"] = torch.tensor([token for one in ids for token in one], dtype=torch.int64)
                tensors[f"{group}_{name}_lengths"] = torch.tensor([len(one) for one in ids], dtype=torch.int64)
            if group in self._start:
                tensors[f"{group}_hidden"] = torch.cat(self._start[group].hidden)
        if has_trained_head(self._context.roles.policy()):
            tensors |= {f"head.{name}": tensor for name, tensor in head.module.state_dict().items()}
        self._folder.path.mkdir(parents=True, exist_ok=True)
        write_tensors(self._folder.path, RETENTION_PART, tensors)

    def _restore(self, checkpoint: Path) -> None:
        otherwise = ", which holds the start to measure against. Leave eval_retention out, or start the run afresh."
        folder = self._folder.home_of(f"{RETENTION_PART}.safetensors", checkpoint, otherwise)
        tensors = read_tensors(folder, RETENTION_PART)
        for group in _GROUPS:
            columns = [_rows_of(tensors, f"{group}_{name}") for name in ("prompt_ids", "reply_ids")]
            self._forced[group] = [Forced(prompt, reply) for prompt, reply in zip(*columns, strict=True)]
        logps = tensors["gain_logps"].tolist()
        self._before = [
            ForcedScore(logp, None, len(one.reply_ids)) for logp, one in zip(logps, self._forced["gain"], strict=True)
        ]
        with self._context.roles.policy_module() as model:
            head = fixed_head(model)
        stored = {name.removeprefix("head."): one for name, one in tensors.items() if name.startswith("head.")}
        if stored:
            head.module.load_state_dict(stored)
        for group in _GROUPS[:2]:
            hidden = torch.split(tensors[f"{group}_hidden"], [len(one.reply_ids) for one in self._forced[group]])
            self._start[group] = StartStates(hidden, head)


def _rows_of(tensors: dict[str, Tensor], name: str) -> list[tuple[int, ...]]:
    return [tuple(part.tolist()) for part in torch.split(tensors[name], tensors[f"{name}_lengths"].tolist())]
