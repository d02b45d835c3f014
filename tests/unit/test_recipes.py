from pathlib import Path

import pytest
import yaml

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
def test_every_recipe_line_is_commented(recipe):
    assert all("#" in line for line in recipe.read_text().splitlines())


@pytest.mark.parametrize("model", ["llama3-8b", "mistral-7b"])
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_published_recipes_hold_published_settings(model, objective):
    run = parse(["--config", f"{RECIPES[0].parent / model}-{objective}.yaml", "--report_to", "none"], "sapo train")
    config = run.config
    own = {
        "dpo": ("dpo", 0.1, 5e-7, "linear", 0.1, "rmsprop", "opponent_copy", 108, "response"),
        "orpo": ("orpo", 0.05, 5e-6, "inverse_sqrt", 100, "adamw_bnb_8bit", "none", 108, "all"),
    }
    assert (
        config.objective,
        config.beta,
        config.learning_rate,
        config.lr_scheduler_type.value,
        config.warmup_steps,
        config.optim.value,
        config.reference,
        config.reference_sync_steps,
        config.nll_positions,
    ) == own[objective]
    assert run.data.dataset_name == "argilla/distilabel-capybara-dpo-7k-binarized"
    assert (config.assistant_turns, config.pair_source) == ("last", "self_play")
    assert (config.num_train_epochs, config.per_device_train_batch_size, config.gradient_accumulation_steps) == (
        4,
        8,
        1,
    )
    assert (config.bf16, config.gradient_checkpointing, run.model.dtype) == (True, True, "bfloat16")
    assert (config.max_length, config.max_prompt_length, config.segment_length) == (2048, 1792, 256)
    assert (config.temperature, config.top_k, config.top_p) == (0.7, 50, 0.95)
    assert (config.ema_decay, config.replay_buffer_size, config.replay_draw) == (0.5, 2000, "inverse_count")
    assert config.replay_replacement
    assert (config.suffix, config.tail_margin, config.skip_identical) == ("keep", 3, False)
    assert (config.chosen_nll_weight, config.dpop_weight, config.chosen_drop_limit) == (0, 0, None)


def test_the_saved_recipe_gives_the_same_run(tmp_path):
    given = ["--output_dir", str(tmp_path), "--segment_length", "0.3", "--beta", "0.2", "--report_to", "none"]
    run = parse(given, "sapo train")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(as_recipe(run)))
    again = parse(["--config", str(tmp_path / "again.yaml"), "--report_to", "none"], "sapo train")
    assert again.config.to_dict() == run.config.to_dict()
