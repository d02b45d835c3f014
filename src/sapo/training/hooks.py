"""The private methods of `transformers.Trainer` that a run's checkpoints and optimizer need, in one place.

`tests/contract` pins their signatures and the order in which Trainer calls them.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sapo.config import SAPOConfig
from sapo.runs import untrusted
from sapo.runs.checkpoint import rotate
from sapo.runs.folder import RunFolder
from sapo.training.callbacks import EvaluationStopped, StopOnSignal
from sapo.training.context import RunContext
from sapo.training.interruption import Interruption, StepAbandoned
from sapo.training.rehearsal import check_best_metric, check_length, rehearse_saving
from sapo.training.saving import save_models, save_policy
from sapo.training.state import RunState, best_checkpoint_beside, other_weights


class CheckpointHooks(Trainer):
    """Saving and loading: Trainer's own parts and the run's, atomically, and without running what is read."""

    args: SAPOConfig
    optimizer: Any
    run_folder: RunFolder
    _context: RunContext
    _interruption: Interruption
    _run_state: RunState

    def _start(self, checkpoint: Path | None) -> None:
        """Model and optimizer are ready and Trainer's part of `checkpoint` is loaded: the run takes its own."""
        raise NotImplementedError

    # ---- The optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's or the one that was passed in, on float32 masters where the weights are bfloat16."""
        made: torch.optim.Optimizer = self._context.roles.with_master(super().create_optimizer(model))
        self.optimizer = made
        return made

    # ---- Stopping ----

    def _asked_to_stop(self) -> bool:
        """Whether a signal has come to this process."""
        return any(one.received is not None for one in self._stops)

    @property
    def _stops(self) -> list[StopOnSignal]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, StopOnSignal)]

    def _ends_before(self, step: int) -> bool:
        """Whether a signal asks for the end before optimizer step `step` + 1 begins; a checkpoint is asked for then."""
        if not any(one.is_told(self.args) for one in self._stops):
            return False
        self._save_after(step)
        return True

    def _save_after(self, step: int) -> None:
        saved = Path(self.args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self.control.should_save = step > 0 and not saved.is_dir()

    def _run_epoch(self, **given: Any) -> None:
        try:
            super()._run_epoch(**given)
        except StepAbandoned:
            self._interruption.undo()
            given["model"].zero_grad()
            self._save_after(self.state.global_step)
            self.control.should_training_stop = True
            names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
            self._maybe_log_save_evaluate(self._tr_loss, None, *(given[name] for name in names))

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        try:
            with self._interruption.evaluating():
                metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationStopped:
            self.control.should_evaluate = False
            return {}
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Nothing was measured by an evaluation that a signal ended.
        return bool(metrics) and bool(super()._determine_best_metric(metrics, trial))

    # ---- Loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with untrusted.reading(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with untrusted.reading(Path(checkpoint)) if checkpoint else nullcontext():
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied weight is saved once, under its other name: it is not missing.
        tied = set(self._context.roles.policy().all_tied_weights_keys)
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        different = [*load_result.missing_keys, *load_result.unexpected_keys]
        if different:
            raise other_weights(different)
        super()._issue_warnings_after_load(load_result)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        world = self._context.world
        with world.agreeing():
            check_length(len(train_dataloader), len(self.train_dataset), self.args)
            check_best_metric(self.args, self.eval_dataset)
        folder = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        with nullcontext() if folder is None else untrusted.reading(folder):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._context.roles.loaded()
        self._start(folder)
        with world.agreeing():
            rehearse_saving(self._context, self.run_folder.path, checkpoints=self.args.save_strategy != "no")
        if folder is not None:
            self.state.best_model_checkpoint = best_checkpoint_beside(folder, self.state.best_model_checkpoint)
        return prepared

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        with untrusted.reading(best):
            super()._load_best_model()
        # The opponent of that step is its moving average; that of the last step has never met this policy.
        self._run_state.restore_copies(best)

    # ---- Saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Trainer would remove old checkpoints before this one is in its place.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            folder = self.run_folder.save_checkpoint(
                self.state.global_step,
                lambda: super(CheckpointHooks, self)._save_checkpoint(model, trial),
                self._name_best,
            )
        finally:
            self.args.save_total_limit = limit
        if self._context.world.first:
            rotate(folder, limit, self.state.best_model_checkpoint)
        self._context.world.barrier()

    def _name_best(self, staged: Path, place: Path) -> None:
        """The best checkpoint is where it will be, not in staging."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == staged:
            self.state.best_model_checkpoint = str(place)
            if self._context.world.first:
                self.state.save_to_json(str(staged / "trainer_state.json"))

    def _get_output_dir(self, trial: Any) -> str:
        staging = self.run_folder.staging
        return str(staging) if staging is not None else super()._get_output_dir(trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._run_state.save(Path(output_dir), self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy and, unless for a checkpoint, the opponent in `opponent/`; all processes take part."""
        folder = Path(output_dir or self.args.output_dir or "")
        if _internal_call:
            save_policy(self._context, folder)
        else:
            save_models(self._context, folder)
