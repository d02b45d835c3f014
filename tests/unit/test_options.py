"""Laws of the declarations: each option is declared once, and everything known of it follows from that."""

import dataclasses
import re
from enum import Enum
from pathlib import Path

import pytest
import transformers
import yaml
from packaging.version import Version
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

import sapo
from sapo import ConfigurationError, SAPOConfig
from sapo.commands.arguments import as_recipe, parse
from sapo.options import (
    accepted,
    not_compared,
    one_start,
    option,
    options,
    own_options,
    resume_fixed,
)
from sapo.options.aliases import ALIASES, MISSING, RENAMED, unknown
from sapo.options.inherited import SCHEDULERS, STRATEGIES
from sapo.options.own import OwnOptions

ROOT = Path(__file__).parents[2]
INSTALLED = Version(transformers.__version__)


def names(*kinds):
    return {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}


def declared(*kinds):
    """Declared options of these kinds that the installed transformers has."""
    return {
        one.name for one in options() if one.kind in kinds and (one.since is None or Version(one.since) <= INSTALLED)
    }


def test_every_inherited_field_is_classified_and_none_is_stale():
    assert declared("inherited") == names(TrainingArguments)
    assert {one.status for one in options()} == {"used", "harmless", "refused"}


def test_every_option_of_trl_is_classified_and_none_is_stale():
    assert declared("model") == names(ModelConfig)
    assert declared("data") - {"eval_dataset_name"} == names(ScriptArguments, DatasetMixtureConfig)


def test_the_class_has_the_declared_options_and_no_others():
    assert names(SAPOConfig) == declared("own", "inherited")
    assert len(own_options()) == len(names(SAPOConfig)) - len(names(TrainingArguments))


@pytest.mark.parametrize("kind", [SAPOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig])
def test_declared_defaults_are_those_of_the_class(kind):
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = default.value if isinstance(default, Enum) else default
        # Its default follows PyTorch's version.
        default = "adamw_torch_fused" if field.name == "optim" and default == "adamw_torch" else default
        assert option(field.name).default == default, field.name


def test_choices_are_those_of_transformers():
    assert set(STRATEGIES) == {one.value for one in IntervalStrategy}
    assert set(option("save_strategy").choices) == {one.value for one in SaveStrategy}
    assert set(SCHEDULERS) >= {one.value for one in SchedulerType}


def test_every_option_of_a_run_is_fixed_or_free_or_of_one_start_or_refused():
    of_config = {one.name for one in options() if one.kind in ("own", "inherited")}
    refused = {one.name for one in options() if one.status == "refused"} & of_config
    free = {one.name for one in options() if one.resume == "free"} & of_config
    parts = [resume_fixed(), free - refused - one_start(), one_start() & of_config, refused - one_start()]
    for place, part in enumerate(parts):
        assert not part & set().union(*parts[:place])
    assert set().union(*parts) == of_config


def test_a_refused_option_says_what_to_do_and_every_other_has_help():
    for one in options():
        if one.status == "refused":
            assert one.reason[0].islower() or one.reason[0].isupper()
            assert one.reason.endswith("."), one.name
            assert not one.help, one.name
        else:
            assert one.help.endswith("."), one.name
            assert one.help[0].isupper() or one.help.startswith("transformers'"), one.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("train_sampling_strategy", "group_by_length"),
        ("length_column_name", "size"),
        ("label_names", ["labels"]),
        ("include_for_metrics", ["loss"]),
        ("batch_eval_metrics", True),
        ("prediction_loss_only", True),
        ("eval_accumulation_steps", 2),
        ("eval_do_concat_batches", False),
        ("do_train", True),
        ("average_tokens_across_devices", False),
        ("ignore_data_skip", True),
        ("auto_find_batch_size", True),
        ("optim_target_modules", ["q_proj"]),
        ("accelerator_config", {"split_batches": True}),
        ("use_liger_kernel", True),
        ("save_only_model", True),
        ("include_num_input_tokens_seen", "all"),
        ("remove_unused_columns", True),
        ("hub_strategy", "every_save"),
        ("objective", "ppo"),
        ("adam_beta1", 1.5),
    ],
)
def test_a_value_that_is_refused_is_refused_in_python_and_on_the_command_line(name, value, tmp_path):
    with pytest.raises(ConfigurationError, match=rf"^{name}=") as python:
        SAPOConfig(str(tmp_path), use_cpu=True, **{name: value})
    if not isinstance(value, (list, dict)):
        with pytest.raises(ConfigurationError) as typed:
            parse([f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)], "sapo train")
        assert str(typed.value) == str(python.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["sigmoid", "kto"]}, r"^loss_type=kto: must be one or several of sigmoid, hinge, ipo, nce, sft"),
        ({"loss_type": []}, r"^loss_type=: must be one or several of"),
        ({"loss_type": ["hinge", "hinge"]}, "loss_type=hinge hinge: one is there twice"),
        (
            {"loss_type": ["hinge", "ipo"], "loss_weights": [1.0]},
            "loss_weights=1 with loss_type=hinge ipo: must be one",
        ),
        ({"loss_type": ["hinge", "ipo"], "loss_weights": [1.0, 0]}, "loss_weights=1 0 with loss_type=hinge ipo"),
        ({"loss_weights": [-1.0]}, r"loss_weights=-1\.0: must be 0 or more"),
        ({"loss_weights": [float("nan")]}, "loss_weights=nan: must be a finite number"),
        ({"loss_type": "sft"}, "loss_type=sft alone: it has no pairs. Set objective to sft"),
        ({"loss_type": ["sigmoid", "sft"], "chosen_nll_weight": 1.0}, "with chosen_nll_weight=1: both weigh"),
        ({"loss_type": ["nce", "ipo"]}, "loss_type has nce and ipo"),
        ({"loss_type": ["sigmoid", "nce"], "dpop_weight": 1.0}, "dpop_weight=1.0 with loss_type=nce"),
        ({"loss_type": ["hinge", "ipo"], "label_smoothing": 0.1}, "and loss_type=hinge ipo: it is a form of the sig"),
        ({"objective": "orpo", "loss_weights": [2.0]}, "loss_type=sigmoid and loss_weights with objective=orpo"),
    ],
)
def test_forms_of_the_loss_that_cannot_be_added_up_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        SAPOConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(("given", "kept"), [([], None), (["--loss_weights", "0.8", "1", "0.5"], [0.8, 1.0])])
def test_sft_among_the_forms_of_the_loss_is_the_weight_of_the_likelihood(given, kept, tmp_path):
    """Typed, in a recipe, and in Python: the same options, and the same again from what is written down."""
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--loss_type", "sigmoid", "nce", "sft"]
    typed = parse([*flags, *given], "sapo train")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(as_recipe(typed)))
    python = SAPOConfig(str(tmp_path), use_cpu=True, loss_type=["sigmoid", "nce", "sft"],
                        loss_weights=[0.8, 1, 0.5] if given else None)  # fmt: skip
    for config in (typed.config, parse(["--config", str(recipe)], "sapo train").config, python):
        assert config.loss_type == ["sigmoid", "nce"]
        assert config.loss_weights == kept
        assert config.chosen_nll_weight == (0.5 if given else 1.0)
        assert not config.scores_shared
    assert SAPOConfig(str(tmp_path), use_cpu=True, loss_type="hinge").loss_type == ["hinge"]


def test_the_docstring_of_the_class_has_every_option_of_sapo():
    text = SAPOConfig.__doc__
    assert all(f"        {one.name}: {one.help} Default: {one.default_text}." in text for one in own_options())
    assert text.rstrip().endswith("conflicts with another.")


def test_a_config_can_be_copied(tmp_path):
    config = SAPOConfig(str(tmp_path), use_cpu=True, eval_strategy="steps", load_best_model_at_end=True)
    assert dataclasses.replace(config, beta=0.2).beta == 0.2


def test_facts_of_a_resume_are_every_fixed_option_as_json_holds_it(tmp_path):
    import json

    facts = SAPOConfig(str(tmp_path), use_cpu=True, lr_scheduler_kwargs={"a": 1}).resume_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts.keys() == resume_fixed() | {"world_size"}
    assert {"warmup_steps", "data_seed", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"} <= facts.keys()


def test_a_recipe_leaves_out_what_belongs_to_one_start(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--overwrite_output_dir", "--hub_token", "secret", "--save_steps", "7"]
    recipe = as_recipe(parse([*flags, "--use_cpu", "--report_to", "none"], "sapo train"))
    assert not recipe.keys() & one_start()
    assert recipe["save_steps"] == 7
    assert {"save_steps", "output_dir", "hub_token"} <= not_compared()


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_gives_the_new_one(old, new, tmp_path):
    assert option(new) is not None
    with pytest.raises(ConfigurationError, match=f"--{old} is called --{new} now"):
        parse([f"--{old}", "1"], "sapo train")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"beta: 0.1\n{old}: 1\n")
    with pytest.raises(ConfigurationError, match=f"line 2: {old} is called {new} now"):
        parse(["--config", str(recipe)], "sapo train")


def test_every_alias_names_an_option_that_there_is_and_an_example_that_parses():
    from sapo.commands.catalog import COMMANDS
    from sapo.commands.parser import parse_command

    assert not (ALIASES.keys() | MISSING.keys() | RENAMED.keys()) & {one.name for one in accepted()}
    for alias, example in ALIASES.items():
        parse_command(COMMANDS["train"], example.split())
        assert f"use {example}" in unknown(alias, COMMANDS["train"].flags, flag=True)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("batchsize", "use --per_device_train_batch_size"), ("learningrate", "nearest: --learning_rate"),
     ("maxSteps", "nearest: --max_steps"), ("outputdir", "nearest: --output_dir")],
)  # fmt: skip
def test_a_line_between_two_words_may_be_missing(typed, meant):
    assert meant in unknown(typed, flag=True)


def test_the_api_page_lists_exactly_what_the_package_exports():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: sapo\.(\w+)$", page, re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(sapo.__all__)
    for name in sapo.__all__:
        assert getattr(sapo, name) is not None


def test_own_options_can_be_read_by_other_parsers():
    """Whoever builds a command line of their own from the dataclass gets help that argparse can print."""
    for field in dataclasses.fields(OwnOptions):
        assert field.metadata["help"] % {} == option(field.name).help
