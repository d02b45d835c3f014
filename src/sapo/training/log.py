"""What a run says of itself: averages between two log lines, over all processes, and what is looked at only there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils import logging

from sapo.runs.metrics import CHOSEN_CHANGE, CHOSEN_CHANGE_PER_TOKEN, COSTS, EVAL, FINAL_LOSS, IDENTICAL, LOSS, MOVED
from sapo.training.context import RunContext
from sapo.training.metrics import MetricAverages, memory_use
from sapo.training.probes import ChosenProbe

logger = logging.get_logger(__name__)

_IDENTICAL_WARNING = 0.9
_MOVED_WARNING, _LINES_UNMOVED = 0.05, 3


class TrainingLog:
    """Collects the metrics of a run, and adds them to what Trainer logs.

    Args:
        context: of the run.
        averages: "train" and "eval", to which the parts of the run add what they observe.
        probe: the examples whose likelihood is followed; None without.
    """

    def __init__(self, context: RunContext, averages: Mapping[str, MetricAverages], probe: ChosenProbe | None) -> None:
        self._context = context
        self._probe = probe
        self.averages = averages
        self.stop_reason: str | None = None
        """Why the run should end now, once something that was looked at says so."""
        self._loss = MetricAverages()
        self._tokens, self._since = 0, time.perf_counter()
        self._identical_warned = False
        self._lines_unmoved, self._unmoved_warned = 0, False

    def begin(self) -> None:
        """Steps begin now: time counts."""
        self._since = time.perf_counter()

    def note_tokens(self, tokens: int) -> None:
        """Count tokens that are trained on, without padding."""
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

    def add_to(self, logs: dict[str, float], step: int, *, last: bool = False) -> None:
        """Add this run's metrics to those of the log line of `step`; every process comes here at the same steps.

        Args:
            logs: of Trainer.
            step: optimizer steps so far.
            last: whether the run has no more steps.
        """
        if any(name.startswith(EVAL) for name in logs):
            logs.update({f"{EVAL}{name}": value for name, value in self._drained(self.averages["eval"]).items()})
        elif FINAL_LOSS.name in logs:
            # Trainer counts only the steps since a resume.
            logs.update(self._drained(self._loss))
            rest = self._drained(self.averages["train"])
            logs.update({name: rest[name] for name in sorted(COSTS & rest.keys())})
        elif LOSS.name in logs:
            logs.update(self._drained(self.averages["train"]))
            distance = self._context.roles.opponent_distance()
            if distance is not None:
                logs["opponent/distance"] = distance
            logs.update(self._chosen_change(step, last=last))
            now = time.perf_counter()
            tokens = sum(self._context.world.gather(self._tokens))
            logs["tokens_per_second"] = tokens / max(now - self._since, 1e-9)
            self._tokens, self._since = 0, now
            logs.update(memory_use())
            self._warn_of_identical(logs.get(IDENTICAL.name, 0.0))
            # A rate of 0 is asked for.
            self._warn_of_unmoved(logs.get(MOVED.name, 1.0) if logs.get("learning_rate") else 1.0)

    def _drained(self, own: MetricAverages) -> dict[str, float]:
        """Averages over all processes."""
        everyone = MetricAverages()
        for state in self._context.world.gather(own.state()):
            everyone.absorb(state)
        own.drain()
        return everyone.drain()

    def _warn_of_identical(self, share: float) -> None:
        if share >= _IDENTICAL_WARNING and not self._identical_warned:
            self._identical_warned = True
            logger.warning(
                f"{share:.0%} of the regenerated segments equal the original; such pairs carry no signal. The policy "
                "has caught up with the data: stop, raise the temperature, or lengthen the segments."
            )

    def _warn_of_unmoved(self, share: float) -> None:
        self._lines_unmoved = self._lines_unmoved + 1 if share < _MOVED_WARNING else 0
        if self._lines_unmoved == _LINES_UNMOVED and not self._unmoved_warned:
            self._unmoved_warned = True
            logger.warning(
                f"{share:.1%} of the trained weights changed in the last step ({MOVED.name}): steps are smaller than "
                "the rounding of the weights. Raise the learning rate, or train float32 weights or their masters."
            )

    def _chosen_change(self, step: int, *, last: bool) -> dict[str, float]:
        limit = self._context.args.chosen_drop_limit
        changes = self._probe.change(step, due=last or limit is not None) if self._probe is not None else None
        if changes is None:
            return {}
        change, per_token = changes
        if limit is not None and change < -limit and self.stop_reason is None:
            self.stop_reason = (
                f"Stopped at step {step}: the chosen log-probability has fallen by {-change:.2f} nats per response, "
                f"chosen_drop_limit is {limit}. Lower the learning rate, or set chosen_nll_weight."
            )
        return {CHOSEN_CHANGE.name: change, CHOSEN_CHANGE_PER_TOKEN.name: per_token}
