"""What made a file of a run: host, command line, commit, and versions of packages."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sapo._version import __version__

_PACKAGES = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy", "deepspeed"]
_SECRET = re.compile(r"token|secret|password|api_key", re.IGNORECASE)


def origin() -> dict[str, str]:
    """Host, command line and, in a git repository, its commit. Values of secret flags are left out."""
    found = {"host": platform.node(), "command": command_line(sys.argv)}
    commit = commit_of(Path.cwd())
    return found | ({"commit": commit} if commit else {})


def package_versions() -> dict[str, str]:
    """Versions of this package and of the libraries it trains with, by name; those not installed are left out."""
    return {"sapo-llm": __version__} | {name: found for name in _PACKAGES if (found := _installed(name))}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command_line(arguments: Sequence[str]) -> str:
    """The arguments of a process as one line for a shell, with the program's name alone and without secrets."""
    shown, hidden = [Path(arguments[0]).name if arguments else ""], False
    if shown[0] == "__main__.py":
        shown[0] = "sapo"
    for argument in arguments[1:]:
        flag, equals, _ = argument.partition("=")
        is_flag = argument.startswith("--")
        if hidden and not is_flag:
            argument = "..."
        elif is_flag and equals and _SECRET.search(flag):
            argument = f"{flag}=..."
        hidden = is_flag and not equals and bool(_SECRET.search(flag))
        shown.append(argument)
    return shlex.join(shown)


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out in the git repository around `folder`; None without one."""
    git = next((one / ".git" for one in (folder, *folder.parents) if (one / ".git").exists()), None)
    try:
        if git is None:
            return None
        if git.is_file():
            # A worktree or a submodule: the file names the folder.
            git = (git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        common = git / "commondir"
        roots = [git, (git / common.read_text(encoding="utf-8").strip()).resolve()] if common.is_file() else [git]
        for root in roots:
            if (root / name).is_file():
                return (root / name).read_text(encoding="utf-8").strip()
            packed = root / "packed-refs"
            for line in packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []:
                if line.endswith(f" {name}"):
                    return line.split()[0]
    except (OSError, UnicodeDecodeError):
        # A note in a report is no reason to refuse a run.
        return None
    return None
