"""Options that are set and change nothing in the run that they are set for: they are accepted, and it is said.

What makes no sense together is refused (`rules`), and so is what needs another option (`needs`). Here is what a recipe
may well hold for its other uses, such as the sampling of an opponent in a run without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sapo.options.table import option

_OF_PAIRS = (
    "tail_margin", "suffix", "num_generations", "generation_interval", "steps_per_generation", "skip_identical",
    "ema_decay", "replay_buffer_size", "replay_draw", "replay_replacement", "replay_max_age",
)  # fmt: skip
_SAMPLING = ("temperature", "top_k", "top_p", "generation_batch_size")
_SAMPLES = ("eval_local", "eval_retention", "replay_share")
"""Options with which a run samples, pairs or not."""
_NOT_IN_ROUNDS = (
    "generation_interval", "steps_per_generation", "replay_buffer_size", "replay_draw", "replay_replacement",
    "replay_max_age",
)  # fmt: skip
_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_WITHOUT_ADAM = ("sgd", "adafactor", "rmsprop", "adagrad")
_OF_SEVERAL_PROCESSES = (
    "ddp_backend", "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph",
)  # fmt: skip
_OF_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")


def idle(given: Mapping[str, Any], values: Mapping[str, Any], *, device: str, processes: int) -> list[str]:
    """What to say of options that have no effect: a line for each reason.

    Args:
        given: options that were typed or are in the recipe, by name.
        values: all options of the run, by name.
        device: type of the device that it trains on, such as "cpu".
        processes: number of processes.
    """
    lines = []
    reasons = [*_reasons(given, values)]
    if device == "cpu":
        reasons.append(("device cpu", ("torch_empty_cache_steps",)))
    if processes == 1:
        reasons.append(("one process", _OF_SEVERAL_PROCESSES))
    for reason, names in reasons:
        changed = [name for name in names if name in given and given[name] != getattr(option(name), "default", None)]
        if changed:
            shown = ", ".join(f"{name}={_shown(given[name])}" for name in changed)
            lines.append(f"No effect with {reason}: {shown}.")
    return lines


def _reasons(given: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    def of(name: str) -> str:
        return str(getattr(values.get(name), "value", values.get(name)))

    if values["num_rounds"] is not None:
        yield f"num_rounds={values['num_rounds']}", _NOT_IN_ROUNDS
    elif values["pair_source"] != "self_play":
        # Without a limit of its own, the room of a prompt follows from the segment's length.
        segment = ("segment_length",) if "max_prompt_length" in given else ()
        what = "objective=sft" if values["objective"] == "sft" else f"pair_source={of('pair_source')}"
        yield what, (*segment, *_OF_PAIRS, *(() if any(values[name] for name in _SAMPLES) else _SAMPLING))
    if values["objective"] == "sft":
        yield "objective=sft", ("beta", "log_pairs_steps", "num_pairs_to_print")
    elif not values["log_pairs_steps"]:
        yield "log_pairs_steps=0", ("num_pairs_to_print",)
    if values["disable_dropout"] and values["lora_dropout"]:
        yield "disable_dropout=true", ("lora_dropout",)
    if of("lr_scheduler_type") in ("constant", "reduce_lr_on_plateau"):
        yield f"lr_scheduler_type={of('lr_scheduler_type')}", ("warmup_steps",)
    if any(name in of("optim") for name in _WITHOUT_ADAM):
        yield f"optim={of('optim')}", _OF_ADAM
    if of("train_sampling_strategy") == "sequential":
        yield "train_sampling_strategy=sequential", ("data_seed",)
    if values["gradient_checkpointing"] is False:
        yield "gradient_checkpointing=false", ("gradient_checkpointing_kwargs",)
    if of("save_strategy") != "steps":
        yield f"save_strategy={of('save_strategy')}", ("save_steps",)
    if of("logging_strategy") != "steps":
        yield f"logging_strategy={of('logging_strategy')}", ("logging_steps",)
    if of("eval_strategy") == "no":
        yield "eval_strategy=no", ("per_device_eval_batch_size", "dataset_test_split")
    if "trackio" not in values["report_to"] and "all" not in values["report_to"]:
        yield "report_to without trackio", _OF_TRACKIO
    if values["max_length_policy"] in ("drop", "error"):
        yield f"max_length_policy={values['max_length_policy']}", ("prompt_truncation", "max_prompt_length")
    if values["dataset_name"] and Path(str(values["dataset_name"])).expanduser().exists():
        yield "a local dataset_name", ("dataset_streaming",)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
