"""Laws of the study in `benchmarks/quality`: its statistics, its splits, its methods."""

import itertools
import random
from pathlib import Path

import pytest

from sapo.arguments import parse

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
    from methods import ABLATIONS, methods

    for arms in (methods(("1", "2", "3", "4"), ("1", "3"), ("0.1", "0.5")), methods(("1", "2"), ("1",), ("0.1",))):
        assert len({len(method.trials) for method in arms.values() if method.like is None}) == 1
        for method in arms.values():
            assert method.like is None or not method.trials
    for name, method in [*arms.items(), *ABLATIONS.items()]:
        flags = [part for option, value in method.flags for part in (f"--{option}", value)]
        run = parse(["--config", str(method.recipe()), *flags, "--report_to", "none"], "sapo train")
        assert (run.config.num_iterations or 1) == method.iterations, name


def test_a_trial_shows_in_the_table_with_the_others(tmp_path):
    import json

    import toy
    from tables import tables

    for arm, level in (("continued-SFT", 0.8), ("SAPO-ORPO", 0.7)):
        for seed in range(5):
            folder = tmp_path / "compare" / "base-0" / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            measured = dict.fromkeys(toy.SHOWN, level + 0.01 * seed)
            result = {"test": measured, "cpu_seconds": 2.0, "first": {}, "last": {}, "validation_curve": []}
            (folder / "result.json").write_text(json.dumps(result))
    text = tables(tmp_path, toy)
    assert "| SAPO-ORPO | 5 | 2.0 | 0.720 ± 0.020" in text
    assert "| SAPO-ORPO | 5 | -0.100 ± 0.000 (p 0.062, 0.062)" in text
