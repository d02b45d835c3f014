"""What the options of a run demand of one another, checked without torch; and the options of its data alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sapo.errors import ConfigurationError
from sapo.options.own import MIN_REPORT_PAIRS, OwnOptions, Reference
from sapo.options.table import option, options
from sapo.options.values import check


class OptionRules(OwnOptions):
    """The rules of `SAPOConfig` on its own options and those it inherits."""

    output_dir: str | None
    seed: int
    per_device_train_batch_size: int
    max_steps: int
    num_train_epochs: float
    eval_strategy: Any

    def _check(self) -> None:
        """Check every option, and what clashes; fill in those that follow from others.

        Raises:
            ConfigurationError: an option is out of range, has no effect, or conflicts with another.
        """
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        for one in fields(self):
            declared = option(one.name)
            if declared is not None:
                check(declared, getattr(self, one.name))
        self._settle_loss_type()
        if self.segment_length is not None and self.segment_length >= 1:
            if self.segment_length != int(self.segment_length):
                raise ConfigurationError(
                    f"segment_length={self.segment_length}: must be an integer number of tokens, a fraction below "
                    "1, or none for the full response."
                )
            self.segment_length = int(self.segment_length)
        if self.objective == "sft" and self.pair_source == "self_play":
            self.pair_source = "none"
        self.reference = self.reference or self._default_reference()
        if self.report_pairs is not None and 0 < self.report_pairs < MIN_REPORT_PAIRS:
            raise ConfigurationError(
                f"report_pairs={self.report_pairs}: must be 0, or {MIN_REPORT_PAIRS} or more: the start and the end of "
                "a run need as many."
            )
        if self.max_steps == 0:
            raise ConfigurationError(
                "max_steps=0: there would be no step. Give a number of steps, or -1 to train for num_train_epochs."
            )
        if self.max_steps < 0 and self.num_train_epochs == 0:
            raise ConfigurationError("num_train_epochs=0: there would be no step. Raise it, or set max_steps.")
        if self.segment_length == 0:
            raise ConfigurationError("segment_length=0: must be positive, or none for the full response.")
        if self.beta == 0 and self.objective == "dpo":
            raise ConfigurationError("beta=0 with objective=dpo: the loss is constant. Raise beta.")
        self._check_lengths()
        self._check_opponent_prompt()
        self._check_objective()
        self._check_keeping()
        self._check_rounds()
        self._check_engine()
        for name in (
            "eval_local",
            "eval_retention",
            "eval_on_start",
            "load_best_model_at_end",
            "metric_for_best_model",
        ):
            value = getattr(self, name)
            if value and self.eval_strategy == "no":
                shown = "true" if value is True else value
                raise ConfigurationError(
                    f"{name}={shown} needs evaluations. Set eval_strategy to steps, and eval_steps."
                )
        if self.push_opponent_to_hub and self.pair_source == "paired":
            raise ConfigurationError(
                "push_opponent_to_hub with pair_source=paired: there is no opponent. Leave it out."
            )

    def check_positions(self, positions: int | None) -> None:
        """Refuse a `max_length` above the model's number of positions, if it has one.

        Raises:
            ConfigurationError: `max_length` exceeds them.
        """
        if positions is not None and 0 < positions < self.max_length:
            raise ConfigurationError(
                f"max_length={self.max_length} exceeds the {positions} positions of the model. "
                f"Lower it: --max_length {positions}."
            )

    @property
    def scores_shared(self) -> bool:
        """Whether the loss depends on the shared tokens of both responses.

        In a plain DPO margin they cancel. In both terms of nce they would not, and say nothing about the segment.
        """
        if self.objective == "dpo" and "nce" in self.loss_type:
            return False
        return bool(self.objective != "dpo" or "ipo" in self.loss_type or self.chosen_nll_weight or self.dpop_weight)

    @property
    def pairs_per_micro_batch(self) -> int:
        """Maximum number of pairs of one process and micro-batch, self-replay included."""
        count: int = math.ceil(self.per_device_train_batch_size / (1 - self.replay_share))
        return count

    def _default_reference(self) -> Reference:
        if self.objective != "dpo":
            return "initial" if self.objective == "sft" and self.kl_weight else "none"
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
                f"max_prompt_length={self.max_prompt_length} leaves no tokens for a response in "
                f"max_length={self.max_length}. Lower it, or raise max_length."
            )
        elif self.max_prompt_length + tokens > self.max_length:
            raise ConfigurationError(
                f"max_prompt_length={self.max_prompt_length} and segment_length={tokens} exceed "
                f"max_length={self.max_length}. Lower either, or raise max_length to "
                f"{self.max_prompt_length + tokens}."
            )

    def _check_opponent_prompt(self) -> None:
        given = self.opponent_system_prompt
        if given is None:
            return
        if not given.strip():
            raise ConfigurationError("opponent_system_prompt is empty. Give it text, or leave it out.")
        if self.pair_source != "self_play":
            raise ConfigurationError(
                f"opponent_system_prompt with pair_source={self.pair_source}: no opponent generates. Leave it out."
            )
        if "nce" in self.loss_type:
            raise ConfigurationError(
                "opponent_system_prompt with loss_type=nce: both of its terms are relative to what generated the "
                "rejected response, which had another prompt. Leave one of the two out."
            )

    def _settle_loss_type(self) -> None:
        """A weight for each form, as trl has it; and sft, which is `chosen_nll_weight`."""
        types, weights = self.loss_type, self.loss_weights
        if len({*types}) < len(types):
            raise ConfigurationError(
                f"loss_type={' '.join(types)}: one is there twice. Give it once, with a larger weight in loss_weights."
            )
        if weights is not None and (len(weights) != len(types) or not all(weights)):
            raise ConfigurationError(
                f"loss_weights={' '.join(f'{one:g}' for one in weights)} with loss_type={' '.join(types)}: must be one "
                "positive number for each."
            )
        if "sft" not in types:
            return
        if types == ["sft"]:
            raise ConfigurationError("loss_type=sft alone: it has no pairs. Set objective to sft, without loss_type.")
        if self.chosen_nll_weight:
            raise ConfigurationError(
                f"loss_type={' '.join(types)} with chosen_nll_weight={self.chosen_nll_weight:g}: both weigh the "
                "likelihood of the chosen response. Leave one of the two out."
            )
        given = weights or [1.0] * len(types)
        self.chosen_nll_weight = given[types.index("sft")]
        self.loss_type = [one for one in types if one != "sft"]
        self.loss_weights = weights and [weight for one, weight in zip(types, weights, strict=True) if one != "sft"]

    def _check_objective(self) -> None:
        if (self.objective == "sft") != (self.pair_source == "none"):
            raise ConfigurationError(
                f"pair_source={self.pair_source} with objective={self.objective}: sft trains on responses alone, dpo "
                "and orpo on pairs. Leave pair_source out, or set objective."
            )
        if self.objective != "dpo":
            for name in ("chosen_nll_weight", "dpop_weight"):
                if getattr(self, name):
                    raise ConfigurationError(
                        f"{name}={getattr(self, name)} with objective={self.objective}: it has a likelihood term and "
                        f"no reference. Set {name} to 0, or objective to dpo."
                    )
            if self.reference != self._default_reference():
                raise ConfigurationError(
                    f"reference={self.reference} with objective={self.objective}: no reference is used but the start "
                    "with kl_weight. Leave it out."
                )
            if self.loss_type != ["sigmoid"] or self.loss_weights is not None:
                weights = "" if self.loss_weights is None else " and loss_weights"
                raise ConfigurationError(
                    f"loss_type={' '.join(self.loss_type)}{weights} with objective={self.objective}: these are forms "
                    "of the DPO loss. Leave them out, or set objective to dpo."
                )
            if self.nll_scope == "all" and self.layout == "shared":
                raise ConfigurationError(
                    "nll_scope=all with layout=shared: the published term averages over padding, and this layout "
                    "has none. Set layout to plain."
                )
        if self.nll_scope == "all" and self.tokens_per_forward is not None:
            raise ConfigurationError(
                f"tokens_per_forward={self.tokens_per_forward} with nll_scope=all: the published term counts padding, "
                "which depends on the passes. Leave it out, or use pairs_per_forward."
            )
        if self.objective != "orpo" and self.nll_scope != "response":
            raise ConfigurationError(
                f"nll_scope={self.nll_scope} with objective={self.objective}: only for ORPO's likelihood term."
            )
        if self.objective == "dpo" and self.reference == "none" and self.dpop_weight:
            raise ConfigurationError(
                f"dpop_weight={self.dpop_weight} with reference=none: the guard is relative to the "
                "reference. Use chosen_nll_weight, or another reference."
            )
        if self.pair_source == "paired" and self.reference in ("opponent", "opponent_copy"):
            raise ConfigurationError(
                f"reference={self.reference} with pair_source=paired: there is no opponent. Use initial or none."
            )
        if self.chosen_drop_limit is not None and self.chosen_probe_size == 0:
            raise ConfigurationError(
                "chosen_drop_limit requires tracked examples, but chosen_probe_size=0. Raise chosen_probe_size."
            )

    def _check_keeping(self) -> None:
        if self.objective != "sft":
            for name, off, instead in (
                ("kl_weight", 0, "The reference of DPO is its anchor; for orpo there is replay_share"),
                ("token_weighting", "none", "The guard chosen_nll_weight weighs all tokens alike"),
            ):
                if getattr(self, name) != off:
                    raise ConfigurationError(
                        f"{name}={getattr(self, name)} with objective={self.objective}: it belongs to objective=sft. "
                        f"{instead}. Leave it out, or set objective to sft."
                    )
        refresh = self.opponent_refresh_steps
        if refresh is not None and (self.ema_decay != 1 or self.num_rounds or self.pair_source != "self_play"):
            raise ConfigurationError(
                f"opponent_refresh_steps={refresh} with ema_decay={self.ema_decay}, num_rounds={self.num_rounds} and "
                f"pair_source={self.pair_source}: it renews an opponent that is frozen otherwise. Set ema_decay to 1 "
                "without rounds, or leave it out."
            )
        nce = "nce" in self.loss_type
        if nce and "ipo" in self.loss_type:
            raise ConfigurationError(
                "loss_type has nce and ipo: one scores what follows the shared tokens, the other all of a response. "
                "Leave one of the two out."
            )
        if nce and self.dpop_weight:
            raise ConfigurationError(
                f"dpop_weight={self.dpop_weight} with loss_type=nce: it changes a margin, which nce has not. Leave "
                "one of the two out."
            )
        if nce and self.reference == "none":
            raise ConfigurationError(
                "loss_type=nce with reference=none: both of its terms are relative to what generated the rejected "
                "response. Leave reference out."
            )
        if self.label_smoothing and (self.objective != "dpo" or "sigmoid" not in self.loss_type):
            raise ConfigurationError(
                f"label_smoothing={self.label_smoothing} with objective={self.objective} and "
                f"loss_type={' '.join(self.loss_type)}: it is a form of the sigmoid DPO loss. Leave one of the two out."
            )
        if not nce and (self.nce_shift, self.nce_negative_weight) != (0.0, 1.0):
            raise ConfigurationError(
                f"nce_shift={self.nce_shift} and nce_negative_weight={self.nce_negative_weight} with "
                f"loss_type={' '.join(self.loss_type)}: they belong to loss_type=nce. Leave them out."
            )
        if self.replay_dataset_name is not None and not self.replay_share:
            raise ConfigurationError(
                "replay_dataset_name without replay_share: its rows are not used. Set replay_share."
            )
        if self.replay_share and self.nll_scope == "all":
            raise ConfigurationError(
                f"replay_share={self.replay_share} with nll_scope=all: the published term counts the padding of chosen "
                "rows, which replayed rows would change. Leave one of the two out."
            )
        if self.replay_share and self.num_rounds is not None:
            raise ConfigurationError(
                f"replay_share={self.replay_share} with num_rounds={self.num_rounds} is not supported: a round's start "
                "is not the run's. Run the rounds one by one with pair_source=paired, or leave one of the two out."
            )

    def _check_rounds(self) -> None:
        if self.max_new_tokens is not None and self.segment_length is not None:
            raise ConfigurationError(
                f"max_new_tokens={self.max_new_tokens} with segment_length={self.segment_length}: a segment has its "
                "own number of tokens. Set segment_length to none, or leave max_new_tokens out."
            )
        if self.num_rounds is None:
            if self.mix_previous_round:
                raise ConfigurationError("mix_previous_round requires rounds. Set num_rounds.")
            return
        if self.pair_source != "self_play":
            raise ConfigurationError(
                f"num_rounds={self.num_rounds} with pair_source={self.pair_source}: rounds generate their "
                "own pairs. Leave one of the two out."
            )
        if self.ema_decay != 1:
            raise ConfigurationError(
                f"num_rounds={self.num_rounds} with ema_decay={self.ema_decay}: within a round the "
                "opponent is frozen. Set ema_decay to 1, or leave num_rounds out."
            )
        if self.reference not in ("initial", "none"):
            raise ConfigurationError(
                f"reference={self.reference} with num_rounds={self.num_rounds}: the reference is updated with "
                "the opponent, at the start of a round. Leave the option out."
            )

    def _check_engine(self) -> None:
        backend = self.generation_backend
        if backend == "transformers":
            for name in ("sync_opponent_steps", "max_staleness", "vllm_server_url", "vllm_weights_dir"):
                if getattr(self, name) not in (None, 0, 1):
                    raise ConfigurationError(
                        f"{name}={getattr(self, name)} with generation_backend=transformers: the opponent generates in "
                        "this process. Set generation_backend to vllm_server, or leave it out."
                    )
            return
        if self.pair_source != "self_play":
            raise ConfigurationError(
                f"generation_backend={backend} with pair_source={self.pair_source}: nothing is generated. Leave "
                "one out."
            )
        if self.num_rounds is not None and (backend == "vllm_colocate" or self.max_staleness):
            raise ConfigurationError(
                f"generation_backend={backend} with num_rounds and max_staleness={self.max_staleness}: rounds "
                "generate all their pairs before they train. Use vllm_server, and leave max_staleness out."
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
                f"max_staleness={self.max_staleness} with generation_backend=vllm_colocate: one process cannot "
                "generate and train at once. Set max_staleness to 0, or generation_backend to vllm_server."
            )
        if self.steps_per_generation > 1:
            raise ConfigurationError(
                f"steps_per_generation={self.steps_per_generation} with max_staleness={self.max_staleness}: pending "
                "batches are generated ahead anyway. Leave one of the two out."
            )
        if self.max_staleness < self.sync_opponent_steps:
            raise ConfigurationError(
                f"max_staleness={self.max_staleness} with sync_opponent_steps={self.sync_opponent_steps}: an opponent "
                f"is {self.sync_opponent_steps - 1} steps stale before it is updated, which leaves nothing to generate "
                f"ahead. Raise max_staleness to {self.sync_opponent_steps} or more, or set it to 0."
            )

    @property
    def lookahead_steps(self) -> int:
        """Number of optimizer steps whose pairs are requested ahead of the current one; 0: a step waits for its own."""
        return self.max_staleness - (self.sync_opponent_steps - 1) if self.max_staleness else 0


class DataConfig(OptionRules):
    """The options of a run for a command that reads only its data.

    Args:
        values: options by name; the others have their defaults.

    Raises:
        ConfigurationError: as `SAPOConfig`, but for what depends on the machine or on transformers.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        for one in options():
            if one.kind in ("own", "inherited"):
                value = values.get(one.name, one.default)
                check(one, value)
                setattr(self, one.name, value)
        self._check()
