"""From the cells' results to Markdown tables: means, 95 % intervals, paired tests."""

import json
from pathlib import Path

from methods import CENTRE, CONTINUED_SFT
from paired import holm, matched, mean_and_half_width, sign_flip_p

WAYS = (0.5, 0.75, 1.0)

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
        measured = json.loads(base.read_text())["test"]
        shown = ", ".join(f"{name} {measured[name]:.3f}" for name in task.SHOWN if name in measured)
        parts.append(f"{base.stem} untrained: {shown}\n")
    parts += ["", _trials(work, task)]
    for chosen in sorted(work.glob("chosen*.json")):
        ending = chosen.stem.removeprefix("chosen")
        compare, ablations = work / f"compare{ending}", work / f"ablations{ending}"
        baseline, centre = (read(compare, "test").get(label(name), {}) for name in (CONTINUED_SFT, CENTRE))
        parts += [_versus(compare, label(CONTINUED_SFT), baseline, task, "continued SFT")]
        parts += [_versus(ablations, label(CENTRE), centre, task, "the centre"), _along(work, compare, task)]
        parts += [_course(compare), _course(ablations)]
    return "\n".join(part for part in parts if part is not None) + "\n"


def _trials(work: Path, task) -> str:
    shown = [name for name in task.SHOWN if name == "nll" or name.endswith(tuple(f"@{t:g}" for t in task.ALONG))]
    lines = ["### Trials on the validation split, means over base and seed, each run at its best step", ""]
    lines += [f"| trial | steps | {' | '.join(shown)} |", "| --- " * (len(shown) + 2) + "|"]
    names = set()
    for file in work.glob("chosen*.json"):
        best = json.loads(file.read_text())["chosen"]
        names |= {f"{label(n)}_{'_'.join(f'{k}={v}' for k, v in sorted(o.items()))}" for n, o in best.items()}
    for arm, cells in read(work / "tune", "validation").items():
        values = " | ".join(f"{_mean([r['measured'][name] for r in cells.values()]):.3f}" for name in shown)
        steps = ", ".join(str(result["stopped"]) for result in cells.values())
        lines.append(f"| {arm.replace('_', ' ', 1)}{' (chosen)' if arm in names else ''} | {steps} | {values} |")
    return "\n".join([*lines, ""])


def _versus(folder: Path, baseline: str, cells: dict, task, of: str) -> str | None:
    results = {baseline: cells} | read(folder, "test")
    if not cells or len(results) == 1:
        return None
    lines = [f"### {folder.name}: means with 95 % intervals, and paired differences to {of}", ""]
    lines += [f"| arm | cells | CPU s | step | {' | '.join(task.SHOWN)} |", "| --- " * (len(task.SHOWN) + 4) + "|"]
    for arm, cells in results.items():
        values = []
        for name in task.SHOWN:
            mean, half = mean_and_half_width([r["measured"][name] for r in cells.values()])
            values.append(f"{mean:.3f} ± {half:.3f}")
        seconds, step = (_mean([r[name] for r in cells.values()]) for name in ("cpu_seconds", "stopped"))
        lines.append(f"| {arm} | {len(cells)} | {seconds:.1f} | {step:.0f} | {' | '.join(values)} |")
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


def _along(work: Path, folder: Path, task) -> str:
    """Means along the runs, and differences to continued SFT where both have the same likelihood."""
    shown = [name for name in task.SHOWN if name.endswith(tuple(f"@{t:g}" for t in task.ALONG))]
    results = read(folder, "test")
    lines = ["### Validation split along the runs", "", f"| arm | step | nll | {' | '.join(shown)} |"]
    lines.append("| --- " * (len(shown) + 3) + "|")
    for arm, cells in results.items():
        steps: dict[int, list[dict]] = {}
        for result in cells.values():
            for point in result["validation_curve"]:
                steps.setdefault(point["step"], []).append(point)
        for step, points in sorted(steps.items()):
            values = " | ".join(f"{_mean([point[name] for point in points]):.3f}" for name in ("nll", *shown))
            lines.append(f"| {arm} | {step} | {values} |")
    lines += ["", "### Differences to continued SFT at equal likelihood, validation split", ""]
    lines += [f"| arm | way | pairs | {' | '.join(shown)} |", "| --- " * (len(shown) + 3) + "|"]
    bases = {f.stem: json.loads(f.read_text())["validation"] for f in (work / "bases").glob("*.json")}
    baseline = results.get(label(CONTINUED_SFT), {})
    for arm, cells in results.items():
        for way in WAYS if arm != label(CONTINUED_SFT) else ():
            found = []
            for key in sorted(cells.keys() & baseline.keys()):
                one, other = ([bases[key[0]], *r[key]["validation_curve"]] for r in (cells, baseline))
                found.append(matched(one, other, shown, way))
            pairs = [differences for differences in found if differences is not None]
            if len(pairs) > 1:
                values = (mean_and_half_width([pair[name] for pair in pairs]) for name in shown)
                cellsof = " | ".join(f"{mean:+.3f} ± {half:.3f}" for mean, half in values)
                lines.append(f"| {arm} | {way:g} | {len(pairs)} of {len(found)} | {cellsof} |")
    lines += [
        "",
        "Way: share of the way from the base's likelihood to the best that both runs of a pair reach; measures",
    ]
    lines += ["are interpolated between the points around it. Pairs in which a run never betters its base are out."]
    return "\n".join([*lines, ""])


def _course(folder: Path) -> str:
    """What happened over the runs: the trainer's own metrics at the start, half way, and at the end."""
    results = read(folder, "test")
    names = sorted({name for cells in results.values() for r in cells.values() for name in r["courses"][-1]})
    lines = [f"### {folder.name}: first log line, middle one, last", ""]
    lines += [f"| arm | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for arm, cells in results.items():
        values = []
        for name in names:
            courses = [[v for part in r["courses"] for _, v in part.get(name, ())] for r in cells.values()]
            courses = [course for course in courses if course]
            means = [_mean([c[int(place * (len(c) - 1))] for c in courses]) for place in (0, 0.5, 1)] if courses else []
            values.append(", ".join(f"{mean:.3g}" for mean in means) or "-")
        lines.append(f"| {arm} | {' | '.join(values)} |")
    return "\n".join([*lines, ""])


def _mean(values) -> float:
    return sum(values) / len(values)
