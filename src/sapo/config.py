"""SAPOConfig: every option of a run, checked before a model loads."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import transformers
import trl
from packaging.version import Version
from transformers import TrainingArguments

from sapo.errors import ConfigurationError, brief

Objective = Literal["dpo", "orpo", "sft"]
PairSourceName = Literal["self_play", "paired", "none"]
GenerationBackend = Literal["transformers", "vllm_server", "vllm_colocate"]
Reference = Literal["initial", "opponent_copy", "opponent", "none"]

HAS_ACTIVATION_CHECKPOINTING = Version(transformers.__version__) >= Version("5.23")
"""Whether transformers calls gradient checkpointing `activation_checkpointing` and deprecates the older name."""

HAS_FUSED_LM_HEAD = Version(trl.__version__) >= Version("1.16")
"""Whether trl has `add_fused_lm_head`; the newest trl for Python 3.10 has not."""

VLLM_URL = "http://127.0.0.1:8000"
"""Where vLLM listens unless told otherwise."""

LEAST_REPORT_PAIRS = 12
"""Pairs that the report keeps of the start and the end of a run."""


def _option(default: Any, text: str) -> Any:
    """A dataclass field with its help text; argparse reads `%` as a format, so it is doubled."""
    return field(default=default, metadata={"help": text.replace("%", "%%")})


class _Repeatable(argparse.Action):
    """A flag that may be given several times: its values add up, and take the place of a recipe's."""

    _given = False

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        before = getattr(namespace, self.dest) if self._given else None
        self._given = True
        setattr(namespace, self.dest, [*(before or ()), *values])


@dataclass
class SAPOConfig(TrainingArguments):
    """Options of `SAPOTrainer`: those of `transformers.TrainingArguments`, and what SAPO adds.

    Defaults are the published settings where the paper has one (section 4.1 and the published recipes). The help text
    of each field is its documentation; `sapo train --help` prints all of them.

    Raises:
        ConfigurationError: options that are out of range or clash, with the way out.
    """

    # Defaults of TrainingArguments that differ here, as in trl.
    learning_rate: float = _option(5e-7, "Peak learning rate. Published: 5e-7 for DPO, 5e-6 for ORPO.")
    logging_steps: float = _option(10, "Log every so many optimizer steps; below 1, a share of all steps.")
    gradient_checkpointing: bool = _option(
        True, "Recompute activations in the backward pass: much less memory for about 20% more time."
    )
    bf16: bool | None = _option(
        None, "Mixed precision in bfloat16. Unset: on where the accelerator has it, off on a CPU."
    )
    remove_unused_columns: bool | None = _option(False, "Must stay false: the prepared data has columns of its own.")

    hub_strategy: str = _option("end", "Must stay end: the run is pushed when it has ended, its checkpoints are not.")

    # Objective
    objective: Objective = _option(
        "dpo",
        'Loss on the pairs: "dpo" (with a reference) or "orpo" (without); "sft" is the likelihood of the chosen '
        "responses alone, with neither opponent nor pairs.",
    )
    loss_type: Literal["sigmoid", "hinge", "ipo"] = _option(
        "sigmoid", "Form of the DPO loss; ipo divides log-ratios by the response length, as trl does."
    )
    beta: float = _option(
        0.1, "Strength of the pull towards the reference (DPO), weight of the odds-ratio term (ORPO)."
    )
    chosen_nll_weight: float = _option(
        0.0, "Guard for DPO: add this times the chosen response's negative log-likelihood per token."
    )
    dpop_weight: float = _option(
        0.0,
        "Guard for DPO: subtract this times max(0, fall of the chosen log-probability) from the margin (DPOP).",
    )
    chosen_drop_limit: float | None = _option(
        None, "Stop when the chosen log-probability has fallen by more than this many nats per response."
    )
    max_nonfinite_steps: int = _option(
        10,
        "Stop after so many optimizer steps in a row whose loss or gradient is not finite; such a step changes "
        "nothing.",
    )
    chosen_probe_size: int = _option(
        16,
        "Training examples whose chosen log-probability is followed from the start of the run; 0 for none.",
    )
    nll_scope: Literal["response", "all"] = _option(
        "response",
        'Where ORPO\'s likelihood term looks; "all" adds prompt and padding, as published (departure 8).',
    )

    # Self-play
    pair_source: PairSourceName = _option(
        "self_play",
        'Where pairs come from: the opponent, or the data\'s own chosen and rejected ("paired"). Objective sft has '
        'none and sets "none".',
    )
    num_rounds: int | None = _option(
        None,
        "Play in rounds, as SPIN does: the opponent, frozen, writes the pairs of the whole data set, the policy trains "
        "on them for num_train_epochs, and becomes the next round's opponent and reference. Each has a folder of its "
        "own, round-N. Unset: one run in which the opponent follows.",
    )
    mix_previous_round: bool = _option(
        False, "With num_rounds: from round 1 on, train on the pairs of the round before too."
    )
    segment_length: float | None = _option(
        256, "Tokens to rewrite; between 0 and 1 a fraction of the response; none for the whole response."
    )
    tail_margin: int = _option(
        3, "Last tokens of a long response that a segment never reaches (published: 3; departure 3)."
    )
    suffix: Literal["keep", "drop", "mask"] = _option(
        "keep",
        "What follows the rewritten segment: kept, dropped, or present and not scored in the rejected response.",
    )
    max_new_tokens: int | None = _option(
        None,
        "Most tokens that the opponent writes when it rewrites whole responses (segment_length none). Unset: as many "
        "as the response has, as in SAPO, so that no rejected response is longer than the chosen one.",
    )
    assistant_turns: Literal["last", "random", "all"] = _option(
        "last", "Which replies of a conversation are learnt from; random draws one anew in each epoch."
    )
    num_generations: int = _option(1, "Pairs made from each example; each draws its own segment.")
    generation_interval: int = _option(
        1, "Generate at every k-th optimizer step; the examples of the steps between are passed over."
    )
    steps_per_generation: int = _option(
        1,
        "Write the segments of this many optimizer steps in one call: larger batches for the opponent, whose text is "
        "then at most this many steps older.",
    )
    generation_batch_size: int | None = _option(None, "Rows the opponent writes at a time; unset for all at once.")
    temperature: float = _option(0.7, "Sampling temperature of the opponent; 0 for greedy.")
    top_k: int = _option(50, "The opponent samples from this many most probable tokens; 0 for all.")
    top_p: float = _option(0.95, "The opponent samples from the smallest set with this probability; 1 for all.")
    skip_identical: bool = _option(
        True, "Do not store a pair whose rewritten segment equals the original: it carries no signal."
    )

    # Who writes
    generation_backend: GenerationBackend = _option(
        "transformers",
        "What the opponent writes with: this process; one or several vLLM servers (vllm_server_url; sapo serve starts "
        "one); or vLLM inside this process.",
    )
    vllm_server_url: list[str] | None = field(
        default=None,
        metadata={
            "help": f"With generation_backend vllm_server: where the server is; may be repeated. Unset: {VLLM_URL}.",
            "action": _Repeatable,
        },
    )
    vllm_server_timeout: float = _option(
        240.0, "Seconds to wait for a vLLM server that does not answer, at the start and later, before giving up."
    )
    vllm_request_timeout: float = _option(
        300.0, "Seconds after which one request to a vLLM server is given up and sent again."
    )
    vllm_weights_transfer: Literal["folder", "stream"] = _option(
        "folder",
        "With vllm_server: how the opponent's weights reach the servers; stream sends those of a full model over the "
        "network, from the first process's main memory, to servers that see no common folder.",
    )
    vllm_weights_dir: str | None = _option(
        None,
        "Folder, seen by the vLLM servers under the same name, in which the opponent's weights are handed over, in a "
        "folder of this run's own; one in memory (/dev/shm) is fastest. Unset: engine/ in output_dir.",
    )
    vllm_gpu_memory_utilization: float = _option(
        0.3, "With generation_backend vllm_colocate: share of the GPU's memory that vLLM takes; sapo serve: 0.9."
    )
    sync_opponent_steps: int = _option(
        1, "With vLLM: give the engine the opponent's weights after every so many optimizer steps."
    )
    max_staleness: int = _option(
        0,
        "With vllm_server: most optimizer steps that the opponent may have been behind the policy when it wrote a pair "
        "that is learnt from for the first time. Above 0 the server writes pending batches while the policy trains; 0 "
        "waits for it in each step.",
    )

    # Opponent and reference
    ema_decay: float = _option(
        0.5,
        "Opponent <- decay x opponent + (1 - decay) x policy after each optimizer step; 1 freezes it, 0 copies.",
    )
    reference: Reference | None = _option(
        None,
        "Reference of DPO: initial; opponent_copy (every ref_model_sync_steps, published); opponent (live, one model "
        "fewer); none. Unset: opponent_copy for self-play DPO, initial for paired data, none for ORPO.",
    )
    ref_model_sync_steps: int = _option(
        108, "With reference opponent_copy: optimizer steps between two copies (published: 108)."
    )

    # Replay buffer
    replay_buffer_size: int = _option(2000, "Pairs kept by each process; when full the oldest leaves.")
    replay_draw: Literal["inverse_count", "uniform"] = _option(
        "inverse_count", "Draw with probability proportional to 1 / (times drawn + 1), or uniformly."
    )
    replay_replacement: bool = _option(True, "Whether a batch may hold the same pair twice (as published).")
    replay_max_age: int | None = _option(None, "Discard pairs older than this many optimizer steps.")

    # Data
    max_length: int = _option(2048, "Most tokens of prompt and response together.")
    max_prompt_length: int | None = _option(
        None,
        "Most tokens of a prompt that has to be cut. Unset: max_length less segment_length (less a quarter, if that is "
        "not in tokens), at least half.",
    )
    prompt_truncation: Literal["keep_end", "keep_start"] = _option(
        "keep_end", "Which end of a prompt that is too long is kept."
    )
    max_length_policy: Literal["truncate", "drop", "error"] = _option(
        "truncate", "What happens to rows longer than max_length; they are counted and reported in any case."
    )

    # Speed and memory; none of these changes what is learnt, beyond floating point
    layout: Literal["auto", "shared", "plain"] = _option(
        "auto",
        "shared computes the prefix of a pair once, in one row without padding; plain has a row for each response. "
        "auto shares where the model's attention allows it.",
    )
    pairs_per_forward: int | None = _option(
        None,
        "Pairs in one forward and backward pass; unset: the whole micro-batch. Fewer need less memory.",
    )
    fused_lm_head: bool | None = _option(
        None,
        "Compute log-probabilities with trl's fused head, which never holds all logits. Unset: on CUDA. Slower on CPU.",
    )

    # Local measures at evaluations
    eval_local: bool = _option(
        False,
        "At evaluations also sample from the policy on some of the rows and log eval_local/...: likelihood, ends, "
        "lengths, repetition, variety, distance to the data, self-play gap.",
    )
    eval_local_size: int = _option(32, "Rows of the evaluation set that eval_local samples.")
    eval_local_max_time_fraction: float = _option(
        0.05, "Share of the run's time that eval_local may take; what does not fit waits for a later evaluation."
    )

    # The run
    disable_dropout: bool = _option(True, "Set every dropout of the model to 0, as trl's DPO does.")
    model_init_kwargs: dict | str | None = _option(
        None, "Keyword arguments for from_pretrained when the model is given by name."
    )
    log_pairs_steps: int = _option(50, "Show a table of a few new pairs every so many optimizer steps; 0 for never.")
    num_pairs_to_print: int = _option(3, "Pairs in that table.")
    push_opponent_to_hub: bool = _option(
        False, "With push_to_hub: push the opponent too, into the folder opponent/ of the same repository."
    )
    report_steps: int = _option(
        100,
        "Refresh report.html every so many optimizer steps (less often where that would take a fiftieth of the time); "
        "0: write it at the end of the run only.",
    )
    report_pairs: int = _option(
        200,
        "Pairs kept in pairs.jsonl for the report, at most: a few prompts followed through the run, and a few pairs "
        "learnt from, at evenly spaced steps; 0 for none.",
    )
    resume_from_checkpoint: str | None = _option(
        None,
        'A checkpoint folder to continue from; "true" for the newest in output_dir; "auto" for that if there is one, '
        "and from the start if not: for jobs that are restarted by themselves.",
    )
    overwrite_output_dir: bool = _option(
        False,
        "Start afresh in an output folder that holds an earlier run: its checkpoints and results are deleted.",
    )
    skip_memory_check: bool = _option(
        False, "Load the model even if the estimate says that its copies do not fit into memory."
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        self._check()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _accelerator_has_bf16()
        # The older name stays the option, because trl's users type it; TrainingArguments lets it follow the newer one.
        self.activation_checkpointing: bool | None
        if HAS_ACTIVATION_CHECKPOINTING and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise ConfigurationError(brief(error)) from error
        # Only now a mapping, where it came as JSON.
        if isinstance(self.model_init_kwargs, dict) and "token" in self.model_init_kwargs:
            raise ConfigurationError(
                "model_init_kwargs holds a token, which would be written into the run folder. Leave it out, and log in "
                "with `hf auth login` or set HF_TOKEN."
            )

    def _check(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigurationError(f"{option.name}={value}: must be a finite number.")
        if self.segment_length is not None and self.segment_length >= 1:
            if self.segment_length != int(self.segment_length):
                raise ConfigurationError(
                    f"segment_length={self.segment_length}: give whole tokens (1 or more), a fraction below 1, "
                    "or none for the whole response."
                )
            self.segment_length = int(self.segment_length)
        if self.objective == "sft" and self.pair_source == "self_play":
            self.pair_source = "none"
        self.reference = self.reference or self._default_reference()
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                reach = f"{low} or more" if high == _INF else f"between {low} and {high}"
                raise ConfigurationError(f"{name}={value}: must be {reach}.")
        if 0 < self.report_pairs < LEAST_REPORT_PAIRS:
            raise ConfigurationError(
                f"report_pairs={self.report_pairs}: give 0, or {LEAST_REPORT_PAIRS} or more: the start and the end of "
                "a run have as many."
            )
        if self.segment_length == 0:
            raise ConfigurationError("segment_length=0: must be positive, or none for the whole response.")
        if self.beta == 0 and self.objective == "dpo":
            raise ConfigurationError("beta=0 with objective=dpo: the loss is constant. Raise beta.")
        self._check_lengths()
        self._check_objective()
        self._check_iterations()
        self._check_engine()
        self._check_device()
        if self.eval_local and self.eval_strategy == "no":
            raise ConfigurationError("eval_local=true needs evaluations. Set eval_strategy to steps, and eval_steps.")
        if self.hub_strategy != "end":
            raise ConfigurationError(
                f"hub_strategy={self.hub_strategy}: a run is pushed when it has ended. Leave the option out."
            )
        if self.push_opponent_to_hub and self.pair_source == "paired":
            raise ConfigurationError(
                "push_opponent_to_hub with pair_source=paired: there is no opponent. Leave it out."
            )
        if self.remove_unused_columns:
            raise ConfigurationError("remove_unused_columns=true: must stay false here. Leave the option out.")

    def check_positions(self, model_config: Any) -> None:
        """Refuse more tokens than a model has positions for; one whose configuration does not say is believed.

        Raises:
            ConfigurationError: `max_length` exceeds them.
        """
        positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and 0 < positions < self.max_length:
            raise ConfigurationError(
                f"max_length={self.max_length} exceeds the {positions} positions of the model. "
                f"Lower it: --max_length {positions}."
            )

    @property
    def scores_shared(self) -> bool:
        """Whether the loss looks at the beginning that both responses share; in a plain DPO margin it cancels."""
        return bool(self.objective != "dpo" or self.loss_type == "ipo" or self.chosen_nll_weight or self.dpop_weight)

    def _default_reference(self) -> Reference:
        if self.objective != "dpo":
            return "none"
        if self.num_rounds is not None:
            return "initial"
        return "opponent_copy" if self.pair_source == "self_play" else "initial"

    def _check_lengths(self) -> None:
        tokens = self.segment_length if self.segment_length is not None and self.segment_length >= 1 else 0
        if self.max_prompt_length is None:
            self.max_prompt_length = max(
                self.max_length - int(tokens or self.max_length // 4 or 1), self.max_length // 2
            )
        elif self.max_prompt_length >= self.max_length:
            raise ConfigurationError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a response in "
                f"max_length={self.max_length}. Lower it, or raise max_length."
            )
        elif self.max_prompt_length + tokens > self.max_length:
            raise ConfigurationError(
                f"max_prompt_length={self.max_prompt_length} and segment_length={tokens} exceed "
                f"max_length={self.max_length}. Lower either, or raise max_length to "
                f"{self.max_prompt_length + tokens}."
            )

    def _check_objective(self) -> None:
        if (self.objective == "sft") != (self.pair_source == "none"):
            raise ConfigurationError(
                f"pair_source={self.pair_source} with objective={self.objective}: sft learns from responses alone, dpo "
                "and orpo from pairs. Leave pair_source out, or set objective."
            )
        if self.objective != "dpo":
            for name in ("chosen_nll_weight", "dpop_weight"):
                if getattr(self, name):
                    raise ConfigurationError(
                        f"{name}={getattr(self, name)} with objective={self.objective}: it has a likelihood term and "
                        f"no reference. Set {name} to 0, or objective to dpo."
                    )
            if self.reference != "none":
                raise ConfigurationError(
                    f"reference={self.reference} with objective={self.objective}: it uses none. Leave the option out."
                )
            if self.loss_type != "sigmoid":
                raise ConfigurationError(
                    f"loss_type={self.loss_type} with objective={self.objective}: it is a form of the DPO loss. "
                    "Leave the option out, or set objective to dpo."
                )
            if self.nll_scope == "all" and self.layout == "shared":
                raise ConfigurationError(
                    "nll_scope=all with layout=shared: the published term averages over padding, and this layout "
                    "has none. Set layout to plain."
                )
        if self.objective != "orpo" and self.nll_scope != "response":
            raise ConfigurationError(
                f"nll_scope={self.nll_scope} with objective={self.objective}: it concerns ORPO's likelihood term only."
            )
        if self.objective == "dpo" and self.reference == "none" and self.dpop_weight:
            raise ConfigurationError(
                f"dpop_weight={self.dpop_weight} with reference=none: the guard measures the fall against the "
                "reference. Use chosen_nll_weight, or another reference."
            )
        if self.pair_source == "paired" and self.reference in ("opponent", "opponent_copy"):
            raise ConfigurationError(
                f"reference={self.reference} with pair_source=paired: there is no opponent. Use initial or none."
            )
        if self.chosen_drop_limit is not None and self.chosen_probe_size == 0:
            raise ConfigurationError(
                "chosen_drop_limit needs examples to follow, and chosen_probe_size=0. Raise chosen_probe_size."
            )

    def _check_iterations(self) -> None:
        if self.max_new_tokens is not None and self.segment_length is not None:
            raise ConfigurationError(
                f"max_new_tokens={self.max_new_tokens} with segment_length={self.segment_length}: a segment takes its "
                "own number of tokens. Set segment_length to none, or leave max_new_tokens out."
            )
        if self.num_rounds is None:
            if self.mix_previous_round:
                raise ConfigurationError("mix_previous_round needs rounds. Set num_rounds.")
            return
        if self.pair_source != "self_play":
            raise ConfigurationError(
                f"num_rounds={self.num_rounds} with pair_source={self.pair_source}: rounds write pairs of "
                "their own. Leave one of the two out."
            )
        if self.ema_decay != 1:
            raise ConfigurationError(
                f"num_rounds={self.num_rounds} with ema_decay={self.ema_decay}: within a round the "
                "opponent is frozen. Set ema_decay to 1, or leave num_rounds out."
            )
        if self.reference not in ("initial", "none"):
            raise ConfigurationError(
                f"reference={self.reference} with num_rounds={self.num_rounds}: the reference is renewed with "
                "the opponent, at the start of a round. Leave the option out."
            )

    def _check_engine(self) -> None:
        backend = self.generation_backend
        if backend == "transformers":
            for name in ("sync_opponent_steps", "max_staleness", "vllm_server_url", "vllm_weights_dir"):
                if getattr(self, name) not in (None, 0, 1):
                    raise ConfigurationError(
                        f"{name}={getattr(self, name)} with generation_backend=transformers: the opponent writes in "
                        "this process. Set generation_backend to vllm_server, or leave it out."
                    )
            return
        if self.pair_source != "self_play":
            raise ConfigurationError(
                f"generation_backend={backend} with pair_source={self.pair_source}: nothing is written. Leave one out."
            )
        if self.num_rounds is not None and (backend == "vllm_colocate" or self.max_staleness):
            raise ConfigurationError(
                f"generation_backend={backend} with num_rounds and max_staleness={self.max_staleness}: rounds "
                "write all their pairs before they train. Use vllm_server, and leave max_staleness out."
            )
        if self.vllm_weights_transfer == "stream" and backend != "vllm_server":
            raise ConfigurationError(
                f"vllm_weights_transfer=stream with generation_backend={backend}: there is no server to send weights "
                "to. Leave it out."
            )
        if self.generation_batch_size is not None:
            raise ConfigurationError(
                f"generation_batch_size={self.generation_batch_size} with generation_backend={backend}: vLLM forms its "
                "own batches. Leave it out."
            )
        if self.max_staleness == 0:
            return
        if backend == "vllm_colocate":
            raise ConfigurationError(
                f"max_staleness={self.max_staleness} with generation_backend=vllm_colocate: one process cannot write "
                "and train at once. Set max_staleness to 0, or generation_backend to vllm_server."
            )
        if self.steps_per_generation > 1:
            raise ConfigurationError(
                f"steps_per_generation={self.steps_per_generation} with max_staleness={self.max_staleness}: pending "
                "batches are written ahead anyway. Leave one of the two out."
            )
        if self.max_staleness < self.sync_opponent_steps:
            raise ConfigurationError(
                f"max_staleness={self.max_staleness} with sync_opponent_steps={self.sync_opponent_steps}: an opponent "
                f"is {self.sync_opponent_steps - 1} steps old before it is renewed, which leaves nothing to write "
                f"ahead. Raise max_staleness to {self.sync_opponent_steps} or more, or set it to 0."
            )

    @property
    def lookahead_steps(self) -> int:
        """Optimizer steps whose pairs are asked for ahead of the current one; 0: a step waits for its own."""
        return self.max_staleness - (self.sync_opponent_steps - 1) if self.max_staleness else 0

    def _check_device(self) -> None:
        if self.fused_lm_head and not HAS_FUSED_LM_HEAD:
            raise ConfigurationError(
                f"fused_lm_head=true needs trl 1.16 or newer, here is {trl.__version__}. Leave the option out, or "
                "upgrade."
            )
        if self.use_cpu:
            return
        if self.bf16 and not _accelerator_has_bf16():
            raise ConfigurationError(
                "bf16=true: no accelerator with bfloat16 on this machine. Leave the option out, or add use_cpu."
            )
        if self.fp16 and not torch.accelerator.is_available():
            raise ConfigurationError("fp16=true: no accelerator on this machine. Leave the option out.")


def _accelerator_has_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type in ("xpu", "npu")  # type: ignore[union-attr]


_INF = float("inf")
_RANGES: list[tuple[str, float, float]] = [
    ("beta", 0, _INF),
    ("chosen_nll_weight", 0, _INF),
    ("dpop_weight", 0, _INF),
    ("chosen_drop_limit", 0, _INF),
    ("chosen_probe_size", 0, _INF),
    ("max_nonfinite_steps", 1, _INF),
    ("segment_length", 0, _INF),
    ("tail_margin", 0, _INF),
    ("max_new_tokens", 1, _INF),
    ("num_rounds", 1, _INF),
    ("num_generations", 1, _INF),
    ("generation_interval", 1, _INF),
    ("steps_per_generation", 1, _INF),
    ("generation_batch_size", 1, _INF),
    ("pairs_per_forward", 1, _INF),
    ("temperature", 0, _INF),
    ("top_k", 0, _INF),
    ("top_p", 0, 1),
    ("eval_local_size", 1, _INF),
    ("eval_local_max_time_fraction", 0, 1),
    ("vllm_server_timeout", 0, _INF),
    ("vllm_request_timeout", 0.001, _INF),
    ("vllm_gpu_memory_utilization", 0, 1),
    ("sync_opponent_steps", 1, _INF),
    ("max_staleness", 0, _INF),
    ("ema_decay", 0, 1),
    ("ref_model_sync_steps", 1, _INF),
    ("replay_buffer_size", 1, _INF),
    ("replay_max_age", 0, _INF),
    ("max_length", 2, _INF),
    ("max_prompt_length", 1, _INF),
    ("log_pairs_steps", 0, _INF),
    ("num_pairs_to_print", 1, _INF),
    ("report_steps", 0, _INF),
    ("report_pairs", 0, _INF),
]
"""Inclusive range of each number; `None` always passes where the field allows it."""
