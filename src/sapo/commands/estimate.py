"""`sapo estimate`: its flags, and its report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from sapo.commands.arguments import parse
from sapo.commands.launch import shipped_or_file
from sapo.errors import ConfigurationError, ModelError
from sapo.estimate.advice import Change, changes_that_fit
from sapo.estimate.devices import DEVICES, Device, device_named
from sapo.estimate.estimate import Estimate, estimate, longest
from sapo.estimate.passes import Lengths
from sapo.weights.footprint import Strategy, StrategyName
from sapo.weights.loading import load_config, with_stored_adapter

_FLAGS = {
    "--gpu": "device",
    "--num_gpus": "number",
    "--accelerate_config": "strategy",
    "--model_config": "model_config",
    "--prompt_length": "prompt",
    "--response_length": "response",
    "--json": "json",
}
"""Flags of this command that take a value; everything else belongs to the run, as for `sapo train`."""


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


HELP = """\
sapo estimate [--config recipe.yaml] [flags of sapo train] [flags below]

  --gpu NAME                what it runs on: {devices}; here (the default): this machine, measured
  --profile                 the same as --gpu here
  --num_gpus N              processes, one a GPU
  --accelerate_config NAME  multi_gpu, zero2, zero3, fsdp2, or a file
  --model_config FILE       a config.json or its folder, where the model is not at hand
  --prompt_length N         tokens; unset, the longest that the recipe allows
  --response_length N       likewise
  --json FILE               the figures for a program, in bytes and seconds
"""


def run_estimate(arguments: Sequence[str]) -> None:
    """Estimate a run and print it."""
    own, rest = _split(arguments)
    if "--help" in rest or "-h" in rest:
        sys.stdout.write(HELP.format(devices=", ".join(DEVICES)))
        return
    report = make_report(own, rest)
    if "json" in own:
        Path(own["json"]).write_text(json.dumps(as_dictionary(report), indent=2) + "\n", encoding="utf-8")
    _show(report, Console())


def make_report(own: dict[str, str], rest: Sequence[str]) -> Report:
    """Estimate a run.

    Args:
        own: values of this command's flags by their names in `_FLAGS`.
        rest: flags of the run, with or without `--config`.

    Raises:
        ConfigurationError: a flag or the recipe, as in `sapo train`; no such device.
        ModelError: the model's configuration cannot be read.
    """
    device = device_named(own.get("device", "here"))
    # Unset, mixed precision follows the device of the estimate, not the machine that it is made on.
    run = parse([*rest, "--use_cpu"], "sapo estimate", {"bf16": device.overlaps, "report_to": "none"})
    config = _model_config(own["model_config"]) if "model_config" in own else load_config(run.model)
    if "model_config" not in own:
        run.model = with_stored_adapter(run.model)
    run.config.check_positions(config)
    strategy = Strategy(*_strategy(own))
    lengths = longest(run.config, _number(own, "prompt"), _number(own, "response"))
    given = (config, run.model, run.config, device, strategy, lengths)
    result = estimate(*given)
    changes: list[Change] = []
    if result.needed > device.memory:
        changes = changes_that_fit(*given, before=result)
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


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    own: dict[str, str] = {}
    rest: list[str] = []
    given = [part for argument in arguments for part in _parts(argument)]
    while given:
        argument = given.pop(0)
        if argument == "--profile":
            own["device"] = "here"
        elif argument not in _FLAGS:
            rest.append(argument)
        elif given and not given[0].startswith("--"):
            own[_FLAGS[argument]] = given.pop(0)
        else:
            raise ConfigurationError(f"{argument} needs a value.")
    return own, rest


def _parts(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name in _FLAGS else [argument]


def _number(own: dict[str, str], name: str) -> int | None:
    if name not in own:
        return None
    if not own[name].isdigit() or int(own[name]) < 1:
        raise ConfigurationError(f"{name}={own[name]}: must be a whole number, 1 or more.")
    return int(own[name])


def _strategy(own: dict[str, str]) -> tuple[StrategyName, int]:
    number = _number(own, "number") or 1
    name = own.get("strategy", "multi_gpu" if number > 1 else "none")
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
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"--model_config {name}: not a model's configuration ({reason}). Give its config.json, or the folder."
        ) from error


def _show(report: Report, console: Console) -> None:
    result, device, strategy = report.result, report.device, report.strategy
    count = f"{strategy.processes} x " if strategy.processes > 1 else ""
    lines = [
        f"{count}{device.name} ({_size(device.memory)}), {strategy.name}; {device.source}.",
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
        memory.add_row(name, _size(size))
    memory.add_section()
    for name, size in result.memory.passing.items():
        memory.add_row(name, _size(size))
    memory.add_section()
    memory.add_row(f"most at one time ({result.memory.worst})", _size(result.memory.most))
    if result.needed > result.memory.most:
        memory.add_row("with driver and allocator", _size(result.needed))
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
        return [f"It fits: {_size(report.result.needed)} of {_size(report.device.memory)} ({share:.0%})."]
    lacking = report.result.needed - report.device.memory
    lines = [f"It does not fit: {_size(lacking)} too much. In this order:"]
    before = report.result.needed
    for change in report.changes:
        after = change.result.needed
        lines.append(f"  {change.flag}: saves {_size(before - after)}, then {_size(after)}. Price: {change.price}.")
        before = after
    if before > report.device.memory:
        lines.append("  Then still too much: more GPUs, a smaller model, or shorter lengths.")
    return lines


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
