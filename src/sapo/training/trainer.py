"""`SAPOTrainer`: `transformers.Trainer` on pairs. Pair sources are in `sapo.preference`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from sapo.config import SAPOConfig
from sapo.data.examples import DataReport, collate_examples, is_prepared
from sapo.data.prepare import prepare_datasets
from sapo.errors import ConfigurationError
from sapo.generation.forward import unwrapped
from sapo.generation.protocol import Generator
from sapo.preference.batches import PairBatch
from sapo.preference.pair_loss import pair_loss
from sapo.preference.pairs import Pair, PairSource
from sapo.preference.self_replay import is_replayed
from sapo.runs.folder import RunFolder
from sapo.runs.world import World
from sapo.seeds import random_state_restored
from sapo.training.callbacks import MovedFraction, RunCallback
from sapo.training.context import RunContext
from sapo.training.generators import make_source
from sapo.training.hooks import CheckpointHooks
from sapo.training.hub_mixin import HubMixin
from sapo.training.interruption import Interruption
from sapo.training.local_eval import LocalSignals
from sapo.training.log import TrainingLog
from sapo.training.look_ahead import LookAhead
from sapo.training.metrics import MetricAverages, clock
from sapo.training.probes import ChosenProbe, EvaluationPairs, as_list_of_datasets, compared_sets, evaluation_set
from sapo.training.progress import print_headlines
from sapo.training.recorder import RunRecorder
from sapo.training.replay import with_self_replay
from sapo.training.retention import RetentionSignals
from sapo.training.scorer import PairScorer, ScoredPairs
from sapo.training.start import prepare_start
from sapo.training.state import RunState
from sapo.training.step_guard import NonFiniteStepGuard
from sapo.weights.opponent import MovingAverage, ShadowModel
from sapo.weights.policy import padding_token_id
from sapo.weights.roles import Roles
from sapo.weights.sharding import global_numel, local_gradients, zero_stage

logger = logging.get_logger(__name__)


class SAPOTrainer(HubMixin, CheckpointHooks):
    """Self-Augmented Preference Optimization on top of `transformers.Trainer`.

    Args:
        model: a model, or the name or folder of one (loaded with `args.model_init_kwargs`).
        args: every option of the run; by default all defaults and, as trl has it, a folder named after the model.
        train_dataset: rows of any supported shape (`sapo.data`), a `datasets.Dataset` or a list of dicts; or what
            `sapo.data.prepare.prepare_dataset` returns for them.
        eval_dataset: likewise, or several by name; pairs are generated from fixed seeds, once, by the initial opponent.
        processing_class: the tokenizer; loaded with the model when that is given by name.
        peft_config: trains a LoRA adapter on `model` as the policy.
        generator: generates rejected segments; by default what `args.generation_backend` says. One that has weights
            of its own (`sapo.generation.protocol.Engine`) is given the opponent's.
        source: where pairs come from; by default what `args.pair_source` says, with `generator`.
        data_names: names of the two datasets in errors and reports.
        callbacks: as for `Trainer`.
        optimizers: as for `Trainer`.

    Attributes:
        opponent: the moving average; None where pairs come from the data.
        reference: the reference of DPO; None without one.
        source: where pairs come from.
        run_folder: the output folder.
        data_reports: what became of the rows, by name of the dataset.

    Raises:
        ConfigurationError, DatasetError, TokenizerError: what clashes, before training.
    """

    _tag_names = ["sapo"]  # noqa: RUF012

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SAPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        processing_class: Any = None,
        peft_config: Any = None,
        generator: Generator | None = None,
        source: PairSource | None = None,
        data_names: tuple[str, str] = ("train_dataset", "eval_dataset"),
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SAPOConfig(f"{str(name).rstrip('/').split('/')[-1]}-SAPO")
        policy, processing_class, eos_ids, use_cache, data = prepare_start(model, args, processing_class, peft_config)
        self.data_reports: dict[str, DataReport] = {}
        self._prepare = partial(
            prepare_datasets, tokenizer=processing_class, options=data, eos_ids=eos_ids,
            num_proc=args.dataset_num_proc or 1,
        )  # fmt: skip
        super().__init__(
            model=policy,
            args=args,
            data_collator=collate_examples,
            train_dataset=self._prepare(train_dataset, source=data_names[0], reports=self.data_reports),
            eval_dataset=self._prepare(eval_dataset, source=data_names[1], reports=self.data_reports),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        print_headlines(self)
        # The loss is a mean over pairs: Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        roles = Roles(self.model, args, self.accelerator, lambda: unwrapped(self.model), use_cache=use_cache)
        pad_token_id = padding_token_id(processing_class, eos_ids)
        stop = self._interruption = Interruption(args, self._asked_to_stop)
        self._context = RunContext(args, processing_class, eos_ids, pad_token_id, World.current(), roles, stop.look)
        self._averages = {"train": MetricAverages(), "eval": MetricAverages()}
        self._scorer = PairScorer(self._context, self.accelerator, lambda: self.model)
        record = self._averages["train"].add
        self.run_folder = RunFolder(Path(args.output_dir or ""), self._context.world)
        made = source or make_source(self._context, generator, record, self.train_dataset)
        self.source = with_self_replay(made, self._context, self.run_folder, record)
        self._look_at_the_run()
        self._drawn: list[Pair] = []
        self._micro_batch, self._micro_batch_of = 0, -1
        self._flops_per_token = 6.0 * sum(map(global_numel, policy.parameters()))
        self._current_eval: dict[tuple[int, int], Pair] = {}
        self._look_ahead = LookAhead(args)
        self._step_guard = NonFiniteStepGuard(self.source)
        self._interruption.keep(self.source, self._log)
        self._run_state = RunState(
            self._context, self.accelerator, self.source, self._log, self._eval_pairs, self._probe, self.train_dataset
        )
        self.add_callback(
            RunCallback(
                self.run_folder,
                self._averages["train"],
                begin=self._fix_measures,
                before_step=self._before_optimizer_step,
                after_step=self._after_optimizer_step,
            )
        )
        moved = MovedFraction(record, lambda: roles.stepped_tensors(self.optimizer), lambda: self._step_guard.nonfinite)
        self.add_callback(moved)
        watched = (self.source, self._scorer, self.train_dataset, lambda: self._step_guard.scored)
        self.add_callback(RunRecorder(self._context, self.run_folder, *watched, lambda: self.stop_reason))

    def _look_at_the_run(self) -> None:
        """What measures a run and changes nothing in it."""
        args, dataset = self.args, self.train_dataset
        self._eval_pairs = EvaluationPairs(self.source, batch_size=args.per_device_eval_batch_size)
        self._probe = None
        if dataset is not None:
            pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
            self._probe = ChosenProbe(
                dataset, args.chosen_probe_size, pairs=pairs, seed=args.seed, logps=self._scorer.response_logps
            )
        evaluated = compared_sets(self.eval_dataset, dataset if self._context.world.first else None)
        self._signals: list[LocalSignals | RetentionSignals] = []
        if args.eval_local and evaluated:
            self._signals.append(LocalSignals(self._context, self._averages["eval"], evaluated[0]))
        if args.eval_retention and evaluated and dataset is not None:
            measured = (dataset, evaluated[0])
            self._signals.append(RetentionSignals(self._context, self._averages["eval"], *measured, self.run_folder))
        self._log = TrainingLog(self._context, self._averages, self._probe)

    # ---- The models ----

    @property
    def opponent(self) -> MovingAverage | None:
        """The moving average that generates rejected segments; None where pairs come from the data."""
        return self._context.roles.opponent

    @property
    def reference(self) -> ShadowModel | None:
        """The reference of DPO; None without one."""
        return self._context.roles.reference

    def policy(self) -> Any:
        """The policy without wrappers."""
        return self._context.roles.policy()

    def is_adapter(self) -> bool:
        """Whether the policy is an adapter on a base model."""
        return self._context.roles.is_adapter

    def last_pairs(self) -> list[Pair]:
        """The pairs of the last micro-batch, on this process."""
        return self._drawn

    # ---- One step ----

    @property
    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one optimizer step, and a look ahead at those whose pairs are generated with them."""
        step, last = self.state.global_step, self.state.max_steps
        if step >= last or self._ends_before(step):
            # Of a run that has ended and is resumed, Trainer would take one step more.
            self.control.should_training_stop = True
            return [], None
        return self._look_ahead.take(epoch_iterator, num_batches, step=step, max_steps=last, epoch=self._epoch), None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """From a batch of examples to gradients: pairs, layout, loss, backward."""
        step = self.state.global_step
        self._micro_batch = self._micro_batch + 1 if step == self._micro_batch_of else 0
        self._micro_batch_of = step
        if self._micro_batch == 0:
            self._step_guard.begin()
        started, index = clock(self.args.device), self._micro_batch
        with self._interruption.within(step, first=index == 0) as look:
            self.source.prefetch(self._look_ahead.pending(), step)
            pairs = self.source.pairs(inputs["examples"], epoch=self._epoch, step=step, micro_batch=index)
        self._drawn = [pair for pair in pairs if not is_replayed(pair)]
        passes = self._scorer.passes(pairs)
        generated = clock(self.args.device)
        # The reference first: it needs its memory while the policy keeps no activations yet.
        references = self._scorer.reference_logps(passes, self.source)
        scored = clock(self.args.device)
        self._log.note_tokens(sum(batch.tokens for _, batch in passes))
        loss = torch.zeros((), device=self.args.device)
        for number, ((part, batch), reference) in enumerate(zip(passes, references, strict=True), start=1):
            look()
            given = {"batch": batch, "pairs": part, "share": batch.drawn / len(pairs), "reference": reference}
            with nullcontext() if number == len(passes) else local_gradients(self.accelerator, model):
                loss += super().training_step(model, given, num_items_in_batch)
        averages = self._averages["train"]
        averages.add("time/generate", generated - started)
        averages.add("time/reference", scored - generated)
        averages.add("time/policy", clock(self.args.device) - scored)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss of a laid-out batch times its share of the micro-batch; its metrics go to the averages."""
        batch: PairBatch = inputs["batch"]
        scores = self._scorer.policy_scores(model, batch, inputs["reference"])
        replayed = [is_replayed(pair) for pair in inputs["pairs"]]
        loss, losses, metrics = pair_loss(scores, inputs["reference"], self.args, replayed, batch.draws)
        mode = "train" if model.training else "eval"
        finite = math.isfinite(metrics["loss"])
        for name, value in metrics.items():
            # One pair without a finite loss would leave none of these averages finite.
            if finite or mode == "eval":
                self._averages[mode].add(name, value, batch.drawn)
        if mode == "train":
            self._step_guard.note(ScoredPairs(inputs["pairs"], scores, inputs["reference"]), losses, batch.draws)
            if finite:
                self._log.note_loss(metrics["loss"], inputs["share"])
        loss = loss * inputs["share"]
        return (loss, {}) if return_outputs else loss

    def _before_optimizer_step(self) -> None:
        """Keep a loss or gradient that is not finite from touching anything."""
        nonfinite = self._step_guard.end(self.accelerator, self.model_wrapped)
        self._averages["train"].add("nonfinite_step_fraction", float(nonfinite))
        # Without gradients the optimizer does nothing. A scaler of float16 refrains by itself, and insists on them;
        # so does DeepSpeed.
        if nonfinite and self.accelerator.scaler is None and not zero_stage(self.accelerator):
            self.optimizer.zero_grad()

    def _after_optimizer_step(self) -> None:
        """Let the opponent and the reference follow; `state.global_step` already counts this step.

        Raises:
            TrainingError: `max_nonfinite_steps` such steps in a row.
        """
        step, guard, roles = self.state.global_step, self._step_guard, self._context.roles
        self.run_folder.append_trace(step, guard.trace())
        if guard.in_a_row >= self.args.max_nonfinite_steps:
            raise guard.error(step, self.run_folder.write_bad_pairs(guard.described(self.processing_class)))
        if not guard.nonfinite:
            roles.follow(step)
        if step < self.state.max_steps:
            self.source.opponent_moved(step)
        if roles.renew_reference(step):
            self.source.reference_moved()

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Estimate for the last batch: 6 operations a parameter and token."""
        lengths = (2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self._drawn)
        return self._flops_per_token * sum(lengths)

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this trainer's metrics to what Trainer logs."""
        self._log.add_to(logs, self.state.global_step, last=self.state.global_step >= self.state.max_steps)
        super().log(logs, start_time)
        if self.stop_reason is not None and not self.control.should_training_stop:
            logger.warning(self.stop_reason)
            self.control.should_save = True
            self.control.should_training_stop = True

    @property
    def stop_reason(self) -> str | None:
        """Why the run ended early; None if it did not, or a signal ended it."""
        return self._log.stop_reason

    # ---- Evaluation ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on fixed pairs; buffer and random state of the training are untouched."""
        dataset = evaluation_set(self.eval_dataset, eval_dataset)
        if not isinstance(dataset, Mapping) and not is_prepared(dataset):
            dataset = eval_dataset = self._prepare(dataset, source="eval", reports=self.data_reports)
        with self.source.ready(self.state.global_step), random_state_restored():
            if not isinstance(dataset, Mapping):
                self._current_eval = self._eval_pairs.of(dataset)
            for signals in self._signals:
                if signals.rows is dataset:
                    signals.observe(last=self.state.global_step >= self.state.max_steps)
            metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: there are no predictions of pairs. `evaluate` measures any rows."""
        raise ConfigurationError('predict has nothing to return for pairs: evaluate(rows, metric_key_prefix="test").')

    def _fix_measures(self) -> None:
        """Fix what the run is measured against, while opponent and policy are the initial model."""
        if self._probe is not None:
            self._probe.begin(self.state.max_steps)
        if self.args.eval_strategy != "no":
            with random_state_restored():
                for dataset in as_list_of_datasets(self.eval_dataset):
                    self._eval_pairs.of(dataset)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss of a batch of evaluation examples on their fixed pairs."""
        pairs = [self._current_eval[(example.row, example.turns[0].index)] for example in inputs["examples"]]
        batch = self._scorer.collate(pairs)
        (reference,) = self._scorer.reference_logps([(pairs, batch)])
        with torch.no_grad(), self._context.roles.autocast():
            loss = self.compute_loss(model, {"batch": batch, "pairs": pairs, "share": 1.0, "reference": reference})
        return loss.detach(), None, None

    # ---- Start and end ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; a path or `true` resumes, `auto` does if there is a checkpoint.

        Raises:
            CheckpointError: the checkpoint is incomplete, damaged, or of another configuration.
            ConfigurationError: a fresh run in an output folder that is not empty, or that another process writes in.
        """
        if self.train_dataset is None:
            raise ConfigurationError("train_dataset is missing: there is nothing to train on.")
        with self.run_folder.locked(), closing(self.source):
            self._run_state.check_processes(self.run_folder.path)
            checkpoint = self.run_folder.find_checkpoint(resume_from_checkpoint)
            if checkpoint is None:
                overwrite = self.args.overwrite_output_dir
                self.run_folder.start_afresh(overwrite=overwrite, restarted=resume_from_checkpoint == "auto")
            else:
                self._run_state.check(checkpoint)
            with self.run_folder.undone_unless(lambda: checkpoint is not None or self.state.global_step > 0):
                return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    def _start(self, checkpoint: Path | None) -> None:
        self._look_ahead.clear()
        self.source.clear()
        self._context.roles.create_copies()
        if checkpoint is not None:
            self._run_state.restore(checkpoint)
        self.source.begin(self.state.global_step, checkpoint)
        self._log.begin()
        for signals in self._signals:
            signals.begin(checkpoint)
