"""`sapo recipes`: the recipes that the package ships, and where `--config NAME` finds one."""

from __future__ import annotations

import difflib
import os
import re
import sys
import textwrap
from pathlib import Path

from sapo.errors import ConfigurationError, brief
from sapo.text.fitted import width_of

FOLDER = Path(__file__).parents[1] / "recipes"
CLUSTER = FOLDER / "cluster"
"""What starts a run on many machines: not recipes of options."""
_MACHINE = re.compile(r"^# Machine: (.+)$", re.MULTILINE)


def run_recipes(name: str | None) -> None:
    """`sapo recipes [NAME]`: list the shipped recipes, or print one; or a file for a cluster, `cluster/sky.yaml`.

    Raises:
        ConfigurationError: no such recipe.
    """
    if name is None:
        sys.stdout.write(_listing(width_of(sys.stdout)))
    elif name in (files := _other_files()):
        sys.stdout.write(files[name].read_text(encoding="utf-8"))
    else:
        width, text = width_of(sys.stdout), find_recipe(name).read_text(encoding="utf-8")
        sys.stdout.write(text if width is None else "".join(f"{_fitted(line, width)}\n" for line in text.splitlines()))


def find_recipe(name: str) -> Path:
    """The file that `--config NAME` means.

    Args:
        name: a file; or, where no such file exists, a shipped recipe: `guarded-dpo`, `presets/spin`, `spin`. The paths
            that a checkout of version 0.1 had (`recipes/guarded-dpo.yaml`, `presets/spin.yaml`) work everywhere.

    Raises:
        ConfigurationError: neither a file nor a shipped recipe.
    """
    file = Path(name)
    # os.path says no where Path raises: a name that is too long or holds a zero byte.
    if os.path.exists(name) and not os.path.isdir(name):
        return file
    shipped = _shipped()
    wanted = name.removeprefix("recipes/")
    # A bare `spin.yaml` is somebody's own file that is missing, not ours.
    if "/" in name:
        wanted = wanted.removesuffix(".yaml")
    short = {key.removeprefix("presets/"): key for key in shipped}
    found = shipped.get(wanted) or shipped.get(short.get(name, ""))
    if found is not None:
        return found
    if os.path.isdir(name):
        within = sorted(file.glob("*.yaml"))
        example = next((path for path in within if path.name == "recipe.yaml"), within[0] if within else None)
        advice = "Use a recipe file" if example is None else f"Use a file, such as {example}"
        raise ConfigurationError(f"{brief(name, 80)}: is a folder. {advice}.")
    folder = file.parent if os.path.isdir(file.parent) else Path()
    # By their stems: all files here end in .yaml, which alone would make two names look alike.
    stems = {str(path.with_suffix("")): str(path) for path in folder.glob("*.yaml")}
    known = [*shipped, *short, *_other_files(), *stems]
    matches = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=3, cutoff=0.7)
    nearest = dict.fromkeys(stems.get(match) or short.get(match, match) for match in matches)
    close = f"; nearest: {', '.join(nearest)}" if nearest else ""
    raise ConfigurationError(
        f"{brief(name, 80)}: no such file, and no shipped recipe{close}. Run sapo recipes for the list."
    )


def _fitted(line: str, width: int) -> str:
    """A line of a recipe whose comment goes on in lines of comment below."""
    place = line.find("# ")
    if place < 0 or len(line) <= width:
        return line
    further = f"{' ' * place}# " if place <= width // 2 else "#   "
    return textwrap.fill(line, width, subsequent_indent=further, break_long_words=False, break_on_hyphens=False)


def _other_files() -> dict[str, Path]:
    """Job files for clusters and chat templates, each by its path in the folder of recipes; the first by name too."""
    cluster, templates = sorted(CLUSTER.iterdir()), sorted((FOLDER / "templates").glob("*.jinja"))
    paths = {f"{file.parent.name}/{file.name}": file for file in [*cluster, *templates]}
    return {file.name: file for file in cluster} | paths


def _shipped() -> dict[str, Path]:
    """Each shipped recipe by its name: its path in the folder, without the suffix."""
    files = [*sorted(FOLDER.glob("*.yaml")), *sorted((FOLDER / "presets").glob("*.yaml"))]
    return {file.relative_to(FOLDER).with_suffix("").as_posix(): file for file in files}


def shipped_names() -> list[str]:
    """Names that `--config` knows."""
    return list(_shipped())


def _listing(width: int | None) -> str:
    """A line for each recipe: name, machine, description; on a terminal that is too narrow, folded."""
    rows = []
    for name, file in _shipped().items():
        text = file.read_text(encoding="utf-8")
        machine = _MACHINE.search(text)
        assert machine is not None, file
        rows.append((name, machine[1], text.splitlines()[0].removeprefix("# ")))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    if width is None or sum(widths) + 4 + max(len(text) for _, _, text in rows) <= width:
        return "".join(f"{name:<{widths[0]}}  {machine:<{widths[1]}}  {text}\n" for name, machine, text in rows)
    folded = [textwrap.indent(textwrap.fill(text, width - 5, break_on_hyphens=False), "    ") for _, _, text in rows]
    return "".join(f"{name}  ({machine})\n{text}\n" for (name, machine, _), text in zip(rows, folded, strict=True))
