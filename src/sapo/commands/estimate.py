"""`sapo estimate`: its flags, and its report."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from sapo.commands.arguments import RunArguments, build
from sapo.commands.inputs import load_inputs, quiet_libraries
from sapo.commands.launch import shipped_or_file
from sapo.commands.parser import Parsed
from sapo.config import SAPOConfig
from sapo.data.report import percentile
from sapo.errors import ConfigurationError, ModelError, brief
from sapo.estimate.advice import Change, changes_that_fit, gpus_that_fit
from sapo.estimate.checkpointing import set_checkpointing
from sapo.estimate.devices import Device, device_named
from sapo.estimate.estimate import Estimate, Memory, estimate, longest
from sapo.estimate.passes import Lengths
from sapo.runs.files import write_atomically
from sapo.text.numbers import bytes_text, count_text, duration_text
from sapo.text.terminal import say
from sapo.weights.description import load_config, positions_of
from sapo.weights.footprint import Strategy, StrategyName, build_run_models
from sapo.weights.loading import model_errors, with_stored_adapter
from sapo.weights.source import ModelSource, find_source


@dataclass(frozen=True, slots=True)
class Measured:
    """Lengths of the rows that a run will train on, in tokens.

    Attributes:
        median: prompt and response of the row at 50 % of all lengths together.
        long: of the row at 99 %.
        rows: prepared.
    """

    median: tuple[int, int]
    long: tuple[int, int]
    rows: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was asked for, and what came of it.

    Attributes:
        device: of the estimate.
        strategy: how the run is divided.
        lengths: of every pair, for the memory.
        usual: of every pair, for the seconds.
        lengths_from: where they come from, in words.
        steps: of the run, or None where neither data nor max_steps say.
        result: the estimate.
        changes: flags that make it fit, where it does not.
        gpus: how many GPUs it would fit on as it is, with the memory; None where that is not so, or it fits.
        checkpointing: what was asked for, where the estimate decided: "auto".
    """

    device: Device
    strategy: Strategy
    lengths: Lengths
    usual: Lengths
    lengths_from: str
    steps: int | None
    result: Estimate
    changes: tuple[Change, ...]
    gpus: tuple[int, Memory] | None
    checkpointing: bool | str

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.result.memory.needed <= self.device.memory


def run_estimate(given: Parsed) -> None:
    """Estimate a run and print it."""
    quiet_libraries()
    report = make_report(given)
    if given.own.json is not None:
        write_atomically(given.own.json, json.dumps(as_dictionary(report), indent=2) + "\n")
    _show(report, Console())


def make_report(given: Parsed) -> Report:
    """Estimate a run.

    Args:
        given: the command's flags and the options of the run.

    Raises:
        ConfigurationError: a flag or the recipe, as in `sapo train`; no such device.
        ModelError: the model's configuration cannot be read.
    """
    own = given.own
    run = _run(given)
    config = load_config(run.model) if own.model_config is None else _model_config(own.model_config)
    run.config.check_positions(positions_of(config))
    # Only now: this machine may have to be measured.
    device = device_named(own.gpu)
    # Unset, mixed precision follows the device of the estimate, not the machine that it is made on.
    run = _run(given, bf16=device.overlaps)
    if own.model_config is None:
        run.model = with_stored_adapter(run.model, merge=run.config.adapter == "merge")
    strategy = Strategy(*_strategy(own.accelerate_config, own.num_gpus))
    data = _measured(run, own.model_config is not None, own.prompt_length, own.response_length)
    prompt, response = own.prompt_length, own.response_length
    long, median = (data.long, data.median) if data is not None else ((None, None), (None, None))
    lengths = longest(run.config, prompt or long[0], response or long[1])
    usual = longest(run.config, prompt or median[0], response or median[1])
    asked = run.config.gradient_checkpointing
    if asked == "auto":
        set_checkpointing(run.config, False)
    name = str(own.model_config or run.model.model_name_or_path)
    with model_errors(ModelSource(name, name, None, run.model.model_revision)):
        roles = build_run_models(config, run.model, run.config, strategy)
    result = estimate(roles, device, lengths, usual)
    if asked == "auto" and result.memory.needed > device.memory:
        set_checkpointing(run.config, True)
        roles = build_run_models(config, run.model, run.config, strategy)
        result = estimate(roles, device, lengths, usual)
    changes: list[Change] = []
    gpus = None
    if result.memory.needed > device.memory:
        changes = changes_that_fit(roles, device, lengths, result.memory)
        gpus = gpus_that_fit(roles, device, lengths)
    return Report(
        device,
        strategy,
        lengths,
        usual,
        _lengths_from(data, prompt, response),
        _steps(run.config, strategy, data),
        result,
        tuple(changes),
        gpus,
        "auto" if asked == "auto" else bool(asked),
    )


def _run(given: Parsed, **defaults: Any) -> RunArguments:
    return build(given.values(defaults | {"report_to": ["none"]}) | {"use_cpu": True})


def _measured(run: RunArguments, stands_in: bool, *given: int | None) -> Measured | None:
    """Lengths of the data, if some are named and can be tokenized; not where both lengths are given.

    Raises:
        ConfigurationError, DatasetError, ModelError, TokenizerError: as in `sapo train`.
    """
    named = run.data.dataset_name or run.mixture.datasets
    if stands_in or not named or None not in given or not _has_tokenizer(run):
        return None
    inputs = load_inputs(run)
    pairs = [
        pair
        for report in inputs.train_reports
        for pair in zip(report.prompt_lengths, report.response_lengths, strict=True)
    ]
    ordered = sorted(pairs, key=sum)
    return Measured(percentile(ordered, 50), percentile(ordered, 99), len(inputs.train))


def _has_tokenizer(run: RunArguments) -> bool:
    """Whether the model's folder holds a tokenizer; of the hub it is expected."""
    source = find_source(str(run.model.model_name_or_path), run.model.model_revision)
    folder = Path(source.tokenizer_folder or source.base_path)
    return not folder.is_dir() or any(next(folder.glob(name), None) for name in ("tokenizer*", "vocab*", "*.model"))


def _lengths_from(data: Measured | None, prompt: int | None, response: int | None) -> str:
    if prompt and response:
        return "as given"
    if data is not None:
        taken = f"of the {data.rows} prepared rows: the 99th percentile for memory, the median for time"
        return taken + ("; one length as given" if prompt or response else "")
    if prompt or response:
        return "one as given, the other the MAXIMUM ALLOWED: no data was read"
    return "the MAXIMUM ALLOWED by max_length and max_prompt_length: no data was read, and most rows are shorter"


def _steps(args: SAPOConfig, strategy: Strategy, data: Measured | None) -> int | None:
    if args.max_steps > 0:
        return int(args.max_steps)
    if data is None:
        return None
    batches = -(-data.rows // (args.per_device_train_batch_size * strategy.processes))
    per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    return int(math.ceil(args.num_train_epochs * per_epoch) * (args.num_rounds or 1))


def as_dictionary(report: Report) -> dict[str, Any]:
    """The report in bytes and seconds, for a program."""
    memory = report.result.memory
    return {
        "device": report.device.name,
        "device_memory": report.device.memory,
        "accelerate_config": report.strategy.name,
        "num_gpus": report.strategy.processes,
        "fits": report.fits,
        "needed": report.result.memory.needed,
        "at_worst": report.result.memory.at_worst,
        "memory": {**memory.lasting, **memory.passing},
        "phases": memory.phases,
        "seconds": report.result.seconds,
        "limits": report.result.limits,
        "flops": report.result.flops,
        "launches_per_token": report.result.launches,
        "waits_per_token": report.result.waits,
        "steps": report.steps,
        "hours": None if report.steps is None else report.steps * sum(report.result.seconds.values()) / 3600,
        "lengths": {"memory": asdict(report.lengths), "seconds": asdict(report.usual), "from": report.lengths_from},
        "gradient_checkpointing": {"asked": report.checkpointing, "estimated": report.result.recomputes},
        "gpus_that_fit": report.gpus and {"num_gpus": report.gpus[0], "needed": report.gpus[1].needed},
        "changes": [{"flag": change.flag, "needed": change.memory.needed} for change in report.changes],
    }


def _strategy(name: str | None, number: int) -> tuple[StrategyName, int]:
    name = name or ("multi_gpu" if number > 1 else "none")
    if name not in get_args(StrategyName):
        name = _strategy_of(shipped_or_file(name), name)
    if name == "none" or number == 1:
        # DeepSpeed divides by one and keeps its float32 copy all the same.
        return (name if name.startswith("zero") else "none"), number  # type: ignore[return-value]
    return name, number  # type: ignore[return-value]


def _strategy_of(file: Path, name: str) -> str:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        kind = content["distributed_type"]
        if kind == "DEEPSPEED":
            return {2: "zero2", 3: "zero3"}[content["deepspeed_config"]["zero_stage"]]
        return {"FSDP": "fsdp2", "MULTI_GPU": "multi_gpu", "NO": "none"}[kind]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"--accelerate_config {name}: not a configuration that can be estimated ({error}). Take the nearest of "
            f"{', '.join(known for known in get_args(StrategyName) if known != 'none')}."
        ) from error


def _model_config(name: str) -> Any:
    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(content.pop("model_type"), **content)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"--model_config {name}: not a model's configuration ({brief(error, 200)}). Give its config.json, or the "
            "folder."
        ) from error


def _show(report: Report, console: Console) -> None:
    result, device, strategy = report.result, report.device, report.strategy
    count = f"{strategy.processes} x " if strategy.processes > 1 else ""
    memory_pair, time_pair = report.lengths, report.usual
    lines = [
        f"{count}{device.name} ({bytes_text(device.memory)}), "
        f"{'one process' if strategy.name == 'none' else strategy.name}; rates: {device.source}.",
        f"{count_text(result.parameters)} parameters, {count_text(result.trained)} trained; layout "
        f"{result.layout}" + (f" ({result.why_plain})." if result.why_plain else "."),
        f"Lengths are {report.lengths_from}.",
        f"Prompt and response in tokens: {memory_pair.prompt} + {memory_pair.response} for memory, "
        f"{time_pair.prompt} + {time_pair.response} for time.",
    ]
    if report.checkpointing == "auto":
        chosen = "true, since it would not fit without" if result.recomputes else "false, since it fits without"
        lines.append(f"gradient_checkpointing=auto: {chosen}.")
    say(console, *lines, "")
    unit, factor = ("GB", 1e9) if result.memory.needed >= 1e9 else ("MB", 1e6)
    memory = Table(title="memory of one device", title_justify="left")
    memory.add_column("part")
    memory.add_column(unit, justify="right")
    for name, size in result.memory.lasting.items():
        memory.add_row(name, f"{size / factor:.2f}")
    memory.add_section()
    for name, size in result.memory.passing.items():
        memory.add_row(name, f"{size / factor:.2f}")
    memory.add_section()
    memory.add_row(f"peak ({result.memory.worst})", f"{result.memory.most / factor:.2f}")
    others = "driver and allocator" if device.overlaps else "Python and libraries"
    memory.add_row(f"with {others}", f"{result.memory.needed / factor:.2f}")
    console.print(memory)
    console.print(_seconds_table(result))
    say(console, *_time(report), *_verdict(report))


_EXPECTED_ON_CPU, _EXPECTED_ON_GPU = (1.1, 1.7), (2, 3)
"""Times that a step takes of its estimate: measured on a CPU (docs/estimate.md), assumed on a GPU."""


def _seconds_table(result: Estimate) -> Table:
    table = Table(title="seconds of an optimizer step (lower bound)", title_justify="left")
    table.add_column("part")
    for name in ("seconds", "limit", "of limit", "TFLOP"):
        table.add_column(name, justify="right")
    for name, value in result.seconds.items():
        limit, flops = result.limits.get(name), result.flops.get(name)
        share = f"{limit / value:.0%}" if limit and value else ""
        table.add_row(
            name,
            f"{value:.3g}",
            "" if limit is None else f"{limit:.3g}",
            share,
            f"{flops / 1e12:.3g}" if flops else "",
        )
    total, least = sum(result.seconds.values()), sum(result.limits.values())
    table.add_section()
    products = sum(result.flops.values()) / 1e12
    table.add_row("total", f"{total:.3g}", f"{least:.3g}", f"{least / total:.0%}", f"{products:.3g}")
    return table


def _time(report: Report) -> list[str]:
    result, total = report.result, sum(report.result.seconds.values())
    lines = []
    if result.launches is not None:
        graph = " (as a CUDA graph)" if result.launches == 1 else ""
        often = "at each token" if result.waits == 1 else f"every {1 / (result.waits or 1):.0f} tokens"
        waits = f", and a wait for the device {often}" if result.waits else ""
        lines.append(f"Decoding a token: {result.launches} launches{graph}{waits}.")
    lines.append(_provenance(report.device))
    low, high = _EXPECTED_ON_GPU if report.device.overlaps else _EXPECTED_ON_CPU
    lines.append(
        f"At least {total:.3g} s a step. This is a lower bound: expect {low:g} to {high:g} times as much "
        f"({'assumed' if report.device.overlaps else 'measured'}), without evaluation, checkpoints and reports."
    )
    if report.steps is None:
        lines.append(
            "Time of the run: unknown without data. Give --dataset_name and a model with its tokenizer, or --max_steps."
        )
    else:
        least = report.steps * total
        lines.append(
            f"{report.steps:,} optimizer steps: at least {duration_text(least)}, expect {duration_text(low * least)} "
            f"to {duration_text(high * least)}."
        )
    return lines


def _provenance(device: Device) -> str:
    """What is counted, what is assumed and what was measured."""
    counted = "Counted: memory, TFLOP, launches, waits."
    matrix, memory = device.reached
    if matrix == memory == 1:
        return f"{counted} Measured here: rates. Assumed: links between devices."
    return (
        f"{counted} Assumed: {matrix:.0%} of the data sheet's matrix rate, {memory:.0%} of its bandwidth. Measured on "
        f"one H200: {device.launch * 1e6:.0f} microseconds to launch an operation, {device.least * 1e6:.2g} to run one."
    )


def _verdict(report: Report) -> list[str]:
    if report.fits:
        needed, there, at_worst = report.result.memory.needed, report.device.memory, report.result.memory.at_worst
        lines = [f"It fits: {bytes_text(needed)} of {bytes_text(there)} ({needed / there:.0%})."]
        if at_worst > needed:
            lines.append(
                f"Where the lengths of rows differ, a CPU's allocator keeps more: expect up to {bytes_text(at_worst)}"
                f"{', which does not fit' if at_worst > there else ''}."
            )
        return lines
    lacking = report.result.memory.needed - report.device.memory
    lines = [f"It does not fit: {bytes_text(lacking)} too much."]
    if report.gpus is not None:
        count, found = report.gpus
        lines.append(
            f"As it is, on {count} GPUs: --num_gpus {count} --accelerate_config zero3, "
            f"{bytes_text(found.needed)} on each (sapo train takes --accelerate_config zero3)."
        )
    lines.append(f"On {'this device' if report.strategy.processes == 1 else 'these devices'}, in this order:")
    before = report.result.memory.needed
    for change in report.changes:
        after = change.memory.needed
        lines.append(
            f"  {change.flag}: saves {bytes_text(before - after)}, then {bytes_text(after)}. Price: {change.price}."
        )
        before = after
    if before > report.device.memory:
        lines.append("  Then still too much: more GPUs, a smaller model, or shorter lengths.")
    return lines
