"""`sapo train --accelerate_config NAME`: the same command again in one process a GPU, through accelerate's launcher."""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from sapo.commands.catalog import LAUNCHER
from sapo.commands.parser import Parsed
from sapo.errors import ANOTHER_PORT, ConfigurationError, TrainingError, brief, nearest, require

CONFIGS = Path(__file__).parent / "accelerate_configs"
"""The shipped configurations: multi_gpu, zero2, zero3, fsdp2."""

FLAG = "--accelerate_config"


def is_asked_for(own: Namespace) -> bool:
    """Whether `sapo train` is asked for several processes.

    Raises:
        ConfigurationError: it is one of several processes already, or a flag of the launcher has nothing to launch.
    """
    if own.accelerate_config is None:
        idle = [name for name in LAUNCHER if getattr(own, name) is not None]
        if idle:
            raise ConfigurationError(f"--{idle[0]} belongs to {FLAG}. Add {FLAG} multi_gpu, or leave it out.")
        return False
    if "LOCAL_RANK" in os.environ:
        raise ConfigurationError(f"{FLAG} starts the processes itself, and this is one of several. Leave it out.")
    return True


def launched(given: Parsed) -> bool:
    """Run `sapo train` in several processes, if it is asked for.

    Returns:
        Whether it was, and the run has ended.

    Raises:
        ConfigurationError: the options, the recipe or the configuration is wrong.
        TrainingError: a process failed.
    """
    if not is_asked_for(given.own):
        return False
    given.values()
    quiet = ["--quiet"] if given.own.quiet else []
    launch("train", launcher_flags(given.own), [*given.rest, *quiet])
    return True


def launcher_flags(own: Namespace) -> dict[str, str]:
    """`--accelerate_config` and the flags of the launcher that were given, with their values."""
    names = (FLAG.removeprefix("--"), *LAUNCHER)
    return {f"--{name}": getattr(own, name) for name in names if getattr(own, name) is not None}


def shipped_or_file(name: str) -> Path:
    """The file of a shipped configuration, or `name` itself if it is a file.

    Raises:
        ConfigurationError: neither.
    """
    shipped = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    file = shipped.get(name, Path(name))
    if not file.is_file():
        known = ", ".join(shipped)
        raise ConfigurationError(f"{FLAG} {name}: neither one of {known} nor a file{nearest(name, shipped)}.")
    return file


def config_file(name: str) -> Path:
    """`shipped_or_file`, if it can be run here.

    Raises:
        ConfigurationError: no such file, or DeepSpeed is asked for and not installed.
    """
    file = shipped_or_file(name)
    if "DEEPSPEED" in file.read_text(encoding="utf-8"):
        require(f"{FLAG} {name}", "deepspeed")
    return file


def launch(command: str, launcher: Mapping[str, str], own: Sequence[str]) -> None:
    """Run `sapo COMMAND` in several processes.

    Args:
        command: such as "train".
        launcher: from `launcher_flags`.
        own: the arguments of the command, without these flags.

    Raises:
        ConfigurationError: no such configuration, or no GPU: accelerate would then run one process and say nothing.
        TrainingError: a process failed; it has said why.
        KeyboardInterrupt: it was asked to end before its first step.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launcher = dict(launcher)
    file = config_file(launcher.pop(FLAG))
    if not torch.accelerator.is_available():
        raise ConfigurationError(
            f"{FLAG} needs a GPU and there is none here. Several processes on CPUs: torchrun --nproc_per_node N "
            f"-m sapo {command} ... --use_cpu --ddp_backend gloo."
        )
    machines = int(launcher.get("--num_machines", "1"))
    launcher.setdefault("--num_processes", str(machines * torch.accelerator.device_count()))
    flags = [part for pair in launcher.items() for part in pair]
    parsed = launch_command_parser().parse_args(["--config_file", str(file), *flags, "--module", "sapo", command, *own])
    # The launcher would give its processes half a minute and then kill them: too short to save a large model.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")
    try:
        with _stop_signals_passed_on() as passed_on:
            launch_command(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ended(rank, failure.exitcode, asked=bool(passed_on)) from error
    except ConnectionError as error:
        # accelerate, of several machines; on one it takes a port that is free.
        raise ConfigurationError(f"{brief(error)} {ANOTHER_PORT}") from error


def ended(process: int, status: int, *, asked: bool) -> BaseException:
    """What to raise for a process that failed.

    Args:
        process: its rank.
        status: its exit status, negative if a signal has ended it.
        asked: whether this process has passed a stop signal on. Before its first step a run has nothing to save.
    """
    if asked and status in (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT):
        return KeyboardInterrupt()
    if status >= 0:
        return TrainingError(f"process {process} ended with status {status}; its own message is above.")
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    memory = ", as when the main memory of the machine runs out" if -status == signal.SIGKILL else ""
    return TrainingError(
        f"process {process} was ended by {name}{memory}. Continue from the newest checkpoint with "
        "--resume_from_checkpoint auto."
    )


@contextmanager
def _stop_signals_passed_on() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM go to the processes, which end after their current step, with a checkpoint.

    Yields:
        The signals that were passed on.
    """
    own = psutil.Process()
    passed_on: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        for process in own.children():
            process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield passed_on
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
