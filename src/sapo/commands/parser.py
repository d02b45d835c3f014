"""The parser of every command: its own flags, the options of a run, help, and errors that name the nearest thing.

Nothing here imports torch or transformers, so that help and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NoReturn

from sapo.commands.help import explained, explained_flag, formatted, metavar
from sapo.commands.recipe_files import read_recipe
from sapo.commands.recipes import shipped_names
from sapo.errors import ConfigurationError, brief
from sapo.options import Option, accepted, option, options
from sapo.options.aliases import counterpart, unknown
from sapo.options.values import check, convert

HELP_FLAGS = ("--help", "-h", "--help_all")


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are a `ConfigurationError` of one line."""

    example: str = ""
    """A command line that works, for the end of an error."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting.

        Raises:
            ConfigurationError: always.
        """
        required = "the following arguments are required: "
        if message.startswith(required):
            raise ConfigurationError(_missing(message.removeprefix(required).split(", "), self.example))
        message = message.removeprefix("argument ")
        for lacking in (": expected one argument", ": expected at least one argument"):
            if message.endswith(lacking):
                raise ConfigurationError(f"{message.removesuffix(lacking)} needs a value.")
        left = "unrecognized arguments: "
        if message.startswith(left):
            words = message.removeprefix(left)
            raise ConfigurationError(f"unexpected argument {brief(words, 80)}. Example: {self.example}")
        number = re.fullmatch(r"(\S+): invalid (int|float) value: '(.*)'", message)
        if number is not None:
            kind = "a whole number" if number[2] == "int" else "a number"
            raise ConfigurationError(f"{number[1]}: {brief(number[3], 80)} is not valid; must be {kind}.")
        choice = re.fullmatch(r"(\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
        if choice is not None:
            listed = choice[3].replace("'", "")
            raise ConfigurationError(f"{choice[1]} {brief(choice[2], 80)}: must be one of {listed}.")
        raise ConfigurationError(message[:1].lower() + message[1:].rstrip(".") + ".")


@dataclass(frozen=True)
class Command:
    """One command: what it is for, its own flags, and whether it takes the options of a run.

    Attributes:
        name: as typed after `sapo`, such as "data check".
        group: heading under which `sapo --help` lists it.
        summary: one line.
        example: a command line that works once the names in it are replaced.
        add_flags: declares its own flags and positional arguments.
        takes_options: whether `sapo train`'s options and `--config` belong to it.
        shown: options in its short help; None for the common ones.
        leading: option that a first argument without dashes stands for, or None.
        passes_on: whether what follows `--` is handed to another program.
        needs: options and own flags that must be given, as a flag or in the recipe; `a|b`: one of the two.
    """

    name: str
    group: str
    summary: str
    example: str
    add_flags: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    takes_options: bool = False
    shown: tuple[str, ...] | None = None
    leading: str | None = None
    passes_on: bool = False
    needs: tuple[str, ...] = ()

    @cached_property
    def parser(self) -> OneLineParser:
        """The parser of its own flags."""
        parser = OneLineParser(prog=f"sapo {self.name}", allow_abbrev=False, add_help=False)
        parser.example = self.example
        if self.takes_options:
            parser.add_argument(
                "--config",
                metavar="RECIPE",
                help="YAML file with options, or the name of a shipped recipe; flags override it",
            )
        self.add_flags(parser)
        return parser

    @cached_property
    def flags(self) -> dict[str, argparse.Action]:
        """Its own flags and positional arguments, each by its name without dashes."""
        actions = self.parser._actions
        return {(action.option_strings or [action.dest])[0].lstrip("-"): action for action in actions}


@dataclass(frozen=True)
class Parsed:
    """A command line, understood.

    Attributes:
        own: values of the command's own flags.
        given: options of the run that were typed, by name.
        rest: the arguments that stand for `given` and `--config`, as a command line for `sapo train`.
        extra: what followed `--`.
        command: that was typed.
    """

    own: argparse.Namespace
    given: Mapping[str, Any] = field(default_factory=dict)
    rest: Sequence[str] = ()
    extra: Sequence[str] = ()
    command: Command | None = None

    def values(self, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Options of the run: `defaults`, over them the recipe's, over these the typed ones.

        Raises:
            ConfigurationError: the recipe cannot be read, or has an unknown option or a wrong value; or something that
                the command needs is missing.
        """
        values = {**(defaults or {}), **self._recipe, **self.given}
        if self.command is not None:
            self._check_needs(self.command, values)
        return values

    def chosen(self) -> dict[str, Any]:
        """Options that the user set: typed, or in a recipe that is not a shipped one."""
        own = self.own.config is not None and self.own.config not in shipped_names()
        return {**(self._recipe if own else {}), **self.given}

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return read_recipe(self.own.config) if self.own.config is not None else {}

    def _check_needs(self, command: Command, values: Mapping[str, Any]) -> None:
        """Name everything that is missing at once.

        Raises:
            ConfigurationError: something is.
        """
        given = {**vars(self.own), **values}
        if given.get("datasets"):
            given["dataset_name"] = "datasets"
        missing = [
            f"--{need}" for need in command.needs if all(given.get(name) in (None, "") for name in need.split("|"))
        ]
        if missing:
            raise ConfigurationError(_missing([need.replace("|", " or --") for need in missing], command.example))


def parse_command(command: Command, arguments: Sequence[str]) -> Parsed:
    """Parse the arguments of a command.

    Raises:
        ConfigurationError: an unknown flag, with what it is called here or the nearest; a missing or wrong value.
    """
    typed, extra = _split_extra(list(arguments)) if command.passes_on else (list(arguments), [])
    if command.leading is not None and typed and not typed[0].startswith("-"):
        typed = [f"--{command.leading}", *typed]
    known = {flag for action in command.parser._actions for flag in action.option_strings}
    if command.takes_options:
        run_parser = _run_parser(command.example)
        known |= set(run_parser._option_string_actions)
    typed = _normalized(typed, known, command)
    if not command.takes_options:
        return Parsed(command.parser.parse_args(typed), extra=extra, command=command)
    own, rest = command.parser.parse_known_args(typed)
    namespace = vars(run_parser.parse_args(rest))
    given = {name: _flattened(name, value) for name, value in namespace.items()}
    for name, value in given.items():
        check(_declared(name), value)
    config = [] if own.config is None else ["--config", own.config]
    return Parsed(own, given, [*config, *rest], extra, command)


def help_text(command: Command, arguments: Sequence[str]) -> str | None:
    """What `--help`, `--help_all` or `--help NAME` among the arguments shows; None if none of them is there.

    Raises:
        ConfigurationError: there is nothing of this name.
    """
    asked = [place for place, word in enumerate(arguments) if word.replace("-all", "_all") in HELP_FLAGS]
    if not asked or "--" in arguments[: asked[0]]:
        return None
    everything = arguments[asked[0]].replace("-all", "_all") == "--help_all"
    about = arguments[asked[0] + 1 : asked[0] + 2]
    if about and not everything:
        name = about[0].lstrip("-").replace("-", "_")
        if name in command.flags:
            return explained_flag(command.name, name, command.flags[name])
        declared = option(name) if command.takes_options else None
        if declared is None and command.takes_options and (here := counterpart(name)) is not None:
            return f"{name} is called {here.name} here.\n\n{explained(here)}"
        if declared is None:
            raise ConfigurationError(unknown(name, command.flags, options=command.takes_options))
        return explained(declared)
    shown: list[Option] = []
    if command.takes_options:
        names = command.shown
        shown = [one for one in accepted() if everything or (one.common if names is None else one.name in names)]
    return formatted(command.name, command.summary, command.example, command.parser, shown, command.takes_options)


def _missing(names: Sequence[str], example: str) -> str:
    *first, last = names
    named = f"{', '.join(first)} and {last} are" if first else f"{last} is"
    return f"{named} missing. Example: {example}"


def _split_extra(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def _normalized(arguments: Sequence[str], known: set[str], command: Command) -> list[str]:
    """`--a-b=c` as `--a_b`, `c`; an unknown flag is refused."""
    found = []
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            found.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        flag = flag if flag in known else "--" + flag[2:].replace("-", "_")
        if flag not in known:
            name = argument.partition("=")[0][2:]
            raise ConfigurationError(unknown(name, command.flags, flag=True, options=command.takes_options))
        found += [flag, value] if equals else [flag]
    return found


def _run_parser(example: str) -> OneLineParser:
    """A parser of all options, refused ones included; it returns what was typed and no defaults."""
    parser = OneLineParser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    parser.example = example
    for one in options():
        more: dict[str, Any] = {"type": partial(_typed, one)}
        if one.type in ("bool", "bool_or_auto"):
            more |= {"nargs": "?", "const": True}
        if one.type in ("list", "numbers"):
            more |= {"nargs": "+"} | ({"action": "append"} if one.repeatable else {})
        parser.add_argument(f"--{one.name}", metavar=metavar(one), **more)
        if one.type == "bool_or_auto" or (one.type == "bool" and one.default is True):
            parser.add_argument(f"--no_{one.name}", dest=one.name, action="store_const", const=False)
    return parser


def _typed(one: Option, text: str) -> Any:
    if one.type == "records":
        raise argparse.ArgumentTypeError("is a list: give it in a recipe")
    if one.type == "list":
        return text
    try:
        value = convert(one, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    # Of several values argparse makes the list.
    return value[0] if one.type == "numbers" and value is not None else value


def _flattened(name: str, value: Any) -> Any:
    declared = _declared(name)
    if declared.type == "numbers" and value == [None]:
        return None
    return [text for part in value for text in part] if declared.repeatable else value


def _declared(name: str) -> Option:
    found = option(name)
    assert found is not None, name
    return found


def whole(low: int = 1) -> Callable[[str], int]:
    """Type of a flag: a whole number, `low` or more."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is not valid; must be a whole number, {low} or more")
        return value

    return read
