"""What a run says of itself: averages between two log lines, over all processes, and what is looked at only there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers.utils import logging

from sapo.runs.metrics import CHOSEN_CHANGE, COSTS, EVAL, FINAL_LOSS, IDENTICAL, LOSS
from sapo.training.metrics import MetricAverages, memory_use
from sapo.weights.opponent import ShadowModel, policy_tensors, squared_distance

if TYPE_CHECKING:
    from sapo.training.trainer import SAPOTrainer

logger = logging.get_logger(__name__)

_IDENTICAL_WARNING = 0.9


class TrainingLog:
    """Collects the metrics of a trainer, and adds them to what Trainer logs."""

    def __init__(self, trainer: SAPOTrainer) -> None:
        self._trainer = trainer
        self.averages = {"train": MetricAverages(), "eval": MetricAverages()}
        self.stop_reason: str | None = None
        """Why the run should end now, once something that was looked at says so."""
        self._loss = MetricAverages()
        self._tokens, self._since = 0, time.perf_counter()
        self._identical_warned = False

    def begin(self) -> None:
        """Steps begin now: time counts."""
        self._since = time.perf_counter()

    def note_tokens(self, tokens: int) -> None:
        """So many tokens, padding not among them, are learnt from."""
        self._tokens += tokens
        self.averages["train"].add("tokens", tokens)

    def note_loss(self, loss: float, share: float) -> None:
        """A pass lost this in nats, the mean over `share` of its micro-batch; for the mean loss of the whole run."""
        self._loss.add(FINAL_LOSS.name, loss, share)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"averages": self.averages["train"].state(), "loss": self._loss.state()}

    def restore(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Continue from the `state()` of one process, or of several together.

        Raises:
            ValueError: an average of nothing.
        """
        self.averages["train"].drain()
        self._loss.drain()
        for state in states:
            self.averages["train"].absorb(state["averages"])
            self._loss.absorb(state["loss"])

    def add_to(self, logs: dict[str, float]) -> None:
        """Add this run's metrics to those of a log line; every process comes here at the same steps."""
        if any(name.startswith(EVAL) for name in logs):
            logs.update({f"{EVAL}{name}": value for name, value in self._drained(self.averages["eval"]).items()})
        elif FINAL_LOSS.name in logs:
            # Trainer counts only the steps since a resume.
            logs.update(self._drained(self._loss))
            rest = self._drained(self.averages["train"])
            logs.update({name: rest[name] for name in sorted(COSTS & rest.keys())})
        elif LOSS.name in logs:
            logs.update(self._drained(self.averages["train"]))
            if self._trainer.opponent is not None:
                logs["opponent/distance"] = self._opponent_distance(self._trainer.opponent)
            logs.update(self._chosen_change())
            now = time.perf_counter()
            tokens = sum(gather_object([self._tokens]))
            logs["tokens_per_second"] = tokens / max(now - self._since, 1e-9)
            self._tokens, self._since = 0, now
            logs.update(memory_use())
            self._warn_of_identical(logs.get(IDENTICAL.name, 0.0))

    @staticmethod
    def _drained(own: MetricAverages) -> dict[str, float]:
        """Averages over all processes."""
        everyone = MetricAverages()
        for state in gather_object([own.state()]):
            everyone.absorb(state)
        own.drain()
        return everyone.drain()

    def _opponent_distance(self, opponent: ShadowModel) -> float:
        """Norm of policy - opponent over the norm of the policy: how far the opponent is behind."""
        trainer = self._trainer
        squares = squared_distance(opponent.tensors(), policy_tensors(trainer.policy()))
        if trainer.shell is not None:
            squares = trainer.accelerator.reduce(squares, "sum")
        difference, norm = squares.tolist()
        return float((difference / max(norm, 1e-30)) ** 0.5)

    def _warn_of_identical(self, share: float) -> None:
        if share >= _IDENTICAL_WARNING and not self._identical_warned:
            self._identical_warned = True
            logger.warning(
                f"{share:.0%} of the regenerated segments equal the original; such pairs carry no signal. The policy "
                "has caught up with the data: stop, raise the temperature, or lengthen the segments."
            )

    def _chosen_change(self) -> dict[str, float]:
        trainer = self._trainer
        change = trainer.probe.change() if trainer.probe is not None else None
        if change is None:
            return {}
        limit = trainer.args.chosen_drop_limit
        if limit is not None and change < -limit and self.stop_reason is None:
            self.stop_reason = (
                f"Stopped at step {trainer.state.global_step}: the chosen log-probability has fallen by {-change:.2f} "
                f"nats per response, chosen_drop_limit is {limit}. Lower the learning rate, or set chosen_nll_weight."
            )
        return {CHOSEN_CHANGE.name: change}
