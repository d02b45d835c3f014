"""`sapo estimate`: its flags, and its report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from sapo.commands.arguments import build
from sapo.commands.inputs import quiet_libraries
from sapo.commands.launch import shipped_or_file
from sapo.commands.parser import Parsed
from sapo.errors import ConfigurationError, ModelError, brief
from sapo.estimate.advice import Change, changes_that_fit
from sapo.estimate.devices import Device, device_named
from sapo.estimate.estimate import Estimate, estimate, longest
from sapo.estimate.passes import Lengths
from sapo.text import bytes_text
from sapo.weights.footprint import Strategy, StrategyName
from sapo.weights.loading import load_config, with_stored_adapter


@dataclass(frozen=True, slots=True)
class Report:
    """What was asked for, and what came of it."""

    device: Device
    strategy: Strategy
    lengths: Lengths
    result: Estimate
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.result.needed <= self.device.memory


def run_estimate(given: Parsed) -> None:
    """Estimate a run and print it."""
    quiet_libraries()
    report = make_report(given)
    if given.own.json is not None:
        given.own.json.write_text(json.dumps(as_dictionary(report), indent=2) + "\n", encoding="utf-8")
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
    device = device_named(own.gpu)
    # Unset, mixed precision follows the device of the estimate, not the machine that it is made on.
    run = build(given.values({"bf16": device.overlaps, "report_to": ["none"]}) | {"use_cpu": True})
    config = load_config(run.model) if own.model_config is None else _model_config(own.model_config)
    if own.model_config is None:
        run.model = with_stored_adapter(run.model)
    run.config.check_positions(config)
    strategy = Strategy(*_strategy(own.accelerate_config, own.num_gpus))
    lengths = longest(run.config, own.prompt_length, own.response_length)
    what = (config, run.model, run.config, device, strategy, lengths)
    result = estimate(*what)
    changes: list[Change] = []
    if result.needed > device.memory:
        changes = changes_that_fit(*what, before=result)
    return Report(device, strategy, lengths, result, tuple(changes))


def as_dictionary(report: Report) -> dict[str, Any]:
    """The report in bytes and seconds, for a program."""
    memory = report.result.memory
    return {
        "device": report.device.name,
        "device_memory": report.device.memory,
        "accelerate_config": report.strategy.name,
        "num_gpus": report.strategy.processes,
        "fits": report.fits,
        "needed": report.result.needed,
        "memory": {**memory.lasting, **memory.passing},
        "phases": memory.phases,
        "seconds": report.result.seconds,
        "changes": [{"flag": change.flag, "needed": change.result.needed} for change in report.changes],
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
            f"--accelerate_config {name}: not a configuration that can be estimated ({error})."
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
    lines = [
        f"{count}{device.name} ({bytes_text(device.memory)}), {strategy.name}; {device.source}.",
        f"{result.parameters / 1e9:.2f} billion weights, {result.trained / 1e9:.3g} billion trained; pairs of "
        f"{report.lengths.prompt} + {report.lengths.response} tokens; layout {result.layout}"
        + (f" ({result.why_plain})." if result.why_plain else "."),
        "",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    memory = Table(title="memory of one device", title_justify="left")
    memory.add_column("part")
    memory.add_column("bytes", justify="right")
    for name, size in result.memory.lasting.items():
        memory.add_row(name, bytes_text(size))
    memory.add_section()
    for name, size in result.memory.passing.items():
        memory.add_row(name, bytes_text(size))
    memory.add_section()
    memory.add_row(f"most at one time ({result.memory.worst})", bytes_text(result.memory.most))
    if result.needed > result.memory.most:
        memory.add_row("with driver and allocator", bytes_text(result.needed))
    console.print(memory)
    seconds = Table(title="seconds of an optimizer step", title_justify="left")
    seconds.add_column("part")
    seconds.add_column("seconds", justify="right")
    for name, value in result.seconds.items():
        seconds.add_row(name, f"{value:.3g}")
    seconds.add_section()
    total = sum(result.seconds.values())
    seconds.add_row("all", f"{total:.3g}")
    console.print(seconds)
    for line in _verdict(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _verdict(report: Report) -> list[str]:
    if report.fits:
        share = report.result.needed / report.device.memory
        return [f"It fits: {bytes_text(report.result.needed)} of {bytes_text(report.device.memory)} ({share:.0%})."]
    lacking = report.result.needed - report.device.memory
    lines = [f"It does not fit: {bytes_text(lacking)} too much. In this order:"]
    before = report.result.needed
    for change in report.changes:
        after = change.result.needed
        lines.append(
            f"  {change.flag}: saves {bytes_text(before - after)}, then {bytes_text(after)}. Price: {change.price}."
        )
        before = after
    if before > report.device.memory:
        lines.append("  Then still too much: more GPUs, a smaller model, or shorter lengths.")
    return lines
