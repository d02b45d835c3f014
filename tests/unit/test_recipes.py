from pathlib import Path

import pytest

from sapo.arguments import as_recipe, parse

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch):
    monkeypatch.setattr("sapo.config._accelerator_has_bf16", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads(recipe, tmp_path):
    run = parse(["--config", str(recipe), "--output_dir", str(tmp_path), "--report_to", "none"], "sapo train")
    assert run.config.output_dir == str(tmp_path)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_line_of_a_recipe_is_commented(recipe):
    assert all("#" in line for line in recipe.read_text().splitlines())


@pytest.mark.parametrize("name", ["llama3-8b-dpo", "mistral-7b-dpo"])
def test_published_dpo_recipes_hold_the_published_settings(name):
    config = parse(["--config", f"{RECIPES[0].parent / name}.yaml", "--report_to", "none"], "sapo train").config
    assert (config.beta, config.learning_rate, config.lr_scheduler_type.value) == (0.1, 5e-7, "linear")
    assert (config.reference, config.reference_sync_steps) == ("opponent_copy", 108)
    assert config.optim.value == "rmsprop"
    _check_shared(config)


@pytest.mark.parametrize("name", ["llama3-8b-orpo", "mistral-7b-orpo"])
def test_published_orpo_recipes_hold_the_published_settings(name):
    config = parse(["--config", f"{RECIPES[0].parent / name}.yaml", "--report_to", "none"], "sapo train").config
    assert (config.beta, config.learning_rate, config.warmup_steps) == (0.05, 5e-6, 100)
    assert (config.reference, config.nll_positions) == ("none", "all")
    _check_shared(config)


def _check_shared(config):
    assert (config.max_length, config.max_prompt_length, config.segment_length) == (2048, 1792, 256)
    assert (config.ema_decay, config.replay_buffer_size, config.num_train_epochs) == (0.5, 2000, 4)
    assert (config.suffix, config.tail_margin, config.skip_identical) == ("keep", 3, False)


def test_the_saved_recipe_gives_the_same_run(tmp_path):
    given = ["--output_dir", str(tmp_path), "--segment_length", "0.3", "--beta", "0.2", "--report_to", "none"]
    run = parse(given, "sapo train")
    import yaml

    (tmp_path / "again.yaml").write_text(yaml.safe_dump(as_recipe(run)))
    again = parse(["--config", str(tmp_path / "again.yaml"), "--report_to", "none"], "sapo train")
    assert again.config.to_dict() == run.config.to_dict()
