"""Help texts: of a command, in groups, and of one option."""

from __future__ import annotations

import argparse
import copy
import shutil
import textwrap
from collections.abc import Sequence

from sapo.options import Option, accepted, sections
from sapo.options.values import wanted
from sapo.text.fitted import fitted

_LONGEST = 40
"""Characters of choices in the place of a value; a longer list stands in the text."""

_METAVARS = {
    "int": "N",
    "float": "X",
    "bool": "true|false",
    "bool_or_auto": "true|false|auto",
    "str": "TEXT",
    "str_or_false": "TEXT",
    "list": "TEXT",
    "numbers": "X",
    "mapping": "JSON",
    "mapping_or_file": "FILE",
    "records": "LIST",
}


def metavar(option: Option) -> str:
    """How the value is called in the help."""
    listed = "|".join(option.choices or ())
    if len(listed) > _LONGEST:
        return "NAME"
    return listed or _METAVARS[option.type]


def formatted(
    name: str,
    summary: str,
    example: str,
    own: argparse.ArgumentParser,
    shown: Sequence[Option],
    takes_options: bool,
) -> str:
    """The help of a command: own flags first, then options by section, and an example."""
    parser = argparse.ArgumentParser(
        prog=f"sapo {name}", usage=_usage(name, own, takes_options), add_help=False, formatter_class=_Formatter
    )
    parser.description = f"{summary[:1].upper()}{summary[1:]}."
    for group in own._action_groups:
        if group._group_actions:
            title = {"positional arguments": "Arguments", "options": "Flags"}.get(str(group.title), group.title)
            _copy(parser.add_argument_group(title), group._group_actions)
    for section, members in sections(shown).items():
        group = parser.add_argument_group(section)
        for one in members:
            group.add_argument(
                f"--{one.name}",
                metavar=metavar(one),
                nargs="?" if one.type in ("bool", "bool_or_auto") else None,
                help=f"{one.help}{_listed(one)}{_default(one.default_text)}".replace("%", "%%"),
            )
    lines = [f"Example:\n{fitted(f'  {example}', _width())}"]
    if takes_options and len(shown) < len(accepted()):
        lines.append(
            f"These are the most used options.\n"
            f"sapo {name} --help-all lists all {len(accepted())}, sapo {name} --help NAME explains one."
        )
    elif takes_options or any(action.option_strings for action in own._actions):
        lines.append(f"sapo {name} --help NAME explains one flag.")
    parser.epilog = "\n\n".join(lines)
    return fitted(parser.format_help(), _width())


def explained(option: Option) -> str:
    """All that is declared of one option, and the other options of its section."""
    lines = [f"--{option.name} {metavar(option)}    ({option.section})", ""]
    if option.status == "refused":
        lines += [f"Not supported: {option.reason}", f"Only its default passes: {option.default_text}."]
        return fitted("\n".join(lines), _width()) + "\n"
    lines += [option.help, "", f"Default: {option.default_text}", f"Value: {wanted(option)}"]
    lines += [f"Refused: {value}: {reason}" for value, reason in option.refuses.items()]
    if option.needs:
        lines.append(f"Needs: {option.needs}")
    if option.one_start:
        lines.append("Belongs to one start: not part of the saved recipe.")
    elif option.kind in ("own", "inherited"):
        changes = "may change" if option.resume == "free" else "must stay as it was"
        lines.append(f"On resume: {changes}")
    origin = {"own": "SAPO", "inherited": "transformers.TrainingArguments", "model": "trl", "data": "trl or SAPO"}
    lines.append(f"Declared by: {origin[option.kind]}")
    if option.since is not None:
        lines.append(f"Requires: transformers {option.since} or newer")
    neighbours = [one.name for one in accepted() if one.section == option.section and one.name != option.name]
    lines += ["", "In the same section:", "  " + " ".join(f"--{name}" for name in neighbours)]
    return fitted("\n".join(lines), _width()) + "\n"


def explained_flag(command: str, name: str, action: argparse.Action) -> str:
    """What one of a command's own flags does."""
    flag = ", ".join(action.option_strings) or name.upper()
    text = (action.help or "").replace("%%", "%")
    default = "" if action.default in (None, False, argparse.SUPPRESS) else f"\nDefault: {action.default}"
    choices = f"\nValue: one of {', '.join(map(str, action.choices))}" if action.choices else ""
    shown = f"{flag}    (sapo {command})\n\n{text[:1].upper()}{text[1:]}.{default}{choices}\n"
    return fitted(shown, _width())


def _default(text: str) -> str:
    return "" if text == "unset" else f" (default: {text})"


def _listed(option: Option) -> str:
    return f" One of {', '.join(option.choices)}." if option.choices and metavar(option) == "NAME" else ""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=_width())


def _usage(name: str, own: argparse.ArgumentParser, takes_options: bool) -> str:
    words = [f"sapo {name}"]
    for action in own._actions:
        if action.required and action.option_strings:
            words.append(f"{action.option_strings[0]} {action.metavar or action.dest.upper()}")
    if takes_options:
        words.append("[--config RECIPE] [--option value ...]")
    for action in own._actions:
        if not action.option_strings:
            called = str(action.metavar or action.dest.upper())
            words.append(f"[{called}]" if action.nargs == "?" else called)
    for action in own._actions:
        if not action.option_strings and action.nargs == "+":
            words.append(f"[{action.metavar} ...]")
    if not takes_options and any(action.option_strings for action in own._actions):
        words.append("[--flag value ...]")
    return textwrap.fill(" ".join(words), max(_width() - len("usage: "), 20), subsequent_indent=" " * 9)


def _copy(group: argparse._ArgumentGroup, actions: Sequence[argparse.Action]) -> None:
    for action in actions:
        shown = copy.copy(action)
        if action.default not in (None, False, argparse.SUPPRESS) and "default" not in str(action.help):
            shown.help = f"{action.help}{_default(str(action.default))}"
        group._add_action(shown)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100) - 1
