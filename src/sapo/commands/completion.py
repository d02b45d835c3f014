"""`sapo completion SHELL`: a script with which a shell completes commands, flags and values.

The script is made from the declarations of commands and options, so that it has what `--help-all` has.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from sapo.commands.parser import Command
from sapo.commands.recipes import shipped_names
from sapo.options import accepted

_BASH = """\
# Completion of sapo for bash: eval "$(sapo completion bash)"
_sapo() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=""
    [[ $command == data && $COMP_CWORD -gt 2 ]] && command="data check"
    case "$prev" in
{values}
    esac
    if [[ $COMP_CWORD -eq 1 ]]; then
        words={commands}
    elif [[ $command == data ]]; then
        words=check
    elif [[ $cur == -* || $prev == --help ]]; then
        case "$command" in
{flags}
        esac
        [[ $cur == -* ]] || words=${{words//--/}}
    fi
    local IFS=$' \\t\\n'
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    [[ $prev == --config || -z $words ]] && COMPREPLY+=($(compgen -f -- "$cur"))
}}
complete -o filenames -F _sapo sapo
"""
_ZSH = """\
# Completion of sapo for zsh: eval "$(sapo completion zsh)"
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""


def script(shell: str, commands: Mapping[str, Command]) -> str:
    """The script for `shell`: bash, zsh or fish."""
    if shell == "fish":
        return _fish(commands)
    values = "\n".join(
        f"        {'--config|recipes' if name == 'config' else f'--{name}'}) words={_words(known)} ;;"
        for name, known in _values(commands).items()
    )
    flags = "\n".join(
        f"            {shlex.quote(name)}) words={_words(_flags(one))} ;;" for name, one in commands.items()
    )
    firsts = dict.fromkeys(name.split()[0] for name in commands)
    return (_ZSH if shell == "zsh" else "") + _BASH.format(values=values, flags=flags, commands=_words(firsts))


def _words(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def _flags(command: Command) -> list[str]:
    own = [flag for action in command.parser._actions for flag in action.option_strings]
    more = [f"--{one.name}" for one in accepted()] if command.takes_options else []
    return [*own, *more, "--help", *(["--help-all"] if command.takes_options else [])]


def _values(commands: Mapping[str, Command]) -> dict[str, list[str]]:
    """What may follow a flag, where that is a list: choices, truth values, shipped recipes."""
    found = {"config": shipped_names()}
    for one in accepted():
        if one.choices:
            found[one.name] = list(one.choices)
        elif one.type in ("bool", "bool_or_auto"):
            found[one.name] = ["true", "false", *(["auto"] if one.type == "bool_or_auto" else [])]
    for command in commands.values():
        for name, action in command.flags.items():
            if action.choices and action.option_strings and name not in found:
                found[name] = [str(choice) for choice in action.choices]
    return found


def _fish(commands: Mapping[str, Command]) -> str:
    lines = ["# Completion of sapo for fish: sapo completion fish | source"]
    values = _values(commands)
    for name, command in commands.items():
        first, _, second = name.partition(" ")
        summary = command.summary.replace("'", "")
        lines.append(f"complete -c sapo -n __fish_use_subcommand -a {first} -d '{summary}'")
        seen = f"'__fish_seen_subcommand_from {first}'"
        if second:
            lines.append(f"complete -c sapo -n {seen} -a {second}")
        for flag in _flags(command):
            known = values.get(flag.lstrip("-"))
            listed = f" -x -a {_words(known)}" if known else ""
            lines.append(f"complete -c sapo -n {seen} -l {flag.lstrip('-')}{listed}")
    return "\n".join(lines) + "\n"
