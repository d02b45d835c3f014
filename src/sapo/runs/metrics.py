"""Every metric of a run: what it measures, how to read it, how it is averaged, and where it is shown.

The producers (`preference`, `training`) name their metrics; everything that shows or sums them uses the names, labels
and texts from here: terminal, report, comparison, model card, and the table of docs/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

EVAL = "eval_"
"""Prefix of evaluation metrics."""
LOCAL = "eval_local/"
"""Prefix of the local measures, which docs/evaluation.md describes."""


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
        chart: title of its chart in `report.charts`.
        legend: its name in the chart.
        eval_legend: name of its evaluation curve; empty without one.
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
    chart: str = ""
    legend: str = ""
    eval_legend: str = ""
    compared: bool = False
    is_total: bool = False
    is_cost: bool = False
    is_work: bool = False


LOSS = Metric(
    "loss",
    "nats",
    "mean loss over the pairs",
    better="lower",
    label="loss",
    chart="Loss",
    legend="training",
    eval_legend="evaluation",
    compared=True,
)
CHOSEN_REWARD = Metric(
    "rewards/chosen",
    "",
    "of the chosen response, β times its log-ratio to the reference (DPO) or its mean log-probability (ORPO)",
    "falling together with `rewards/rejected`: set a guard",
    when="not with SFT",
    chart="Rewards",
    legend="chosen",
    eval_legend="chosen, evaluation",
)
REJECTED_REWARD = Metric(
    "rewards/rejected",
    "",
    "the same of the rejected response",
    when="not with SFT",
    chart="Rewards",
    legend="rejected",
    eval_legend="rejected, evaluation",
)
MARGIN = Metric(
    "rewards/margins",
    "",
    "`rewards/chosen` less `rewards/rejected`",
    better="higher",
    when="not with SFT",
    label="margin",
    chart="Margin",
    legend="training",
    eval_legend="evaluation",
    compared=True,
)
ACCURACY = Metric(
    "rewards/accuracies",
    "share",
    "share of pairs with a positive margin; a margin of 0 counts half",
    "near 1: the pairs have become easy",
    better="higher",
    when="not with SFT",
    label="accuracy",
    chart="Accuracy",
    legend="training",
    eval_legend="evaluation",
    compared=True,
)
CHOSEN_LOGP = Metric(
    "logps/chosen",
    "nats",
    "summed log-probability of the scored tokens of the chosen response",
    "varies with the lengths drawn",
    chart="Log-probabilities",
    legend="chosen",
    eval_legend="chosen, evaluation",
    compared=True,
)
REJECTED_LOGP = Metric(
    "logps/rejected",
    "nats",
    "the same of the rejected response",
    when="not with SFT",
    chart="Log-probabilities",
    legend="rejected",
    eval_legend="rejected, evaluation",
    compared=True,
)
CHOSEN_CHANGE = Metric(
    "self_play/chosen_logp_change",
    "nats per response",
    "change of the chosen log-probability since the start, on the same training examples (`chosen_probe_size`); unless "
    "their number is set, not at every log line",
    "below 0 the chosen responses become less likely; `chosen_drop_limit` stops the run",
    better="higher",
    compared=True,
)
CHOSEN_CHANGE_PER_TOKEN = Metric(
    "self_play/chosen_logp_change_per_token",
    "nats per token",
    "the same, over the tokens of these responses",
    "below -0.1 the run did harm (10% more perplexity)",
    better="higher",
    label="chosen change",
    chart="Likelihood of the chosen responses",
    legend="change since the start",
    compared=True,
)
IDENTICAL = Metric(
    "self_play/identical_fraction",
    "share",
    "share of new pairs in which the opponent generated the original segment",
    "rising: less and less signal; near 1 the policy has caught up with the data (a warning at 0.9)",
    better="lower",
    when="with self-play",
    label="identical",
    chart="Identical pairs and EOS tokens",
    legend="identical",
    compared=True,
)
ENDED = Metric(
    "self_play/eos_fraction",
    "share",
    "share of regenerated segments that end the response",
    when="with self-play",
    chart="Identical pairs and EOS tokens",
    legend="with an EOS token",
    compared=True,
)
REJECTED_LENGTH = Metric(
    "self_play/rejected_length",
    "tokens",
    "mean length of a new rejected response",
    "drifting: preferences can be won by length alone",
    when="with self-play",
    chart="Lengths",
    legend="rejected",
    compared=True,
)
_work = partial(Metric, chart="Time by part", is_cost=True, is_work=True)
GENERATE_TIME = _work(
    "time/generate",
    "seconds per micro-batch",
    "segments, the opponent's text, replay buffer and layout",
    "with `steps_per_generation` it falls on the first step of a pool",
    legend="generation",
)
REFERENCE_TIME = _work("time/reference", "seconds per micro-batch", "scoring by the reference", legend="reference")
POLICY_TIME = _work(
    "time/policy", "seconds per micro-batch", "forward and backward pass of the policy", legend="policy"
)
OPTIMIZER_TIME = _work("time/optimizer", "seconds per step", "optimizer and moving average", legend="optimizer")
OVERHEAD_TIME = Metric(
    "time/overhead",
    "seconds per step",
    "the rest of `time/step`: rows, log lines, tracked examples, report, evaluations, checkpoints",
    "a large share of `time/step`: evaluate, save and log more rarely; see `chosen_probe_size` and `report_pairs`",
    better="lower",
    chart="Time by part",
    legend="other",
    is_cost=True,
)
STEP_TIME = Metric(
    "time/step",
    "seconds per step",
    "wall time of an optimizer step and of all that is done between two steps",
    "`sapo compare` adds it up",
    is_cost=True,
)
CPU_TIME = Metric(
    "time/cpu",
    "seconds",
    "CPU time of all processes since the last log line",
    "`sapo compare` adds it up",
    is_total=True,
    is_cost=True,
)
TOKENS = Metric(
    "tokens",
    "tokens",
    "tokens (no padding) trained on since the last log line, over all processes",
    "`sapo compare` adds them up",
    is_total=True,
    is_cost=True,
)
PEAK_MEMORY = Metric("memory/peak_mb", "MB", "peak resident memory of the first process so far")
DEVICE_PEAK_MEMORY = Metric(
    "memory/device_peak_mb",
    "MB",
    "peak memory of tensors of the first process on its accelerator",
    when="with an accelerator",
    chart="Memory",
    legend="device, peak",
)
BAD_STEPS = Metric(
    "nonfinite_step_fraction",
    "share",
    "share of steps whose loss or gradient was not finite; they changed nothing",
    "above 0: look at `trace-*.jsonl`",
    better="lower",
    chart="Steps that changed nothing",
    legend="share of steps",
)
MOVED = Metric(
    "optimizer/moved_fraction",
    "share",
    "share of the trained weights (of their float32 masters, where there are some) that the last step changed, on a "
    "sample of a million",
    "near 1; near 0 (a warning under 0.05) the steps are smaller than the rounding of the weights: raise the learning "
    "rate, or keep them in float32",
    better="higher",
    chart="Weights changed by a step",
    legend="share of weights",
)
RETENTION_GENERAL = Metric(
    "retention/kl_general",
    "nats per token",
    "KL(start ‖ policy) over the full vocabulary, on replies of the start to general prompts",
    "0 at the start; what rises here is lost elsewhere; compare runs at equal `retention/gain`",
    better="lower",
    when="at evaluations with `eval_retention`",
    chart="Distance from the start",
    eval_legend="general prompts",
)
RETENTION_TASK = Metric(
    "retention/kl_task",
    "nats per token",
    "the same on replies of the start to prompts of the training rows",
    "it has to rise where the start's own replies are not what is wanted",
    when="at evaluations with `eval_retention`",
    chart="Distance from the start",
    eval_legend="training prompts",
)
RETENTION_GAIN = Metric(
    "retention/gain",
    "nats per token",
    "rise of the log-likelihood of evaluation rows since the start",
    better="higher",
    when="at evaluations with `eval_retention`",
    chart="Gain on evaluation rows",
    eval_legend="since the start",
)
RETENTION_TIME = Metric(
    "retention/time_share",
    "share",
    "time spent on these measures over the time of the run so far",
    "at most about `eval_retention_max_time_fraction`",
    when="at evaluations with `eval_retention`",
)
RUNTIME = Metric("train_runtime", "seconds", "wall time since the last start, in the last line")
FINAL_LOSS = Metric("train_loss", "nats", "mean loss of the whole run, in the last line")

METRICS = (
    LOSS,
    Metric(
        "nll_loss",
        "nats per token",
        "likelihood term of ORPO, of SFT or of the guard",
        better="lower",
        when="with ORPO, SFT or `chosen_nll_weight`",
        chart="Loss",
        legend="likelihood term",
        compared=True,
    ),
    CHOSEN_REWARD,
    REJECTED_REWARD,
    MARGIN,
    ACCURACY,
    CHOSEN_LOGP,
    REJECTED_LOGP,
    CHOSEN_CHANGE,
    CHOSEN_CHANGE_PER_TOKEN,
    IDENTICAL,
    ENDED,
    REJECTED_LENGTH,
    Metric(
        "self_play/segment_length",
        "tokens",
        "mean length of a new segment in the chosen response",
        when="with self-play",
        chart="Lengths",
        legend="segment",
    ),
    Metric(
        "self_play/staleness",
        "steps",
        "optimizer steps by which the opponent that generated the new pairs was behind",
        "at most `max_staleness`; [without it](engines.md#which-opponent-generates-which-pair) "
        "`sync_opponent_steps` less 1, and with `steps_per_generation` the steps of the pool more",
        when="with self-play",
    ),
    Metric("replay/size", "pairs", "pairs in the replay buffer", when="with self-play"),
    Metric(
        "replay/mean_age",
        "steps",
        "steps since the stored pairs were generated",
        "rises until the buffer is full",
        when="with self-play",
        chart="Replay buffer: age",
        legend="mean age",
    ),
    Metric(
        "replay/mean_draws",
        "draws",
        "how often a stored pair has been trained on",
        when="with self-play",
        chart="Replay buffer: draws",
        legend="draws per pair",
    ),
    Metric(
        "opponent/distance",
        "",
        "norm of the difference between policy and opponent over the norm of the policy (with LoRA: of the adapter)",
        "how far the opponent is behind the policy",
        when="with self-play",
        chart="Distance between opponent and policy",
        legend="relative distance",
        compared=True,
    ),
    Metric(
        "grad_norm",
        "",
        "norm of the gradient before clipping",
        chart="Gradient norm",
        legend="gradient norm",
    ),
    Metric("learning_rate", "", "the schedule's value", chart="Learning rate", legend="learning rate"),
    GENERATE_TIME,
    REFERENCE_TIME,
    POLICY_TIME,
    OPTIMIZER_TIME,
    OVERHEAD_TIME,
    STEP_TIME,
    CPU_TIME,
    Metric(
        "time/engine_wait",
        "seconds per micro-batch",
        "time that the training waited for text; part of `time/generate`",
        "near `time/step`: the engine is the bottleneck; add servers, or generate ahead with `max_staleness`",
        when="with vLLM",
    ),
    Metric(
        "time/engine_busy",
        "seconds per micro-batch",
        "time that the engine worked, loading weights included",
        "over `time/step` its busy share",
        when="with vLLM",
    ),
    Metric(
        "time/engine_weights",
        "seconds",
        "time to give the opponent's weights to the engine, each time",
        "large: `vllm_weights_dir` in memory, or a larger `sync_opponent_steps`",
        when="with vLLM",
    ),
    Metric(
        "engine/queue",
        "steps",
        "steps (without `max_staleness`, calls) that are requested and not yet generated when a step begins",
        "as large as the window: the engine is behind; 0: it is idle",
        when="with vLLM",
    ),
    TOKENS,
    Metric(
        "tokens_per_second",
        "tokens/s",
        "tokens (no padding) of the pairs trained on, per second of wall time",
        better="higher",
        chart="Throughput",
        legend="all processes",
    ),
    Metric(
        "memory/process_mb",
        "MB",
        "resident memory of the first process",
        "should not grow",
        chart="Memory",
        legend="process",
    ),
    PEAK_MEMORY,
    DEVICE_PEAK_MEMORY,
    MOVED,
    BAD_STEPS,
    Metric(
        "kl_loss",
        "nats per token",
        "KL(start ‖ policy) over the full vocabulary, on the responses trained on; `kl_weight` times it is in the loss",
        better="lower",
        when="with `kl_weight`",
        chart="Loss",
        legend="divergence from the start",
        compared=True,
    ),
    Metric(
        "self_replay/share",
        "share",
        "share of the trained responses that are self-replay",
        "about `replay_share`",
        when="with `replay_share`",
    ),
    Metric(
        "self_replay/nll_loss",
        "nats per token",
        "negative log-likelihood of the replayed replies of the start",
        "rising: the policy moves away from what the start said",
        better="lower",
        when="with `replay_share`",
        chart="Loss",
        legend="self-replay",
    ),
    RETENTION_GENERAL,
    RETENTION_TASK,
    RETENTION_GAIN,
    RETENTION_TIME,
    Metric("epoch", "epochs", "epochs of the data so far"),
    RUNTIME,
    FINAL_LOSS,
    Metric("train_samples_per_second", "examples/s", "over the whole run, in the last line", better="higher"),
    Metric("train_steps_per_second", "steps/s", "likewise", better="higher"),
    Metric("eval_runtime", "seconds", "wall time of an evaluation", when="with evaluation rows"),
    Metric("eval_samples_per_second", "examples/s", "of an evaluation", better="higher", when="with evaluation rows"),
    Metric("eval_steps_per_second", "batches/s", "likewise", better="higher", when="with evaluation rows"),
    Metric(
        f"{LOCAL}time_share",
        "share",
        "time spent on the local measures over the time of the run so far",
        "at most about `eval_local_max_time_fraction`",
        when="with `eval_local`",
    ),
)
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
