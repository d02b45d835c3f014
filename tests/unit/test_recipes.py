import re

import pytest
import yaml

from sapo.commands.arguments import as_recipe, parse
from sapo.commands.main import main
from sapo.commands.recipes import FOLDER, find_recipe
from sapo.errors import ConfigurationError

OF_TRL = [FOLDER / "trl-sft.yaml", FOLDER / "llama3-8b-trl-sft.yaml"]
PRESETS = sorted((FOLDER / "presets").glob("*.yaml"))
RECIPES = [file for file in sorted(FOLDER.glob("*.yaml")) if file not in OF_TRL] + PRESETS
NEIGHBOUR = re.compile(r"^# Differs from (\S+) in: (.+)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch):
    monkeypatch.setattr("sapo.config._accelerator_has_bf16", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads(recipe, tmp_path):
    run = parse(["--config", str(recipe), "--output_dir", str(tmp_path), "--report_to", "none"], "sapo train")
    assert run.config.output_dir == str(tmp_path)


@pytest.mark.parametrize("recipe", [*RECIPES, *OF_TRL], ids=lambda file: file.stem)
def test_every_recipe_line_is_commented(recipe):
    assert all("#" in line for line in recipe.read_text().splitlines())


@pytest.mark.parametrize("preset", PRESETS, ids=lambda file: file.stem)
def test_every_preset_differs_from_its_neighbour_in_the_named_line_only(preset):
    text = preset.read_text()
    found = NEIGHBOUR.search(text)
    if found is None:
        assert preset.stem == "sapo-dpo"
        return
    neighbour = (FOLDER / "presets" / found[1]).read_text()
    lines, others = ([line for line in content.splitlines() if line[0] != "#"] for content in (text, neighbour))
    changed = set(lines) - set(others)
    assert {line.split(":")[0] for line in changed} == {found[2]}
    assert len(changed) == 1
    assert {line.split(":")[0] for line in set(others) - set(lines)} <= {found[2]}


@pytest.mark.parametrize("recipe", [*RECIPES, *OF_TRL], ids=lambda file: file.stem)
def test_a_recipe_is_listed_with_its_machine_and_printed(recipe, capsys):
    name = recipe.relative_to(FOLDER).with_suffix("").as_posix()
    assert main(["recipes"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == name]
    described, machine = recipe.read_text().splitlines()[:2]
    assert described.removeprefix("# ") in line
    assert machine.removeprefix("# Machine: ") in line
    assert main(["recipes", name]) == 0
    assert capsys.readouterr().out == recipe.read_text()


def test_a_name_finds_the_file_here_first_then_the_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spin").mkdir()  # a folder is no recipe
    for name in ("presets/spin", "presets/spin.yaml", "recipes/presets/spin.yaml", "spin"):
        assert find_recipe(name) == FOLDER / "presets" / "spin.yaml"
    for name in ("guarded-dpo", "recipes/guarded-dpo.yaml"):
        assert find_recipe(name) == FOLDER / "guarded-dpo.yaml"
    (tmp_path / "guarded-dpo").write_text("beta: 0.1")
    assert find_recipe("guarded-dpo").read_text() == "beta: 0.1"


@pytest.mark.parametrize("name", ["", "guarded-dop", "guarded-dpo.yaml", "x" * 5000, "a\0b", "../presets/spin"])
def test_a_name_of_nothing_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="no shipped recipe") as refused:
        find_recipe(name)
    if name.startswith("guarded"):
        assert "nearest: guarded-dpo" in str(refused.value)


def test_the_nearest_may_be_a_file_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("beta: 0.1")
    with pytest.raises(ConfigurationError, match=r"mine\.yaml"):
        find_recipe("mime.yaml")


@pytest.mark.parametrize("arguments", [["a", "b"], ["--list"], ["--help", "x"]])
def test_recipes_takes_one_name(arguments, capsys):
    assert main(["recipes", *arguments]) == 2
    assert "one recipe" in capsys.readouterr().err


def test_presets_cover_every_method_and_ablation():
    configs = [parse(["--config", str(preset), "--report_to", "none"], "sapo train").config for preset in PRESETS]
    names = (
        "objective", "suffix", "pair_source", "reference", "ema_decay", "segment_length", "num_rounds",
        "chosen_nll_weight", "replay_buffer_size",
    )  # fmt: skip
    values = {name: {getattr(config, name) for config in configs} for name in names}
    assert values["objective"] == {"dpo", "orpo", "sft"}
    assert values["suffix"] == {"keep", "drop", "mask"}
    assert values["pair_source"] == {"self_play", "paired", "none"}
    assert values["reference"] == {"initial", "opponent", "opponent_copy", "none"}
    assert values["ema_decay"] == {0, 0.5, 1}
    assert None in values["segment_length"]
    assert 3 in values["num_rounds"]
    assert {0, 10} <= values["chosen_nll_weight"]
    assert {4, 2000} <= values["replay_buffer_size"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # trl's own default
@pytest.mark.parametrize("recipe", OF_TRL, ids=lambda file: file.stem)
def test_the_recipes_for_trl_load_there(recipe):
    from trl.scripts.sft import make_parser

    _, args = make_parser().parse_args_and_config(
        ["--config", str(recipe), "--dataset_name", "rows", "--output_dir", "run", "--report_to", "none"]
    )[:2]
    assert args.assistant_only_loss != args.packing


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
        config.ref_model_sync_steps,
        config.nll_scope,
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


def test_the_saved_recipe_keeps_a_segment_of_the_whole_response(tmp_path):
    run = parse(["--output_dir", str(tmp_path), "--segment_length", "none", "--report_to", "none"], "sapo train")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(as_recipe(run)))
    again = parse(["--config", str(tmp_path / "again.yaml"), "--report_to", "none"], "sapo train")
    assert again.config.segment_length is None
