"""Laws of hostile recipes and flags: each is refused in one line, or gives options that are in range."""

import dataclasses
import math
import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.commands.arguments import parse
from sapo.commands.recipes import FOLDER
from sapo.errors import SapoError
from sapo.options import options
from tests.faults.mutations import damaged, mutated
from tests.faults.trials import check_one_line, trials

RECIPES = sorted(FOLDER.glob("*.yaml"))
VALUES = [None, True, False, 0, -1, 0.5, 1e308, float("nan"), float("-inf"), 2**70, "", "none", "\x1b[2J", "!!python/x"]
VALUES += [[], [1], {}, {"a": 1}, "../../etc", "1e-5", "auto", "'", "{", "--beta"]


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch):
    monkeypatch.setattr("sapo.config._accelerator_has_bf16", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@settings(max_examples=trials(40, 500), deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**63))
def test_a_mutated_recipe_is_refused_in_one_line_or_in_range(tmp_path_factory, seed):
    rng = random.Random(seed)
    recipe = yaml.safe_load(rng.choice(RECIPES).read_text()) | {"output_dir": "out", "report_to": "none"}
    for _ in range(rng.randint(1, 3)):
        recipe = mutated(recipe, rng, VALUES)
    content = yaml.safe_dump(recipe).encode()
    if rng.random() < 0.3:
        content = damaged(content, rng)
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_bytes(content)
    refused_or_in_range(["--config", str(file)])


@settings(max_examples=trials(40, 250), deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**63))
def test_mutated_flags_are_refused_in_one_line_or_in_range(seed):
    rng = random.Random(seed)
    names = [one.name for one in options()]
    flags = ["--use_cpu", "--report_to", "none", "--output_dir", "out"]
    for _ in range(rng.randint(1, 3)):
        flags += [f"--{rng.choice(names)}", str(rng.choice(VALUES))]
    refused_or_in_range(flags)


def refused_or_in_range(arguments):
    try:
        run = parse(arguments, "sapo train")
    except SapoError as error:
        check_one_line(error)
        return
    for one in options():
        value = getattr(run.config, one.name, None)
        if value is not None and one.low is not None:
            assert one.low <= value <= (math.inf if one.high is None else one.high), one.name
    for field in dataclasses.fields(run.config):
        value = getattr(run.config, field.name)
        assert not isinstance(value, float) or math.isfinite(value), field.name


@pytest.mark.parametrize(
    "content", ["!!python/object/apply:os.system ['touch owned']", "a: &a [*a, *a]\n", "x" * 10**6]
)
def test_yaml_that_runs_or_swells_is_refused(content, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(SapoError) as error:
        parse(["--config", str(file)], "sapo train")
    assert "\n" not in str(error.value)
