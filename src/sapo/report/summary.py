"""A run in words: settings, changes and warnings. Pure functions of the logged values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import fmean
from typing import Literal

from sapo.runs.layout import RECIPE_FILE
from sapo.runs.metrics import (
    ACCURACY,
    BAD_STEPS,
    CHOSEN_CHANGE_PER_TOKEN,
    CHOSEN_REWARD,
    ENDED,
    EVAL,
    HEADLINES,
    IDENTICAL,
    LOSS,
    MARGIN,
    REJECTED_LENGTH,
    REJECTED_REWARD,
    RETENTION_GENERAL,
    RUNTIME,
    Metric,
)
from sapo.runs.reading import Run
from sapo.text.numbers import count_text, duration_text, number_text, share_text

ENOUGH_PAIRS = 64
"""Number of pairs below which no share of them is spoken of."""
_NO_CHANGE = 0.01
"""Margin, and log-probability in nats per token, below which a change is not told from none."""
_HARM = 0.1
"""Fall of the chosen log-probability in nats per token that did harm: 10% more perplexity."""
_IDENTICAL_HIGH, _IDENTICAL_RISE = 0.5, 0.15
_LENGTH_DRIFT = 0.2
_ALWAYS_RIGHT = 0.99


@dataclass(frozen=True, slots=True)
class Warn:
    """A problem of a run: what happened, what it means, and how to fix it.

    Attributes:
        level: "bad" if the run did harm or stopped early, "warning" if it may have.
        title: what happened, in a few words.
        text: what it means, and what to do.
    """

    level: Literal["bad", "warning"]
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A key figure: name, value as text, and a short note."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """Means of a metric over the start and the end of a run.

    Attributes:
        first: mean over the first log lines.
        last: mean over the last ones.
        pairs: number of pairs in the smaller of the two.
    """

    first: float
    last: float
    pairs: int

    @property
    def is_certain(self) -> bool:
        """Whether there are enough pairs to speak of a share of them."""
        return self.pairs >= ENOUGH_PAIRS

    @property
    def by(self) -> float:
        """`last` minus `first`."""
        return self.last - self.first


_OBJECTIVES = {"dpo": "DPO", "orpo": "ORPO", "sft": "SFT on the chosen responses"}


def change_of(run: Run, metric: Metric) -> Change | None:
    """Change of a metric over a run; None if it was logged less than twice.

    Start and end are each a tenth of the run, and at least the log lines of `ENOUGH_PAIRS` pairs, unless they would
    overlap.
    """
    curve = run.curve(metric)
    if len(curve) < 2:
        return None
    steps = [0, *(step for step, _ in curve)]
    pairs = [(step - before) * run.pairs_per_step for before, step in pairwise(steps)]
    values = [value for _, value in curve]
    wanted, half = max(sum(pairs) / 10, ENOUGH_PAIRS), len(values) // 2
    (first, of_first), (last, of_last) = (
        _mean_until(values[:half], pairs[:half], wanted),
        _mean_until(values[: -half - 1 : -1], pairs[: -half - 1 : -1], wanted),
    )
    return Change(first, last, min(of_first, of_last))


def _mean_until(values: Sequence[float], pairs: Sequence[int], wanted: float) -> tuple[float, int]:
    """Mean over pairs of the first values that have `wanted` pairs, and how many these are."""
    total, count = 0.0, 0
    for value, number in zip(values, pairs, strict=True):
        total, count = total + value * number, count + number
        if count >= wanted:
            break
    return total / max(count, 1), count


def sentences(run: Run) -> list[str]:
    """Settings of the run, changes of the metrics, and source of the margin."""
    return [text for text in (_what_ran(run), _what_changed(run), _likelihood(run), _where_from(run)) if text]


def _what_ran(run: Run) -> str:
    options, facts, step = run.config, run.facts, run.last_step
    objective = _OBJECTIVES.get(options.get("objective", ""), "an unknown objective")
    pairs = {"self_play": " on pairs from self-play", "paired": " on rows with both responses"}
    model = str(facts.get("model", ""))
    if model.startswith(("/", ".", "~")):
        model = model.rstrip("/").rpartition("/")[2]
    subject = "A model"
    if model:
        adapter = f" and an adapter of {count_text(facts['trained_parameters'])}" if facts.get("adapter") else ""
        subject = f"{model} ({count_text(facts['parameters'])} parameters{adapter})"
    planned = facts.get("max_steps")
    if run.broke_off and not run.end:
        state = f"broke off after step {step:,}" + (f" of {planned:,}" if planned else "")
    elif not run.end:
        state = f"has reached step {step:,}" + (f" of {planned:,}" if planned else "")
    elif planned and step < planned:
        state = f"was stopped after step {step:,} of {planned:,}"
    else:
        state = f"was trained for {step:,} step{'' if step == 1 else 's'}"
    rows = f" on {facts['training_rows']:,} training rows" if "training_rows" in facts else ""
    runtime = run.end.get(RUNTIME.name)
    took = f", in {duration_text(runtime)}" if runtime else ""
    return f"{subject} {state}{rows}, with {objective}{pairs.get(options.get('pair_source', ''), '')}{took}."


def _what_changed(run: Run) -> str:
    loss, right, margin = change_of(run, LOSS), change_of(run, ACCURACY), change_of(run, MARGIN)
    if loss is None:
        last = run.last(LOSS)
        if last is not None:
            return f"The loss was {number_text(last)} at the only log line{'' if run.end else ' so far'}."
        return "Nothing was logged." if run.end else "Not enough log lines yet."
    went = f"The loss went from {number_text(loss.first)} to {number_text(loss.last)}"
    if right is None or margin is None:
        return f"{went}."
    if abs(margin.last) < _NO_CHANGE and abs(margin.by) < _NO_CHANGE:
        return f"{went}; the margin is {number_text(margin.last)}: no preference between the responses yet."
    if not right.is_certain:
        return (
            f"{went} and the margin from {number_text(margin.first)} to {number_text(margin.last)} "
            f"({right.pairs} pairs at each end, too few to say how often the policy prefers the chosen response)."
        )
    return (
        f"{went}; the policy preferred the chosen response in {right.first:.0%} of the first {right.pairs:,} pairs and "
        f"in {right.last:.0%} of the last."
    )


def _likelihood(run: Run) -> str:
    """What became of the good answers, which the rewards do not tell: their reference may have moved."""
    change = run.last(CHOSEN_CHANGE_PER_TOKEN)
    if change is None:
        return ""
    return f"Since the start of the run the chosen responses became {likelihood_text(change)}."


def likelihood_text(change: float) -> str:
    """A change of the log-probability in nats per token, in words."""
    if abs(change) < _NO_CHANGE:
        return f"neither more nor less likely ({change:+.2g} nats per token)"
    return f"{'more' if change > 0 else 'less'} likely ({change:+.2g} nats per token)"


def _where_from(run: Run) -> str:
    chosen, rejected = change_of(run, CHOSEN_REWARD), change_of(run, REJECTED_REWARD)
    margin = change_of(run, MARGIN)
    if chosen is None or rejected is None or margin is None:
        return ""
    moves_too = run.config.get("reference") in ("opponent", "opponent_copy")
    if abs(margin.by) < _NO_CHANGE:
        return ""
    if margin.by <= 0:
        return f"The margin did not rise (from {number_text(margin.first)} to {number_text(margin.last)})."
    if chosen.by >= 0 and rejected.by <= 0:
        how = "the chosen responses became more likely and the rejected ones less likely"
    elif chosen.by >= 0:
        how = "both became more likely, the chosen responses more so"
    else:
        how = "both became less likely, the rejected responses more so"
    if run.config.get("objective") == "orpo":
        than = "By mean log-probability"
    elif moves_too:
        than = "Compared with the reference, which follows the opponent and so is not the start,"
    else:
        than = "Compared with the reference"
    return (
        f"The margin rose by {number_text(margin.by)}. {than} {how} (rewards: chosen {chosen.by:+.2g}, rejected "
        f"{rejected.by:+.2g})."
    )


def figures(run: Run) -> list[Figure]:
    """Key figures: means over the end of the run, with those over its start; no share of a handful of pairs."""
    if not run.train:
        return []
    found = [Figure("step", f"{run.last_step:,}", _of(run.facts.get("max_steps")))]
    for metric in HEADLINES:
        change = change_of(run, metric)
        if metric is CHOSEN_CHANGE_PER_TOKEN:
            last = run.last(metric)
            if last is not None:
                found.append(Figure(metric.label, f"{last:+.2g} nats", "per token, since the start"))
        elif change is not None and (metric.unit != "share" or change.is_certain):
            spell = share_text if metric.unit == "share" else number_text
            found.append(Figure(metric.label, spell(change.last), f"from {spell(change.first)}"))
    return found


def _of(total: int | None) -> str:
    return f"of {total:,}" if total else ""


def unjudged(run: Run) -> str:
    """Why a run without warnings is not called free of problems; empty if it is."""
    if not run.train:
        return "Nothing was logged." if run.end else "Nothing logged yet."
    if change_of(run, LOSS) is None:
        return "One log line is too little to look for problems."
    pairs = run.last_step * run.pairs_per_step
    if pairs < ENOUGH_PAIRS:
        return f"No problems found in {pairs} pairs, which are too few to look for all."
    return ""


def warnings(run: Run) -> list[Warn]:
    """Problems of a run, the worst first."""
    found = [
        warn
        for look in (
            _broke_off,
            _stopped,
            _bad_steps,
            _not_finite,
            _fall,
            _worse_eval,
            _far,
            _caught_up,
            _drift,
            _saturated,
        )
        if (warn := look(run)) is not None
    ]
    return sorted(found, key=lambda warn: warn.level != "bad")


def _broke_off(run: Run) -> Warn | None:
    if run.end or not run.broke_off:
        return None
    way = "Start it again with --overwrite_output_dir: there is no checkpoint"
    if any(run.path.glob("checkpoint-*")):
        recipe = f"--config {run.path / RECIPE_FILE} " if run.recipe else ""
        way = f"Continue from the newest checkpoint: sapo train {recipe}--resume_from_checkpoint true"
    return Warn("bad", "The run broke off", f"Its process has gone, as when it is killed or out of memory. {way}")


def _stopped(run: Run) -> Warn | None:
    reason = run.facts.get("stopped")
    return Warn("bad", "Early stop", str(reason)) if reason else None


def _bad_steps(run: Run) -> Warn | None:
    values = run.series(BAD_STEPS)
    if not any(values):
        return None
    return Warn(
        "bad",
        "Steps without a finite loss or gradient",
        f"{fmean(values):.2%} of the steps were skipped. trace-*.jsonl lists their pairs; lower the learning "
        "rate, or train in bfloat16 or float32 if this is float16.",
    )


def _not_finite(run: Run) -> Warn | None:
    steps = [step for step, value in run.curve(LOSS) if not isfinite(value)]
    if not steps:
        return None
    return Warn(
        "bad",
        "The loss is not finite",
        f"It was NaN or infinite at {len(steps)} log line{'' if len(steps) == 1 else 's'}, first at step {steps[0]:,}. "
        "Lower the learning rate, or train in bfloat16 or float32 if this is float16.",
    )


def _fall(run: Run) -> Warn | None:
    values = run.series(CHOSEN_CHANGE_PER_TOKEN)
    if not values or values[-1] > -_NO_CHANGE:
        return None
    worst = min(values)
    return Warn(
        "bad" if values[-1] < -_HARM else "warning",
        "The chosen responses became less likely",
        f"By {-values[-1]:.2g} nats per token on the examples tracked since the start (worst: {-worst:.2g}). Where the "
        "margin rises, it does so only because the rejected responses fall faster. "
        f"{_guard_advice(run)}, lower the learning rate, or set chosen_drop_limit to stop such a run.",
    )


def _guard_advice(run: Run) -> str:
    """What would keep the chosen responses likely, besides what the run did already."""
    weight = run.config.get("chosen_nll_weight")
    if weight:
        return f"Raise chosen_nll_weight above {weight:g}"
    return "Lower beta" if run.config.get("objective") == "orpo" else "Set chosen_nll_weight or dpop_weight"


def _worse_eval(run: Run) -> Warn | None:
    curve = run.curve(EVAL + LOSS.name)
    values = [value for _, value in curve]
    if len(values) < 3 or values[-1] - min(values) < max(0.05 * abs(min(values)), _NO_CHANGE):
        return None
    best = curve[values.index(min(values))][0]
    return Warn(
        "warning",
        "The evaluation loss is past its minimum",
        f"{min(values):.3g} at step {best:,}, {values[-1]:.3g} at the end: the run is overfitting.",
    )


def _far(run: Run) -> Warn | None:
    limit, curve = run.config.get("retention_kl_limit"), run.curve(EVAL + RETENTION_GENERAL.name)
    if limit is None or not curve or curve[-1][1] <= limit:
        return None
    first = next(step for step, value in curve if value > limit)
    return Warn(
        "warning",
        "The policy has moved far from its start",
        f"On general prompts by {curve[-1][1]:.3g} nats per token at the end; it passed retention_kl_limit={limit:g} "
        f"at step {first:,}. What it could do before may suffer: stop earlier, lower the learning rate, or set "
        "replay_share or, with objective=sft, kl_weight.",
    )


def _caught_up(run: Run) -> Warn | None:
    change = change_of(run, IDENTICAL)
    if change is None or not change.is_certain or (change.last < _IDENTICAL_HIGH and change.by < _IDENTICAL_RISE):
        return None
    return Warn(
        "warning",
        "More and more pairs are identical",
        f"{change.first:.0%} of new pairs were identical at the start, {change.last:.0%} at the end; they carry no "
        "signal. Near 100% the policy has caught up with the data: stop, raise the temperature or use longer segments.",
    )


def _drift(run: Run) -> Warn | None:
    change = change_of(run, REJECTED_LENGTH)
    if change is None or not change.is_certain or change.first <= 0 or abs(change.by) / change.first < _LENGTH_DRIFT:
        return None
    ends = change_of(run, ENDED)
    why = f" Segments that end the response: {ends.first:.0%}, then {ends.last:.0%}." if ends is not None else ""
    return Warn(
        "warning",
        f"The rejected responses become {'longer' if change.by > 0 else 'shorter'}",
        f"From {change.first:.0f} to {change.last:.0f} tokens.{why} A model can win by length alone: compare the "
        "lengths of its responses with those of the data.",
    )


def _saturated(run: Run) -> Warn | None:
    values = run.series(ACCURACY)
    half = len(values) // 2
    change = change_of(run, ACCURACY)
    if change is None or not change.is_certain or len(values) < 10 or fmean(values[half:]) < _ALWAYS_RIGHT:
        return None
    return Warn(
        "warning",
        "The pairs have become easy",
        f"In the second half the policy preferred the chosen response in {fmean(values[half:]):.1%} of pairs: little "
        "training signal is left. Fewer steps, shorter segments or a lower temperature make harder pairs.",
    )
