"""SAPOTrainer: one trainer for every objective; where its pairs come from is answered in `pairs`."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from sapo.config import HAS_FUSED_LM_HEAD, SAPOConfig
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, DataReport, Example, collate_examples, is_prepared
from sapo.data.prepare import prepare_dataset
from sapo.errors import ConfigurationError, TrainingError
from sapo.generation.protocol import Engine, Generator
from sapo.hub.publish import HubMixin
from sapo.preference.batches import Layout, PairBatch, collate_pairs, collate_responses, split_pairs
from sapo.preference.pair_loss import pair_loss
from sapo.preference.pairs import Pair, PairedData, PairSource, PendingBatch, SelfPlay, SFTSource, self_play
from sapo.preference.reference_scores import ReferenceLogps, ReferenceScores
from sapo.preference.scoring import PairScores, frozen, prepare_shared_layout, score, summed_logps
from sapo.runs import untrusted
from sapo.runs.folder import RunFolder
from sapo.training import state as run_state
from sapo.training.callbacks import RunCallback
from sapo.training.engine_queue import EngineQueue
from sapo.training.generators import check_engine, opponent_generator
from sapo.training.local_eval import LocalSignals
from sapo.training.log import TrainingLog
from sapo.training.probes import ChosenProbe, EvaluationPairs, as_list_of_datasets
from sapo.training.recorder import RunRecorder
from sapo.training.step_guard import NonFiniteStepGuard
from sapo.weights.loading import load_named_policy, load_tokenizer, use_one_device
from sapo.weights.opponent import (
    ModelCopy,
    ShadowModel,
    ShardedCopy,
    make_copies,
    policy_tensors,
)
from sapo.weights.policy import disable_dropout, model_keyword_arguments, padding_token_id, with_adapter
from sapo.weights.sharding import GatherShell, global_numel, shards_weights, zero_stage

logger = logging.get_logger(__name__)


class SAPOTrainer(HubMixin, Trainer):
    """Self-Augmented Preference Optimization on top of `transformers.Trainer`.

    Args:
        model: a model, or the name or folder of one (loaded with `args.model_init_kwargs`).
        args: every option of the run.
        train_dataset: rows of any supported shape (`sapo.data`), a `datasets.Dataset` or a list of dicts; or what
            `sapo.data.prepare_dataset` made of them.
        eval_dataset: likewise; it gives pairs from fixed seeds, made once by the initial opponent.
        processing_class: the tokenizer; loaded with the model when that is given by name.
        peft_config: makes the policy a LoRA adapter on `model`.
        generator: who writes the rejected text; by default what `args.generation_backend` says. One that has weights
            of its own (`sapo.generation.Engine`) is given the opponent's.
        data_names: what errors and reports call the two data sets.
        callbacks: as for `Trainer`.
        optimizers: as for `Trainer`.

    Raises:
        ConfigurationError, DatasetError, TokenizerError: what clashes, before training.
    """

    _tag_names = ["sapo"]  # noqa: RUF012

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SAPOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        processing_class: Any = None,
        peft_config: Any = None,
        generator: Generator | None = None,
        data_names: tuple[str, str] = ("train_dataset", "eval_dataset"),
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        use_one_device(args)
        if isinstance(model, str):
            revision = model_keyword_arguments(args).get("revision", "main")
            processing_class = processing_class or load_tokenizer(model, revision)
            model = load_named_policy(model, args, adapter=peft_config is not None)
        if processing_class is None:
            raise ConfigurationError("processing_class is missing: pass the model's tokenizer.")
        args.check_positions(model.config)
        policy = with_adapter(model, peft_config, args)
        if args.disable_dropout:
            disable_dropout(policy)
        self.eos_ids = eos_token_ids(processing_class, policy.generation_config.eos_token_id)
        self.pad_token_id = padding_token_id(processing_class, self.eos_ids)
        self._options = DataOptions.of(args)
        self.data_reports: dict[str, DataReport] = {}
        super().__init__(
            model=policy,
            args=args,
            data_collator=collate_examples,
            train_dataset=self._prepare(train_dataset, processing_class, data_names[0]),
            eval_dataset=self._prepare(eval_dataset, processing_class, data_names[1]),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is a mean over pairs: Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.training_log = TrainingLog(self)
        self.averages = self.training_log.averages
        self.last_pairs: list[Pair] = []
        self._micro_batch, self._micro_batch_of = 0, -1
        self._flops_per_token = 6.0 * sum(map(global_numel, policy.parameters()))
        self._current_eval: dict[tuple[int, int], Pair] = {}
        self.opponent: ShadowModel | None = None
        self.reference: ShadowModel | None = None
        self.reference_scores = ReferenceScores(2 * args.replay_buffer_size)
        if zero_stage(self.accelerator) in (1, 2) and (args.bf16 or args.fp16):
            # As DeepSpeed will when it takes over the policy; the copies must be like it.
            self.model.to(torch.bfloat16 if args.bf16 else torch.float16)
        self.shell: GatherShell | None = None
        if shards_weights(self.accelerator):
            # The copies are cut like the policy, which is yet to be cut.
            half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            self.shell = GatherShell(self.model, args.device, half)
        else:
            self._make_copies()
        on_cuda = HAS_FUSED_LM_HEAD and args.device.type == "cuda"
        self._fused = on_cuda if args.fused_lm_head is None else args.fused_lm_head
        if self._fused:
            self._fuse_heads()
        self._layout: Layout | None = None
        self.engine: EngineQueue | None = None
        self.source = self._make_source(generator)
        self._ahead: list[dict[str, Any]] = []
        self._coming: list[PendingBatch] = []
        self.eval_pairs = EvaluationPairs(
            self.source, num_generations=args.num_generations, batch_size=args.per_device_eval_batch_size
        )
        self.probe = (
            ChosenProbe(self.train_dataset, args.chosen_probe_size, seed=args.seed, logps=self._chosen_logps)
            if self.train_dataset is not None
            else None
        )
        evaluated = as_list_of_datasets(self.eval_dataset)
        self.local_signals = LocalSignals(self, evaluated[0]) if args.eval_local and evaluated else None
        self.step_guard = NonFiniteStepGuard(self.source.buffer if isinstance(self.source, SelfPlay) else None)
        self.run_folder = RunFolder(self)
        self.add_callback(RunCallback(self))
        self.add_callback(RunRecorder(self))

    # ---- Construction ----

    def _prepare(self, rows: Any, tokenizer: Any, name: str) -> Any:
        if rows is None or is_prepared(rows):
            return rows
        if isinstance(rows, Mapping):
            return {key: self._prepare(value, tokenizer, f"{name}_{key}") for key, value in rows.items()}
        prepared, report = prepare_dataset(rows, tokenizer, self._options, eos_ids=self.eos_ids, source=name)
        self.data_reports[name] = report
        return prepared

    def _make_copies(self) -> None:
        """Opponent and reference, equal to the policy now; before anything closes over the policy's modules."""
        self.opponent, self.reference = make_copies(self.policy(), self.args, self.shell)

    def _fuse_heads(self) -> None:
        """Only now: a fused forward closes over its module, so a copy made after it would run the policy's weights."""
        from trl.trainer.utils import add_fused_lm_head

        models = [self.model, *(copy.model for copy in (self.opponent, self.reference) if isinstance(copy, ModelCopy))]
        for model in {id(model): model for model in models}.values():
            add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model)

    def _make_source(self, generator: Generator | None) -> PairSource:
        args = self.args
        if args.pair_source != "self_play":
            return PairedData() if args.pair_source == "paired" else SFTSource(seed=args.seed)
        if generator is None:
            generator = opponent_generator(self)
        if isinstance(generator, Engine):
            self.engine = EngineQueue(generator, args, self._ready_opponent, self.averages["train"].add)
            generator = self.engine
        # Sharded weights are gathered to write with, which takes all processes; an engine has its own.
        together = self.shell is not None and self.engine is None
        return self_play(
            generator,
            args,
            eos_ids=self.eos_ids,
            record=self.averages["train"].add,
            any_process=(lambda holds: any(gather_object([holds]))) if together else bool,
            written_by=int if self.engine is None else self.engine.written_by,
        )

    def _ready_opponent(self) -> ShadowModel:
        if self.opponent is None:
            raise ConfigurationError("a sharded run has no opponent before training: evaluate after train() has begun.")
        return self.opponent

    def opponent_in_use(self) -> AbstractContextManager[nn.Module]:
        """The opponent as a module to compute with."""
        used: AbstractContextManager[nn.Module] = self._ready_opponent().using()
        return used

    def policy(self) -> nn.Module:
        """The policy without wrappers."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(self.model)
        return unwrapped

    def is_adapter(self) -> bool:
        """Whether the policy is an adapter on a base model."""
        return isinstance(self.policy(), PeftModel)

    # ---- One step ----

    @property
    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one optimizer step, and a look ahead at those whose pairs are written with them.

        A pool ends where the number of the step is a multiple of `steps_per_generation`, and where the epoch does:
        a resumed run comes upon the same pools. An engine that writes ahead has a window of steps instead, which moves
        on with each step.
        """
        if self.state.global_step >= self.state.max_steps:
            # A run that has ended and is resumed: Trainer would take one step more.
            self.control.should_training_stop = True
            return [], None
        step, pool, window = self.state.global_step, self.args.steps_per_generation, self.args.lookahead_steps
        if window or not self._ahead:
            steps = min(1 + window if window else pool - step % pool, max(1, self.state.max_steps - step))
            each, there = self.args.gradient_accumulation_steps, len(self._ahead)
            self._ahead += itertools.islice(epoch_iterator, max(num_batches, steps * each) - there)
            self._coming = [
                PendingBatch(inputs["examples"], self._epoch, step + place // each, place % each)
                for place, inputs in enumerate(self._ahead)
            ][there:]
        batches, self._ahead = self._ahead[:num_batches], self._ahead[num_batches:]
        return batches, None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """From a batch of examples to gradients: pairs, layout, loss, backward."""
        layout = self._resolved_layout()
        step = self.state.global_step
        self._micro_batch = self._micro_batch + 1 if step == self._micro_batch_of else 0
        self._micro_batch_of = step
        if self._micro_batch == 0:
            self.step_guard.begin()
        started = time.perf_counter()
        if isinstance(self.source, SelfPlay):
            if self.engine is None:
                self.source.prefetch(self._coming, step)
            else:
                self.engine.prefetch(self.source, self._coming, step)
            self._coming = []
        pairs = self.source.pairs(inputs["examples"], epoch=self._epoch, step=step, micro_batch=self._micro_batch)
        self.last_pairs = pairs
        # Processes that gather weights or spread gradients in each pass need equally many; the published likelihood
        # counts padding.
        together = self.shell is not None or zero_stage(self.accelerator) > 0
        equal = together or self.args.nll_scope == "all"
        parts = split_pairs(pairs, self.args.pairs_per_forward, layout=layout, equal_passes=equal)
        passes = [(part, self._collate(part).to(self.args.device)) for part in parts]
        generated = time.perf_counter()
        # The reference first: it needs its memory while the policy keeps no activations yet.
        references = self._reference_logps(passes, kept=True)
        scored = time.perf_counter()
        self.training_log.note_tokens(sum(batch.tokens for _, batch in passes))
        loss = torch.zeros((), device=self.args.device)
        for number, (part, batch) in enumerate(passes, start=1):
            given = {
                "batch": batch,
                "pairs": part,
                "share": len(part) / len(pairs),
                "reference": references[number - 1],
            }
            with nullcontext() if number == len(passes) else self._gradients_not_synchronized(model):
                loss += super().training_step(model, given, num_items_in_batch)
        averages = self.averages["train"]
        averages.add("time/generate", generated - started)
        averages.add("time/reference", scored - generated)
        averages.add("time/policy", time.perf_counter() - scored)
        return loss

    @contextmanager
    def _gradients_not_synchronized(self, model: nn.Module) -> Iterator[None]:
        """For all but the last pass of a micro-batch, as between the micro-batches of an accumulation."""
        state = self.accelerator.gradient_state
        due = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(due)

    def _resolved_layout(self) -> Layout:
        """How pairs are laid out, settled when the first of them is: only a wrapped model on its device can tell."""
        if self._layout is None:
            args = self.args
            reason = "layout=plain" if args.layout == "plain" or args.nll_scope == "all" else None
            for weights in (None, self.reference):
                if reason is None and (weights is None or isinstance(weights, (ModelCopy, ShardedCopy))):
                    own = nullcontext(self.model) if weights is None else weights.using()
                    with own as model, self.compute_loss_context_manager():
                        reason = prepare_shared_layout(model, fused_lm_head=self._fused)
            if reason is not None and args.layout == "shared":
                raise ConfigurationError(f"layout=shared: {reason}. Set layout to auto or plain.")
            if reason is not None and args.layout == "auto" and args.nll_scope != "all":
                logger.warning(f"The plain layout is used, in which prompts are computed twice: {reason}.")
            self._layout = "shared" if reason is None else "plain"
        return self._layout

    def _collate(self, pairs: Sequence[Pair]) -> PairBatch:
        return collate_pairs(
            pairs,
            pad_token_id=self.pad_token_id,
            suffix=self.args.suffix,
            layout=self._resolved_layout(),
            score_shared=self.args.scores_shared,
            all_positions=self.args.nll_scope == "all",
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss of a laid-out batch times its share of the micro-batch; its metrics go to the averages."""
        batch: PairBatch = inputs["batch"]
        scores = score(model, batch, fused_lm_head=self._fused)
        loss, losses, metrics = pair_loss(scores, inputs["reference"], self.args)
        mode = "train" if model.training else "eval"
        finite = math.isfinite(metrics["loss"])
        for name, value in metrics.items():
            # One pair without a finite loss would leave none of these averages finite.
            if finite or mode == "eval":
                self.averages[mode].add(name, value, len(batch))
        if mode == "train":
            self.step_guard.note(inputs["pairs"], losses)
            if finite:
                self.training_log.note_loss(metrics["loss"], inputs["share"])
        loss = loss * inputs["share"]
        return (loss, {}) if return_outputs else loss

    def _reference_logps(
        self, passes: Sequence[tuple[Sequence[Pair], PairBatch]], *, kept: bool
    ) -> list[ReferenceLogps | None]:
        """What the reference thinks of the pairs of each pass; a sharded one is gathered once for all of them."""
        if self.reference is None:
            return [None] * len(passes)
        with self.compute_loss_context_manager(), self.reference.using() as model, frozen(model):
            return [self._scored_by(model, pairs, batch, kept=kept) for pairs, batch in passes]

    def _scored_by(
        self, reference: nn.Module, pairs: Sequence[Pair], batch: PairBatch, *, kept: bool
    ) -> ReferenceLogps:
        def form(missing: list[Pair]) -> ReferenceLogps:
            own = batch if len(missing) == len(pairs) else self._collate(missing).to(self.args.device)
            scores = score(reference, own, fused_lm_head=self._fused)
            return ReferenceLogps(scores.chosen_logps, scores.rejected_logps)

        moving = self.reference is self.opponent
        if moving or not (kept and isinstance(self.source, SelfPlay)):
            return form(list(pairs))
        return self.reference_scores.of(pairs, form, self.source.buffer.items).to(self.args.device)

    def scores_of(self, pairs: Sequence[Pair]) -> tuple[PairScores, ReferenceLogps | None]:
        """Of the policy and the reference, in one pass without gradients; all processes take part."""
        batch = self._collate(pairs).to(self.args.device)
        (reference,) = self._reference_logps([(pairs, batch)], kept=False)
        with self.compute_loss_context_manager(), frozen(self.model) as model:
            return score(model, batch, fused_lm_head=self._fused), reference

    def before_optimizer_step(self) -> None:
        """Keep a loss or gradient that is not finite from touching anything."""
        bad = self.step_guard.end(self.accelerator, self.model_wrapped)
        self.averages["train"].add("nonfinite_step_fraction", float(bad))
        # Without gradients the optimizer does nothing. A scaler of float16 refrains by itself, and insists on them;
        # so does DeepSpeed.
        if bad and self.accelerator.scaler is None and not zero_stage(self.accelerator):
            self.optimizer.zero_grad()

    def after_optimizer_step(self) -> None:
        """Let the opponent and the reference follow; `state.global_step` already counts this step.

        Once per optimizer step, not per micro-batch: accumulation must not speed up the moving average.

        Raises:
            TrainingError: `max_nonfinite_steps` bad steps in a row.
        """
        self.run_folder.append_trace(self.state.global_step, self.step_guard.trained)
        if self.step_guard.in_a_row >= self.args.max_nonfinite_steps:
            file = self.run_folder.write_bad_pairs(self.step_guard.trained)
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.step_guard.in_a_row} steps in a row, up to step "
                f"{self.state.global_step}; weights, moving average and buffer are as before them, the pairs of the "
                f"last one are in {file}. Lower the learning rate, leave these rows out, or resume in bfloat16 or "
                "float32 if this is float16."
            )
        if self.opponent is None:
            return
        if not self.step_guard.bad:
            self.opponent.follow(policy_tensors(self.policy()), self.args.ema_decay)
        if self.engine is not None and self.state.global_step < self.state.max_steps:
            self.engine.follow(self.state.global_step)
        due = self.state.global_step % self.args.ref_model_sync_steps == 0
        if self.args.reference == "opponent_copy" and self.reference is not None and due:
            self.reference.copy_from(self.opponent.tensors())
            self.reference_scores.clear()

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Estimate for the last batch: 6 operations a parameter and token."""
        flops: float = self._flops_per_token * sum(
            2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self.last_pairs
        )
        return flops

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this trainer's metrics to what Trainer logs."""
        self.training_log.add_to(logs)
        super().log(logs, start_time)
        if self.stop_reason is not None and not self.control.should_training_stop:
            logger.warning(self.stop_reason)
            self.control.should_save = True
            self.control.should_training_stop = True

    @property
    def stop_reason(self) -> str | None:
        """Why the run ended before its time; None if it did not, or a signal ended it."""
        return self.training_log.stop_reason

    def _chosen_logps(self, examples: Sequence[Example]) -> list[float]:
        """Log-probability in nats of the last response of each example under the policy."""
        logps: list[float] = []
        size = 2 * self.args.per_device_train_batch_size
        for first in range(0, len(examples), size):
            turns = [example.turns[-1] for example in examples[first : first + size]]
            batch = collate_responses(
                [(turn.prompt_ids, turn.response_ids, len(turn.response_ids)) for turn in turns],
                pad_token_id=self.pad_token_id,
            )
            with self.compute_loss_context_manager(), frozen(self.model) as model:
                logps += summed_logps(model, batch.to(self.args.device), fused_lm_head=self._fused)[0].tolist()
        return logps

    # ---- Evaluation ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on fixed pairs; buffer and random state of the training are untouched."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if not isinstance(dataset, Mapping) and not is_prepared(dataset):
            dataset = eval_dataset = self._prepare(dataset, self.processing_class, "eval")
        alone = self.engine is not None and not self.engine.ready
        if self.engine is not None and alone:
            self.engine.begin(self.state.global_step)
        with _random_state_restored():
            if not isinstance(dataset, Mapping):
                self._current_eval = self.eval_pairs.of(dataset)
            if self.local_signals is not None and self.local_signals.rows is dataset:
                self.local_signals.observe()
            metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        if self.engine is not None and alone:
            self.engine.close()
        return metrics

    def fix_measures(self) -> None:
        """Fix what the run is measured against, while opponent and policy are the initial model."""
        if self.probe is not None:
            self.probe.begin()
        if self.args.eval_strategy != "no":
            with _random_state_restored():
                for dataset in as_list_of_datasets(self.eval_dataset):
                    self.eval_pairs.of(dataset)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss of a batch of evaluation examples on their fixed pairs."""
        pairs = [self._current_eval[(example.row, example.turns[0].index)] for example in inputs["examples"]]
        batch = self._collate(pairs).to(self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            (reference,) = self._reference_logps([(pairs, batch)], kept=False)
            given = {"batch": batch, "pairs": pairs, "share": 1.0, "reference": reference}
            loss = self.compute_loss(model, given)
        return loss.detach(), None, None

    # ---- Run folder, checkpoints, resume ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; a path or `true` resumes, `auto` does if there is a checkpoint.

        Raises:
            CheckpointError: the checkpoint is incomplete, damaged, or of another configuration.
            ConfigurationError: a fresh run in an output folder that is not empty.
        """
        if self.train_dataset is None:
            raise ConfigurationError("train_dataset is missing: there is nothing to train on.")
        checkpoint = self.run_folder.find_checkpoint(resume_from_checkpoint)
        if checkpoint is None:
            self.run_folder.start_afresh(
                overwrite=self.args.overwrite_output_dir, restarted=resume_from_checkpoint == "auto"
            )
        else:
            run_state.check(self, checkpoint)
        try:
            return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        finally:
            if self.engine is not None:
                self.engine.close()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A tied weight is saved once, under its other name: it is not missing."""
        tied = set(self.policy().all_tied_weights_keys)  # type: ignore[arg-type]
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        different = [*load_result.missing_keys, *load_result.unexpected_keys]
        if different:
            raise run_state.other_weights(different)
        super()._issue_warnings_after_load(load_result)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with untrusted.reading(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with untrusted.reading(Path(checkpoint)) if checkpoint else nullcontext():
            super()._load_rng_state(checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self._ahead, self._coming = [], []
        if isinstance(self.source, SelfPlay):
            self.source.pool.clear()
        self.reference_scores.clear()
        folder = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        with nullcontext() if folder is None else untrusted.reading(folder):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.shell is not None and self.opponent is None and self.reference is None:
            self._make_copies()
        if folder is not None:
            run_state.restore(self, folder)
        if self.engine is not None:
            self.engine.begin(self.state.global_step, folder)
            self.engine.drain()
            check_engine(self, self.engine.engine)
        self.training_log.begin()
        if self.local_signals is not None:
            self.local_signals.begin()
        return prepared

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.run_folder.save_atomically(lambda: super(SAPOTrainer, self)._save_checkpoint(model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        staging = self.run_folder.staging
        return str(staging) if staging is not None else super()._get_output_dir(trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        run_state.save(self, Path(output_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy and, unless for a checkpoint, the opponent in `opponent/`; all processes take part."""
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call:
            self.run_folder.save_policy(folder)
        else:
            self.run_folder.save_models(folder)


@contextmanager
def _random_state_restored() -> Iterator[None]:
    """Keep evaluation from moving the random state that the training draws from."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.accelerator.current_device_index()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(python)
    np.random.set_state(arrays)
