"""From the cells' results to Markdown tables: means, 95 % intervals, paired tests."""

import json
from pathlib import Path

from methods import CENTRE, CONTINUED_SFT
from paired import holm, mean_and_half_width, sign_flip_p

Results = dict[str, dict[tuple[str, int], dict]]


def read(folder: Path, split: str) -> Results:
    """Results by arm and (base, seed), in order of the arms' first appearance."""
    found: Results = {}
    for file in sorted(folder.glob("*/*/seed-*/result.json")):
        base, arm, seed = file.parts[-4], file.parts[-3], int(file.parts[-2].split("-")[1])
        found.setdefault(arm, {})[base, seed] = json.loads(file.read_text()) | {"measured": None}
        found[arm][base, seed]["measured"] = found[arm][base, seed][split]
    return found


def label(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in name)


def tables(work: Path, task) -> str:
    """Everything that is done, as Markdown."""
    parts = []
    for base in sorted((work / "bases").glob("*.json")):
        measured = json.loads(base.read_text())
        parts.append(f"{base.stem} untrained: " + ", ".join(f"{n} {measured[n]:.3f}" for n in task.SHOWN))
    parts += ["", _trials(work, task), _versus(work / "compare", label(CONTINUED_SFT), task, "continued SFT")]
    parts += [_versus(work / "ablations", label(CENTRE), task, "the centre"), _curves(work / "compare", task)]
    parts += [_course(work / stage) for stage in ("compare", "ablations")]
    return "\n".join(part for part in parts if part is not None) + "\n"


def _trials(work: Path, task) -> str:
    lines = ["### Trials on the validation split", "", f"| trial | {' | '.join(task.SHOWN)} |"]
    lines.append("| --- " * (len(task.SHOWN) + 1) + "|")
    chosen = work / "chosen.json"
    best = json.loads(chosen.read_text())["chosen"] if chosen.exists() else {}
    names = {f"{label(n)}_{'_'.join(f'{k}={v}' for k, v in sorted(o.items()))}" for n, o in best.items()}
    for arm, cells in read(work / "tune", "validation").items():
        for result in cells.values():
            values = " | ".join(f"{result['measured'][name]:.3f}" for name in task.SHOWN)
            lines.append(f"| {arm.replace('_', ' ', 1)}{' (chosen)' if arm in names else ''} | {values} |")
    return "\n".join([*lines, ""])


def _versus(folder: Path, baseline: str, task, of: str) -> str | None:
    centre = {baseline: read(folder.parent / "compare", "test").get(baseline, {})}
    results = centre | read(folder, "test")
    if not centre[baseline] or len(results) == 1:
        return None
    lines = [f"### {folder.name}: means with 95 % intervals, and paired differences to {of}", ""]
    lines += [f"| arm | cells | CPU s | {' | '.join(task.SHOWN)} |", "| --- " * (len(task.SHOWN) + 3) + "|"]
    for arm, cells in results.items():
        values = []
        for name in task.SHOWN:
            mean, half = mean_and_half_width([r["measured"][name] for r in cells.values()])
            values.append(f"{mean:.3f} ± {half:.3f}")
        seconds = sum(r["cpu_seconds"] for r in cells.values()) / len(cells)
        lines.append(f"| {arm} | {len(cells)} | {seconds:.1f} | {' | '.join(values)} |")
    lines += ["", f"| difference to {of} | pairs | {' | '.join(task.SHOWN)} |", "| --- " * (len(task.SHOWN) + 2) + "|"]
    others = [arm for arm in results if arm != baseline]
    pairs = {arm: sorted(results[arm].keys() & results[baseline].keys()) for arm in others}
    p_values: dict[tuple[str, str], float] = {}
    for arm in others:
        for name in task.SHOWN:
            p_values[arm, name] = sign_flip_p(_differences(results, arm, baseline, pairs[arm], name))
    adjusted = {}
    for name in task.SHOWN:
        keys = [(arm, name) for arm in others]
        adjusted |= dict(zip(keys, holm([p_values[key] for key in keys]), strict=True))
    for arm in others:
        values = []
        for name in task.SHOWN:
            mean, half = mean_and_half_width(_differences(results, arm, baseline, pairs[arm], name))
            values.append(f"{mean:+.3f} ± {half:.3f} (p {p_values[arm, name]:.3f}, {adjusted[arm, name]:.3f})")
        lines.append(f"| {arm} | {len(pairs[arm])} | {' | '.join(values)} |")
    lines += ["", "In brackets: exact paired sign-flip test, and Holm's adjustment over the arms of a column.", ""]
    return "\n".join(lines)


def _differences(results: Results, arm: str, baseline: str, pairs, name: str) -> list[float]:
    return [results[arm][k]["measured"][name] - results[baseline][k]["measured"][name] for k in pairs]


def _curves(folder: Path, task) -> str:
    """Along the runs: each measure next to the likelihood at the same step."""
    shown = [name for name in task.SHOWN if name != "nll"]
    lines = ["### Validation split along the runs (seed 1), by likelihood", ""]
    lines += [f"| arm | step | nll | {' | '.join(shown)} |", "| --- " * (len(shown) + 3) + "|"]
    for arm, cells in read(folder, "test").items():
        steps: dict[int, list[dict]] = {}
        for result in cells.values():
            for point in result["validation_curve"]:
                steps.setdefault(point["step"], []).append(point)
        for step, points in sorted(steps.items()):
            means = {name: sum(point[name] for point in points) / len(points) for name in ("nll", *shown)}
            values = " | ".join(f"{means[name]:.3f}" for name in ("nll", *shown))
            lines.append(f"| {arm} | {step} | {values} |")
    return "\n".join([*lines, ""])


def _course(folder: Path) -> str:
    """What happened over the runs: first and last value of the trainer's own metrics."""
    lines = [f"### {folder.name}: first and last log line", ""]
    results = read(folder, "test")
    names = sorted({name for cells in results.values() for r in cells.values() for name in r["last"]})
    lines += [f"| arm | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for arm, cells in results.items():
        values = []
        for name in names:
            ends = [(r["first"].get(name), r["last"].get(name)) for r in cells.values()]
            both = [pair for pair in ends if None not in pair]
            means = [sum(pair[side] for pair in both) / len(both) for side in (0, 1)] if both else None
            values.append(f"{means[0]:.3g} to {means[1]:.3g}" if means else "-")
        lines.append(f"| {arm} | {' | '.join(values)} |")
    return "\n".join([*lines, ""])
