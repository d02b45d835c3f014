"""A run in words: what ran, what changed, and what should worry its owner. Pure functions of what was logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sapo.runs.reading import RunData

_IDENTICAL_HIGH, _IDENTICAL_RISE = 0.5, 0.15
_LENGTH_DRIFT = 0.2
_ALWAYS_RIGHT = 0.99


@dataclass(frozen=True, slots=True)
class Warn:
    """Something to look at: what happened, what it means, and what can be done.

    Attributes:
        level: "bad" where the run did harm or was cut short, "look" where it may have.
    """

    level: Literal["bad", "look"]
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A number worth a place of its own: its name, its value as text, and a word on it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """Means of a metric over the first and the last tenth of the log lines, one line at least."""

    first: float
    last: float

    @property
    def by(self) -> float:
        """The last less the first."""
        return self.last - self.first


_OBJECTIVES = {"dpo": "DPO", "orpo": "ORPO", "sft": "SFT on the good responses"}


def change_of(run: RunData, name: str) -> Change | None:
    """How a metric changed over a run; None where it was logged less than twice."""
    values = run.series(name)
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return Change(float(np.mean(values[:tenth])), float(np.mean(values[-tenth:])))


def sentences(run: RunData) -> list[str]:
    """What ran, what changed, and where the margin came from."""
    return [text for text in (_what_ran(run), _what_changed(run), _where_from(run)) if text]


def _what_ran(run: RunData) -> str:
    options = {option.name: option.value for option in run.options}
    facts = run.facts
    step = run.train[-1]["step"] if run.train else 0
    step = max(step, run.end.get("step", 0))
    objective = _OBJECTIVES.get(options.get("objective", ""), "an unknown objective")
    pairs = {"self_play": " on pairs from self-play", "paired": " on rows that hold both responses"}
    subject = f"{facts['model']} ({size_text(facts['parameters'])} parameters)" if "model" in facts else "A model"
    part = ""
    if facts.get("adapter"):
        part = f" through an adapter of {size_text(facts['trained_parameters'])}"
    planned = facts.get("max_steps")
    if not run.end:
        state = f"has reached step {step:,}" + (f" of {planned:,}" if planned else "")
    elif planned and step < planned:
        state = f"was stopped after step {step:,} of {planned:,}"
    else:
        state = f"was trained for {step:,} steps"
    rows = f" on {facts['training_rows']:,} training rows" if "training_rows" in facts else ""
    runtime = run.end.get("train_runtime")
    took = f", in {duration_text(runtime)} since its last start" if runtime else ""
    return f"{subject} {state}{part}{rows}, with {objective}{pairs.get(options.get('pair_source', ''), '')}{took}."


def _what_changed(run: RunData) -> str:
    loss, right = change_of(run, "loss"), change_of(run, "rewards/accuracies")
    if loss is None:
        return "Too little is logged yet to say what changed."
    went = f"The loss went from {number_text(loss.first)} to {number_text(loss.last)}"
    if right is None:
        return f"{went}."
    return (
        f"{went}; the policy preferred the chosen "
        f"response in {right.first:.0%} of pairs at first and in {right.last:.0%} at the end."
    )


def _where_from(run: RunData) -> str:
    chosen, rejected = change_of(run, "rewards/chosen"), change_of(run, "rewards/rejected")
    margin = change_of(run, "rewards/margins")
    if chosen is None or rejected is None or margin is None:
        return ""
    moves_too = any(one.name == "reference" and one.value in ("opponent", "opponent_copy") for one in run.options)
    since = " The reference follows the opponent, so rewards begin anew with each copy of it." if moves_too else ""
    if margin.by <= 0:
        return f"The margin did not grow (from {number_text(margin.first)} to {number_text(margin.last)}).{since}"
    moves = f"chosen {chosen.by:+.2g}, rejected {rejected.by:+.2g}"
    if chosen.by >= 0 and rejected.by <= 0:
        how = "the chosen responses rose and the rejected ones sank"
    elif chosen.by >= 0:
        how = "both rose, the chosen responses more"
    else:
        how = "both sank, the rejected responses more"
    return f"The margin grew by {number_text(margin.by)}: {how} (rewards: {moves}).{since}"


def figures(run: RunData) -> list[Figure]:
    """The numbers that matter most: means over the last tenth of the log lines, and over the first beside them."""
    if not run.train:
        return []
    last = run.train[-1]
    found = [Figure("step", f"{max(last['step'], run.end.get('step', 0)):,}", _of(run.facts.get("max_steps")))]
    for name, label, spell in _FIGURES:
        change = change_of(run, name)
        if change is not None:
            found.append(Figure(label, spell(change.last), f"from {spell(change.first)}"))
    likelihood = run.series("self_play/chosen_logp_change")
    if likelihood:
        found.append(Figure("chosen likelihood", f"{likelihood[-1]:+.3g} nats", "since the start"))
    return found


def _of(total: int | None) -> str:
    return f"of {total:,}" if total else ""


def number_text(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def size_text(count: float) -> str:
    """A number of parameters: 7.2 B, 124 M, 260 k."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f}"


def duration_text(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, whole = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole} s" if minutes else f"{whole} s"


def _percent(value: float) -> str:
    return f"{value:.0%}"


_FIGURES: list[tuple[str, str, Any]] = [
    ("loss", "loss", number_text),
    ("rewards/accuracies", "chosen preferred", _percent),
    ("rewards/margins", "margin", number_text),
    ("self_play/identical_fraction", "identical pairs", _percent),
]


def warnings(run: RunData) -> list[Warn]:
    """What should worry the owner of a run, the worst first."""
    found = [
        warn
        for look in (_stopped, _bad_steps, _fall, _worse_eval, _caught_up, _drift, _saturated)
        if (warn := look(run)) is not None
    ]
    return sorted(found, key=lambda warn: warn.level != "bad")


def _stopped(run: RunData) -> Warn | None:
    reason = run.facts.get("stopped")
    return Warn("bad", "The run stopped itself", str(reason)) if reason else None


def _bad_steps(run: RunData) -> Warn | None:
    values = run.series("nonfinite_step_fraction")
    if not any(values):
        return None
    return Warn(
        "bad",
        "Steps without a finite loss or gradient",
        f"{np.mean(values):.2%} of the steps changed nothing. trace-*.jsonl names their pairs; lower the learning "
        "rate, or train in bfloat16 or float32 if this is float16.",
    )


def _fall(run: RunData) -> Warn | None:
    values = run.series("self_play/chosen_logp_change")
    if not values or values[-1] >= 0:
        return None
    worst = min(values)
    return Warn(
        "bad" if values[-1] < -5 else "look",
        "The chosen responses became less likely",
        f"By {-values[-1]:.3g} nats each on the examples followed since the start (at worst {-worst:.3g}). The margin "
        "then comes from sinking the rejected responses faster. Set chosen_nll_weight or dpop_weight, lower the "
        "learning rate, or let chosen_drop_limit end such a run.",
    )


def _worse_eval(run: RunData) -> Warn | None:
    values = [row["eval_loss"] for row in run.eval if isinstance(row.get("eval_loss"), (int, float))]
    if len(values) < 3 or values[-1] <= min(values) * 1.05:
        return None
    best = run.eval[int(np.argmin(values))]["step"]
    return Warn(
        "look",
        "The evaluation loss is past its best",
        f"{min(values):.3g} at step {best:,}, {values[-1]:.3g} at the end: the run learns its pairs by heart.",
    )


def _caught_up(run: RunData) -> Warn | None:
    change = change_of(run, "self_play/identical_fraction")
    if change is None or (change.last < _IDENTICAL_HIGH and change.by < _IDENTICAL_RISE):
        return None
    return Warn(
        "look",
        "The opponent writes ever more of the original",
        f"{change.first:.0%} of new pairs were identical at first, {change.last:.0%} at the end; they carry no signal. "
        "Near 100% the policy has caught up with the data: stop, raise the temperature, or lengthen the segments.",
    )


def _drift(run: RunData) -> Warn | None:
    change = change_of(run, "self_play/rejected_length")
    if change is None or change.first <= 0 or abs(change.by) / change.first < _LENGTH_DRIFT:
        return None
    ends = change_of(run, "self_play/eos_fraction")
    why = f" Segments that end the response: {ends.first:.0%}, then {ends.last:.0%}." if ends is not None else ""
    return Warn(
        "look",
        f"The rejected responses grow {'longer' if change.by > 0 else 'shorter'}",
        f"From {change.first:.0f} to {change.last:.0f} tokens.{why} A model can win by length alone: compare the "
        "lengths of its answers with those of the data.",
    )


def _saturated(run: RunData) -> Warn | None:
    values = run.series("rewards/accuracies")
    half = len(values) // 2
    if len(values) < 10 or float(np.mean(values[half:])) < _ALWAYS_RIGHT:
        return None
    return Warn(
        "look",
        "The pairs have become easy",
        f"In the second half the policy preferred the chosen response in {np.mean(values[half:]):.1%} of pairs: little "
        "is left to learn from them. Fewer steps, shorter segments or a lower temperature make harder pairs.",
    )
