"""Laws of the study in `benchmarks/quality`: its statistics, its splits, its methods."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest

from sapo.commands.arguments import parse
from sapo.runs.reading import Run

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_sign_flips_count_every_assignment():
    from paired import sign_flip_p

    assert sign_flip_p([1.0] * 5) == 2 / 32
    assert sign_flip_p([1.0, -1.0]) == 1.0
    values = [0.3, -0.1, 0.4, 0.2, 0.05, -0.02]
    flips = [sum(s * v for s, v in zip(signs, values, strict=True)) for signs in itertools.product((1, -1), repeat=6)]
    assert sign_flip_p(values) == sum(abs(flip) >= sum(values) - 1e-9 for flip in flips) / 64


def test_many_differences_are_sampled_with_a_fixed_seed():
    from paired import sign_flip_p

    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(30)]
    assert sign_flip_p(values) == sign_flip_p(values) > 0.01
    assert sign_flip_p([value + 3 for value in values]) < 0.001


def test_intervals_cover_the_mean_as_often_as_they_say():
    from paired import mean_and_half_width

    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        mean, half = mean_and_half_width([rng.gauss(1, 2) for _ in range(5)])
        covered += abs(mean - 1) <= half
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_holm_never_says_less_than_the_test_and_keeps_the_order():
    from paired import holm

    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_splits_of_the_built_in_tasks_share_no_prompt_with_one_another_nor_with_training():
    import toy

    from sapo.demo.tasks import TRAIN_ROWS, heldout_rows, prompt_of

    prompts = {name: {example[0] for example in toy.split(name)["examples"]} for name in ("validation", "test")}
    assert len(prompts["validation"]) == toy.ROWS["validation"]
    assert not prompts["validation"] & prompts["test"]
    tokenizer = toy.AutoTokenizer.from_pretrained(toy.MODEL_FOLDER)
    for rows in (TRAIN_ROWS, heldout_rows(1000)):
        others = [[{"role": "user", "content": prompt_of(row)}] for row in rows]
        ids = tokenizer.apply_chat_template(others, add_generation_prompt=True, return_dict=False)
        assert not {tuple(prompt) for prompt in ids} & (prompts["validation"] | prompts["test"])


def test_all_methods_have_equal_budgets_and_recipes_that_load(tmp_path):
    import text
    from methods import ABLATIONS, methods

    mild = (("beta", "0.01"),)
    for rates, weights, betas in (("1", "2", "3", "4"), ("1", "3"), ("0.1", "0.5")), (("1", "2"), ("1",), ("0.1",)):
        arms = methods(rates, weights, betas, mild, {})
        assert len({len(method.trials) for method in arms.values() if method.like is None}) == 1
        more = {name: {"seed": "1"} for name, method in arms.items() if method.like is None}
        both = (arms, methods(rates, weights, betas, mild, more), methods(rates, weights, betas, mild, text.MORE))
        assert len({len(method.trials) for arms in both for method in arms.values() if method.like is None}) == 2
        for method in arms.values():
            assert method.like is None or not method.trials
    for name, method in [*arms.items(), *ABLATIONS.items()]:
        flags = [part for option, value in method.flags for part in (f"--{option}", value)]
        run = parse(["--config", str(method.recipe()), *flags, "--report_to", "none"], "sapo train")
        assert (run.config.num_rounds or 1) == method.iterations, name


def test_a_trial_shows_in_the_table_with_the_others(tmp_path):
    import json

    import toy
    from tables import tables

    for arm, level in (("continued-SFT", 0.8), ("SAPO-ORPO", 0.7)):
        for seed in range(5):
            folder = tmp_path / "compare" / "base-0" / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            measured = dict.fromkeys(toy.SHOWN, level + 0.01 * seed)
            way = dict.fromkeys(toy.SHOWN, level) | {"step": 20, "nll": 0.1}
            result = {
                "test": measured, "validation_curve": [way], "stopped": 20, "cpu_seconds": 2.0, "pairs": [],
                "courses": [{"loss": [[5, 2.0], [10, 1.5], [15, 1.0]]}],
            }  # fmt: skip
            (folder / "result.json").write_text(json.dumps(result))
    (tmp_path / "chosen.json").write_text(json.dumps({"chosen": {}}))
    (tmp_path / "bases").mkdir()
    untrained = dict.fromkeys(toy.SHOWN, 0.5)
    (tmp_path / "bases" / "base-0.json").write_text(json.dumps({"validation": untrained, "test": untrained}))
    text = tables(tmp_path, toy)
    assert "base-0 untrained: right@0 0.500" in text
    assert "| SAPO-ORPO | 5 | 2.0 | 20 | 0.720 ± 0.020" in text
    assert "| SAPO-ORPO | 1 | 5 of 5 | -0.100 ± 0.000" in text
    assert "| SAPO-ORPO | 2, 1.5, 1 |" in text
    assert "| SAPO-ORPO | 5 | -0.100 ± 0.000 (p 0.062, 0.062)" in text


def test_runs_that_depend_on_likelihood_alone_do_not_differ_at_equal_likelihood():
    from paired import matched

    def points(*nlls):
        return [{"nll": nll, "right": 1 - nll} for nll in nlls]

    slow, fast = points(1.0, 0.9, 0.7, 0.6), points(1.0, 0.5, 0.4, 0.45)
    for way in (0.2, 0.5, 1.0):
        assert matched(slow, fast, ["right"], way)["right"] == pytest.approx(0)
    better = [point | {"right": point["right"] + 0.25 * (1 - point["nll"])} for point in fast]
    assert matched(better, slow, ["right"], 0.5)["right"] == pytest.approx(0.25 * 0.2)
    assert matched(slow, points(1.0, 1.1, 1.2), ["right"], 0.5) is None


def test_a_cell_gives_the_step_that_is_best_on_validation_and_refuses_other_settings(tmp_path, monkeypatch):
    import cells
    import toy
    from methods import methods

    levels = {0: 0.2, 1: 0.7, 2: 0.6}
    method = methods(toy.RATES, toy.WEIGHTS, toy.BETAS, toy.MILD, toy.MORE)["SAPO-ORPO"]
    cell = cells.Cell(tmp_path / "cell", toy, toy.MODEL_FOLDER, tmp_path, method, {"beta": "0.1"}, 1, 3)

    row = {"step": 3, "loss": 1.0, "tokens": 10, "time/step": 1.0, "time/cpu": 1.0, "memory/peak_mb": 1.0}
    run = Run(tmp_path, [row], pairs=[], config={}, recipe={}, facts={}, round={})

    def measure(folder, *, right, temperatures=(), room=0):
        place = int(folder.name)
        return {"nll": -place, "right@0": levels[place], "split": right}

    monkeypatch.setattr(cells, "main", lambda command: 0)
    monkeypatch.setattr(cells, "read_run", lambda folder: run)
    monkeypatch.setattr(cells, "measure", measure)
    monkeypatch.setattr(cells.Cell, "_policies", lambda self: {place: tmp_path / str(place) for place in levels})
    found = cell.run({"right": "validation"}, {"right": "test"})
    assert found["stopped"] == 1
    assert found["test"] == {"nll": -1, "right@0": 0.7, "split": "test", "nll, own stop": -2}
    assert cell.run({"right": "validation"}, None) == json.loads(json.dumps(found))
    with pytest.raises(SystemExit, match="other settings"):
        dataclasses.replace(cell, options={"beta": "0.5"}).run({"right": "validation"}, None)
