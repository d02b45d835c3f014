"""Every metric of a run: what it measures, how to read it, how it is averaged, and where it is shown.

The producers (`preference`, `training`) name their metrics; everything that shows or sums them uses the names, labels
and texts from here: terminal, report, comparison, model card, and the table of docs/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

EVAL = "eval_"
"""Prefix of evaluation metrics."""
LOCAL = "eval_local/"
"""Prefix of the local measures, which docs/evaluation.md describes."""


class Curve(NamedTuple):
    """Title of a metric's chart in `report.charts`, its name there, and that of its evaluation curve; or nothing."""

    chart: str = ""
    legend: str = ""
    eval_legend: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """One name in metrics.jsonl.

    Attributes:
        name: name in the log.
        unit: unit of its values; "share" is a fraction of 1, and "" means no unit.
        meaning: what it measures.
        reading: how to interpret its values.
        better: direction of improvement, if there is one.
        when: condition under which it is logged; empty if every run logs it.
        label: short name on the terminal and among the report's key figures; empty for others.
        curve: where the report shows it.
        compared: whether `sapo compare` shows it by default.
        is_total: summed over the steps since the last log line and over all processes, not averaged.
        is_cost: logged for a run's last steps too, even where no log line is due, so that costs add up.
        is_work: time of a part of every micro-batch or step without which there is no step.
    """

    name: str
    unit: str
    meaning: str
    reading: str = ""
    better: Literal["higher", "lower", ""] = ""
    when: str = ""
    label: str = ""
    curve: Curve = Curve()
    compared: bool = False
    is_total: bool = False
    is_cost: bool = False
    is_work: bool = False


_declared: list[Metric] = []


def _metric(name: str, unit: str, meaning: str, reading: str = "", **more: Any) -> Metric:
    _declared.append(Metric(name, unit, meaning, reading, **more))
    return _declared[-1]


_preference = partial(_metric, when="not with SFT")
_self_play = partial(_metric, when="with self-play")
_vllm = partial(_metric, when="with vLLM")
_retention = partial(_metric, when="at evaluations with `eval_retention`")
_evaluation = partial(_metric, when="with evaluation rows")
_replay = partial(_metric, when="with `replay_share`")
_work = partial(_metric, is_cost=True, is_work=True)

LOSS = _metric(
    "loss",
    "nats",
    "mean loss over the pairs",
    better="lower",
    label="loss",
    curve=Curve("Loss", "training", "evaluation"),
    compared=True,
)
_metric(
    "nll_loss",
    "nats per token",
    "likelihood term of ORPO, of SFT or of the guard",
    better="lower",
    when="with ORPO, SFT or `chosen_nll_weight`",
    curve=Curve("Loss", "likelihood term"),
    compared=True,
)
CHOSEN_REWARD = _preference(
    "rewards/chosen",
    "",
    "of the chosen response, β times its log-ratio to the reference (DPO) or its mean log-probability (ORPO)",
    "falling together with `rewards/rejected`: set a guard",
    curve=Curve("Rewards", "chosen", "chosen, evaluation"),
)
REJECTED_REWARD = _preference(
    "rewards/rejected",
    "",
    "the same of the rejected response",
    curve=Curve("Rewards", "rejected", "rejected, evaluation"),
)
MARGIN = _preference(
    "rewards/margins",
    "",
    "`rewards/chosen` less `rewards/rejected`",
    better="higher",
    label="margin",
    curve=Curve("Margin", "training", "evaluation"),
    compared=True,
)
ACCURACY = _preference(
    "rewards/accuracies",
    "share",
    "share of pairs with a positive margin; a margin of 0 counts half",
    "near 1: the pairs have become easy",
    better="higher",
    label="accuracy",
    curve=Curve("Accuracy", "training", "evaluation"),
    compared=True,
)
CHOSEN_LOGP = _metric(
    "logps/chosen",
    "nats",
    "summed log-probability of the scored tokens of the chosen response",
    "varies with the lengths drawn",
    curve=Curve("Log-probabilities", "chosen", "chosen, evaluation"),
    compared=True,
)
REJECTED_LOGP = _preference(
    "logps/rejected",
    "nats",
    "the same of the rejected response",
    curve=Curve("Log-probabilities", "rejected", "rejected, evaluation"),
    compared=True,
)
CHOSEN_CHANGE = _metric(
    "self_play/chosen_logp_change",
    "nats per response",
    "change of the chosen log-probability since the start, on the same training examples "
    "(`chosen_probe_size`); unless their number is set, not at every log line",
    "below 0 the chosen responses become less likely; `chosen_drop_limit` stops the run",
    better="higher",
    compared=True,
)
CHOSEN_CHANGE_PER_TOKEN = _metric(
    "self_play/chosen_logp_change_per_token",
    "nats per token",
    "the same, over the tokens of these responses",
    "below -0.1 the run did harm (10% more perplexity)",
    better="higher",
    label="chosen change",
    curve=Curve("Likelihood of the chosen responses", "change since the start"),
    compared=True,
)
IDENTICAL = _self_play(
    "self_play/identical_fraction",
    "share",
    "share of new pairs in which the opponent generated the original segment",
    "rising: less and less signal; near 1 the policy has caught up with the data (a warning at 0.9)",
    better="lower",
    label="identical",
    curve=Curve("Identical pairs and EOS tokens", "identical"),
    compared=True,
)
ENDED = _self_play(
    "self_play/eos_fraction",
    "share",
    "share of regenerated segments that end the response",
    curve=Curve("Identical pairs and EOS tokens", "with an EOS token"),
    compared=True,
)
REJECTED_LENGTH = _self_play(
    "self_play/rejected_length",
    "tokens",
    "mean length of a new rejected response",
    "drifting: preferences can be won by length alone",
    curve=Curve("Lengths", "rejected"),
    compared=True,
)
_self_play(
    "self_play/segment_length",
    "tokens",
    "mean length of a new segment in the chosen response",
    curve=Curve("Lengths", "segment"),
)
_self_play(
    "self_play/staleness",
    "steps",
    "optimizer steps by which the opponent that generated the new pairs was behind",
    "at most `max_staleness`; [without it](engines.md#which-opponent-generates-which-pair) "
    "`sync_opponent_steps` less 1, and with `steps_per_generation` the steps of the pool more",
)
_self_play("replay/size", "pairs", "pairs in the replay buffer")
_self_play(
    "replay/mean_age",
    "steps",
    "steps since the stored pairs were generated",
    "rises until the buffer is full",
    curve=Curve("Replay buffer: age", "mean age"),
)
_self_play(
    "replay/mean_draws",
    "draws",
    "how often a stored pair has been trained on",
    curve=Curve("Replay buffer: draws", "draws per pair"),
)
_self_play(
    "opponent/distance",
    "",
    "norm of the difference between policy and opponent over the norm of the policy (with LoRA: of the adapter)",
    "how far the opponent is behind the policy",
    curve=Curve("Distance between opponent and policy", "relative distance"),
    compared=True,
)
_metric("grad_norm", "", "norm of the gradient before clipping", curve=Curve("Gradient norm", "gradient norm"))
_metric("learning_rate", "", "the schedule's value", curve=Curve("Learning rate", "learning rate"))
GENERATE_TIME = _work(
    "time/generate",
    "seconds per micro-batch",
    "segments, the opponent's text, replay buffer and layout",
    "with `steps_per_generation` it falls on the first step of a pool",
    curve=Curve("Time by part", "generation"),
)
REFERENCE_TIME = _work(
    "time/reference", "seconds per micro-batch", "scoring by the reference", curve=Curve("Time by part", "reference")
)
POLICY_TIME = _work(
    "time/policy",
    "seconds per micro-batch",
    "forward and backward pass of the policy",
    curve=Curve("Time by part", "policy"),
)
OPTIMIZER_TIME = _work(
    "time/optimizer", "seconds per step", "optimizer and moving average", curve=Curve("Time by part", "optimizer")
)
OVERHEAD_TIME = _metric(
    "time/overhead",
    "seconds per step",
    "the rest of `time/step`: rows, log lines, tracked examples, report, evaluations, checkpoints",
    "a large share of `time/step`: evaluate, save and log more rarely; see `chosen_probe_size` and `report_pairs`",
    better="lower",
    curve=Curve("Time by part", "other"),
    is_cost=True,
)
STEP_TIME = _metric(
    "time/step",
    "seconds per step",
    "wall time of an optimizer step and of all that is done between two steps",
    "`sapo compare` adds it up",
    is_cost=True,
)
CPU_TIME = _metric(
    "time/cpu",
    "seconds",
    "CPU time of all processes since the last log line",
    "`sapo compare` adds it up",
    is_total=True,
    is_cost=True,
)
_vllm(
    "time/engine_wait",
    "seconds per micro-batch",
    "time that the training waited for text; part of `time/generate`",
    "near `time/step`: the engine is the bottleneck; add servers, or generate ahead with `max_staleness`",
)
_vllm(
    "time/engine_busy",
    "seconds per micro-batch",
    "time that the engine worked, loading weights included",
    "over `time/step` its busy share",
)
_vllm(
    "time/engine_weights",
    "seconds",
    "time to give the opponent's weights to the engine, each time",
    "large: `vllm_weights_dir` in memory, or a larger `sync_opponent_steps`",
)
_vllm(
    "engine/queue",
    "steps",
    "steps (without `max_staleness`, calls) that are requested and not yet generated when a step begins",
    "as large as the window: the engine is behind; 0: it is idle",
)
TOKENS = _metric(
    "tokens",
    "tokens",
    "tokens (no padding) trained on since the last log line, over all processes",
    "`sapo compare` adds them up",
    is_total=True,
    is_cost=True,
)
_metric(
    "tokens_per_second",
    "tokens/s",
    "tokens (no padding) of the pairs trained on, per second of wall time",
    better="higher",
    curve=Curve("Throughput", "all processes"),
)
_metric(
    "memory/process_mb",
    "MB",
    "resident memory of the first process",
    "should not grow",
    curve=Curve("Memory", "process"),
)
PEAK_MEMORY = _metric("memory/peak_mb", "MB", "peak resident memory of the first process so far")
DEVICE_PEAK_MEMORY = _metric(
    "memory/device_peak_mb",
    "MB",
    "peak memory of tensors of the first process on its accelerator",
    when="with an accelerator",
    curve=Curve("Memory", "device, peak"),
)
MOVED = _metric(
    "optimizer/moved_fraction",
    "share",
    "share of the trained weights (of their float32 masters, where there are some) that the last step "
    "changed, on a sample of a million",
    "near 1; near 0 (a warning under 0.05) the steps are smaller than the rounding of the weights: raise "
    "the learning rate, or keep them in float32",
    better="higher",
    curve=Curve("Weights changed by a step", "share of weights"),
)
BAD_STEPS = _metric(
    "nonfinite_step_fraction",
    "share",
    "share of steps whose loss or gradient was not finite; they changed nothing",
    "above 0: look at `trace-*.jsonl`",
    better="lower",
    curve=Curve("Steps that changed nothing", "share of steps"),
)
_metric(
    "kl_loss",
    "nats per token",
    "KL(start ‖ policy) over the full vocabulary, on the responses trained on; `kl_weight` times it is in the loss",
    better="lower",
    when="with `kl_weight`",
    curve=Curve("Loss", "divergence from the start"),
    compared=True,
)
_replay("self_replay/share", "share", "share of the trained responses that are self-replay", "about `replay_share`")
_replay(
    "self_replay/nll_loss",
    "nats per token",
    "negative log-likelihood of the replayed replies of the start",
    "rising: the policy moves away from what the start said",
    better="lower",
    curve=Curve("Loss", "self-replay"),
)
RETENTION_GENERAL = _retention(
    "retention/kl_general",
    "nats per token",
    "KL(start ‖ policy) over the full vocabulary, on replies of the start to general prompts",
    "0 at the start; what rises here is lost elsewhere; compare runs at equal `retention/gain`",
    better="lower",
    curve=Curve("Distance from the start", "", "general prompts"),
)
RETENTION_TASK = _retention(
    "retention/kl_task",
    "nats per token",
    "the same on replies of the start to prompts of the training rows",
    "it has to rise where the start's own replies are not what is wanted",
    curve=Curve("Distance from the start", "", "training prompts"),
)
RETENTION_GAIN = _retention(
    "retention/gain",
    "nats per token",
    "rise of the log-likelihood of evaluation rows since the start",
    better="higher",
    curve=Curve("Gain on evaluation rows", "", "since the start"),
)
RETENTION_TIME = _retention(
    "retention/time_share",
    "share",
    "time spent on these measures over the time of the run so far",
    "at most about `eval_retention_max_time_fraction`",
)
_metric("epoch", "epochs", "epochs of the data so far")
RUNTIME = _metric("train_runtime", "seconds", "wall time since the last start, in the last line")
FINAL_LOSS = _metric("train_loss", "nats", "mean loss of the whole run, in the last line")
_metric("train_samples_per_second", "examples/s", "over the whole run, in the last line", better="higher")
_metric("train_steps_per_second", "steps/s", "likewise", better="higher")
_evaluation("eval_runtime", "seconds", "wall time of an evaluation")
_evaluation("eval_samples_per_second", "examples/s", "of an evaluation", better="higher")
_evaluation("eval_steps_per_second", "batches/s", "likewise", better="higher")
_metric(
    f"{LOCAL}time_share",
    "share",
    "time spent on the local measures over the time of the run so far",
    "at most about `eval_local_max_time_fraction`",
    when="with `eval_local`",
)

METRICS = tuple(_declared)
"""All metrics, in the order of the documentation."""

_BY_NAME = {metric.name: metric for metric in METRICS}
TOTALS = frozenset(metric.name for metric in METRICS if metric.is_total)
COSTS = frozenset(metric.name for metric in METRICS if metric.is_cost)
WORK = tuple(metric for metric in METRICS if metric.is_work)
HEADLINES = tuple(metric for metric in METRICS if metric.label)
"""Key figures on the terminal and at the top of the report."""


def find_metric(name: str) -> Metric | None:
    """The metric that is logged as `name`, also at evaluations; None for unknown names.

    The local measures are not in the table: see docs/evaluation.md.
    """
    return _BY_NAME.get(name) or _BY_NAME.get(name.removeprefix(EVAL))


def compared_metrics() -> list[str]:
    """Names that `sapo compare` shows by default: training metrics, then evaluation metrics."""
    names = [metric.name for metric in METRICS if metric.compared]
    return [*names, *(EVAL + name for name in names)]
