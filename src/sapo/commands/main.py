"""The command `sapo`: finds the command, and answers every error in one line."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from sapo._version import __version__
from sapo.commands.catalog import COMMANDS
from sapo.commands.notices import held_notices, loading_libraries
from sapo.commands.parser import Command, Parsed, help_text, parse_command
from sapo.errors import ConfigurationError, RepeatedError, SapoError, brief, process_lost
from sapo.text.fitted import fitted, width_of
from sapo.text.interrupts import raise_swallowed

_INTRODUCTION = """\
sapo: Self-Augmented Preference Optimization (arXiv 2405.20830)

usage: sapo COMMAND [--flag value ...]
"""
_OTHER_NAMES = {
    **dict.fromkeys(("finetune", "fine-tune", "tune", "align", "run", "fit", "dpo", "orpo", "sapo", "spin"), "train"),
    **dict.fromkeys(("check", "chek", "validate", "inspect", "dataset"), "data check"),
    **dict.fromkeys(("eval", "test", "benchmark", "score"), "evaluate"),
    **dict.fromkeys(("infer", "inference", "talk", "ask", "play"), "chat"),
    **dict.fromkeys(("merge", "convert", "gguf", "ollama", "save"), "export"),
    **dict.fromkeys(("view", "show", "plot", "dashboard", "watch", "ui"), "report"),
    **dict.fromkeys(("diff",), "compare"),
    **dict.fromkeys(("memory", "plan"), "estimate"),
    **dict.fromkeys(("recipe", "presets", "list", "init"), "recipes"),
    **dict.fromkeys(("vllm", "vllm-serve"), "serve"),
    **dict.fromkeys(("example", "quickstart", "tutorial"), "demo"),
}
"""What other tools call a command, and what it is called here."""
_CLOSING = """
sapo COMMAND --help shows the flags of a command, --help NAME explains one.
sapo --version prints the version.
An error is one line with exit status 2; --debug adds the traceback.
"""


_AFTER_THE_FIRST = 2.0
"""Seconds that a process which reports nothing stays."""
_NOTICES = (
    ("DeepSpeed", "Setting accelerator to CPU"),
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    ("transformers.trainer_utils", "do not match the ones in the `trainer_state.json`"),
)
"""Loggers and what they report at every start on a machine without a GPU, used or not; and at every resume whose
`logging_steps` is a share of the run. What a resume may change, the run checks by itself."""


def _without(notice: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: notice not in record.getMessage()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    for name, notice in _NOTICES:
        logging.getLogger(name).addFilter(_without(notice))
    given = [argument for argument in given if argument != "--debug"]
    try:
        return _dispatched(given)
    except RepeatedError:
        if debug:
            traceback.print_exc()
        # A launcher ends the others as soon as one has ended: the first, which reports, before this one.
        time.sleep(_AFTER_THE_FIRST)
        return 2
    except SapoError as error:
        if debug:
            traceback.print_exc()
        _complain(f"{type(error).__name__}: {brief(error, 2000)}")
        return 2
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            _complain(f"{type(error).__name__}: {error}. Name a place that you may use, or change its permissions.")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            again = ", then --resume_from_checkpoint true" if given[:1] == ["train"] else ""
            _complain(f"{type(error).__name__}: {error}. Free some space{again}.")
        else:
            raise
        if debug:
            traceback.print_exc()
        return 2
    except RuntimeError as error:
        # torch's, by name: torch is not imported for the commands that do without it.
        lost = process_lost(error)
        if lost is None and type(error).__name__ != "OutOfMemoryError":
            raise
        if debug:
            traceback.print_exc()
        if lost is not None:
            _complain(f"{type(lost).__name__}: {lost}")
            return 2
        _complain(f"OutOfMemoryError: {_what_was_short(error)}. {_way_out_of_memory(error, given[0])}")
        return 2
    except KeyboardInterrupt:
        return interrupted()


def interrupted() -> int:
    """Say so, of several processes in the first; returns the exit status."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write("Interrupted.\n")
    return 130


def _dispatched(given: list[str]) -> int:
    try:
        return _dispatch(given)
    except Exception:
        raise_swallowed()
        raise


def _complain(line: str) -> None:
    sys.stderr.write(f"{fitted(line, width_of(sys.stderr))}\n")


def _what_was_short(error: RuntimeError) -> str:
    """The first sentences of CUDA's message: what was asked for, and what there is."""
    return brief(". ".join(str(error).split(". ")[:3])).rstrip(".")


def _way_out_of_memory(error: RuntimeError, command: str) -> str:
    generating = any(frame.name == "generate" for frame in traceback.extract_tb(error.__traceback__))
    match command:
        case "train" | "generate":
            lower = "--generation_batch_size" if generating else "--tokens_per_forward or --pairs_per_forward"
            again = "sapo estimate shows what each option saves; go on with --resume_from_checkpoint true."
            return f"Lower {lower}{'' if generating else ', or set --gradient_checkpointing true'}; {again}"
        case "evaluate":
            return "Lower --batch_size, or use --dtype bfloat16."
        case _:
            return "Free memory on the device, or choose another with --device."


def _dispatch(given: list[str]) -> int:
    for argument in given:
        if not is_text(argument):
            raise ConfigurationError(
                f"{argument!a}: not text in UTF-8, or not readable in this locale. Rename it, or set PYTHONUTF8=1."
            )
    match given:
        case [] | ["--help"] | ["-h"] | ["help"]:
            sys.stdout.write(fitted(overview(), width_of(sys.stdout)))
            return 0
        case ["--version"]:
            sys.stdout.write(f"sapo {__version__}\n")
            return 0
        case ["help", *name]:
            given = [*name, "--help"]
    command, rest = _find(given)
    if command is None:
        return 0
    text = help_text(command, rest)
    if text is not None:
        sys.stdout.write(text)
        return 0
    parsed = parse_command(command, rest)
    if command.takes_options:
        # What is wrong with the recipe, or missing, is said before a library is imported.
        parsed.values()
    return _run(command, parsed)


def is_text(argument: str) -> bool:
    """Whether all bytes of an argument could be read as text: libraries and files take no others."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def overview() -> str:
    """What `sapo --help` prints: every command, by what a person does with it."""
    lines, group = [_INTRODUCTION], ""
    for command in COMMANDS.values():
        if command.group != group:
            group = command.group
            lines.append(f"\n{group}:\n")
        lines.append(f"  sapo {command.name:<12} {command.summary}\n")
    return "".join([*lines, _CLOSING])


def _find(given: list[str]) -> tuple[Command | None, list[str]]:
    """The command that the first words name, and the words after them; none if its group's help was asked for.

    Raises:
        ConfigurationError: there is no such command.
    """
    for length in (2, 1):
        name = " ".join(given[:length])
        if len(given) >= length and name in COMMANDS:
            return COMMANDS[name], given[length:]
    members = [command for command in COMMANDS.values() if command.name.startswith(f"{given[0]} ")]
    if members and given[1:2] in ([], ["--help"], ["-h"]):
        for command in members:
            line = f"  sapo {command.name:<12} {command.summary}"
            sys.stdout.write(f"{fitted(line, width_of(sys.stdout))}\n")
        return None, []
    asked = " ".join(given[: 2 if members else 1])
    meant = _OTHER_NAMES.get(given[0].lstrip("-").lower())
    known = [*COMMANDS, *_OTHER_NAMES]
    close = [meant] if meant else difflib.get_close_matches(asked.lstrip("-").lower(), known, n=1, cutoff=0.6)
    close = [_OTHER_NAMES.get(name, name) for name in close]
    if not close and members:
        close = [members[0].name]
    nearest = f"; nearest: sapo {close[0]}" if close else ""
    raise ConfigurationError(f"unknown command {brief(asked, 80)}{nearest}. Run sapo --help.")


def _run(command: Command, given: Parsed) -> int:
    """Import the command's module and run it; returns the exit status."""
    match command.name:
        case "train":
            from sapo.commands.launch import launched

            if not launched(given):
                with loading_libraries():
                    from sapo.commands.train import run_train

                run_train(given)
        case "serve":
            from sapo.commands.serve import run_serve

            return run_serve(given)
        case "generate":
            with loading_libraries():
                from sapo.commands.generate import run_generate

            with held_notices() as notices:
                run_generate(given, notices.release)
        case "data check":
            from sapo.commands.data_check import run_data_check

            run_data_check(given)
        case "estimate":
            with loading_libraries():
                from sapo.commands.estimate import run_estimate

            with held_notices():
                run_estimate(given)
        case "evaluate":
            with loading_libraries():
                from sapo.commands.evaluate import run_evaluate

            with held_notices() as notices:
                run_evaluate(given, notices.release)
        case "recipes":
            from sapo.commands.recipes import run_recipes

            run_recipes(given.own.name)
        case "report":
            from sapo.commands.report import run_report

            run_report(given)
        case "compare":
            from sapo.commands.compare import run_compare

            run_compare(given)
        case "chat":
            with loading_libraries():
                from sapo.commands.chat import run_chat

            with held_notices() as notices:
                run_chat(given, notices.release)
        case "export":
            with loading_libraries():
                from sapo.commands.export import run_export

            with held_notices():
                run_export(given)
        case "completion":
            from sapo.commands.completion import script

            sys.stdout.write(script(given.own.shell, COMMANDS))
        case "demo":
            from sapo.commands.demo import run_demo_command

            run_demo_command(given)
        case _:
            raise AssertionError(command.name)
    return 0
