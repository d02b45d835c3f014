"""A law: whatever is wrong or missing before the first step is one `...Error:` line and exit status 2."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from sapo.commands.main import main
from sapo.errors import ConfigurationError
from sapo.options import option, options
from tests.integration.test_cli import command, data, model  # noqa: F401 - fixtures

IMPLAUSIBLE = {
    "int": ["-7", "much"],
    "float": ["-7.5", "much"],
    "bool": ["perhaps"],
    "bool_or_auto": ["perhaps"],
    "str": ["nonsense"],
    "str_or_false": ["nonsense"],
    "list": ["nonsense"],
    "mapping": ['{"nonsense": 1}', "nonsense"],
    "mapping_or_file": ["nonsense.json", '{"nonsense": 1}'],
    "records": ["nonsense"],
}
"""Values by type that most options refuse. One that takes such a value has to run with it."""

MISSING = {
    "wandb": ("--report_to", "wandb"),
    "tensorboard": ("--report_to", "tensorboard"),
    "mlflow": ("--report_to", "mlflow"),
    "comet_ml": ("--report_to", "comet_ml"),
    "bitsandbytes": ("--optim", "adamw_8bit"),
    "flash_attn": ("--attn_implementation", "flash_attention_2"),
    "liger_kernel": ("--use_liger_kernel",),
    "torchao": ("--optim", "adamw_torch_4bit"),
    "galore_torch": ("--optim", "galore_adamw"),
    "schedulefree": ("--optim", "schedule_free_adamw"),
    "deepspeed_config": ("--deepspeed", "no-such-file.json"),
}
"""Packages that a run may ask for, and how."""

CLASHES = (
    ("--lr_scheduler_type", "cosine_with_min_lr"),
    ("--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"speed": 7}'),
    ("--lr_scheduler_type", "reduce_lr_on_plateau"),
    ("--torch_compile_backend", "abacus"),
    ("--use_peft", "--lora_target_modules", "w_pack"),
    ("--use_peft", "--lora_target_parameters", "experts.w_pack"),
    ("--use_peft", "--lora_modules_to_save", "w_pack"),
    ("--use_peft", "--lora_task_type", "DANCING"),
    ("--load_best_model_at_end",),
    ("--output_dir", "/dev/null/run"),
    ("--dataloader_prefetch_factor", "2"),
    ("--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"speed": 7}'),
)
"""What each option takes by itself and the run does not."""


def one_line(arguments, capfd):
    """Run; whether it was refused. What it says first is one error, without a traceback."""
    status = main(arguments)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    if status == 0:
        return False
    assert status == 2
    first, *rest = said.strip().splitlines()
    assert re.match(r"[A-Z]\w+Error: .+", first), said
    assert not rest, said
    return True


def all_values():
    # `--debug` is the command's own: it asks for the traceback.
    return [(one.name, value) for one in options() if one.name != "debug" for value in IMPLAUSIBLE[one.type]]


@pytest.fixture(autouse=True)
def in_folder_of_its_own(tmp_path, monkeypatch):
    """Some values name a folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "value"), all_values()[::9])
def test_some_wrong_values(name, value, model, data, tmp_path, capfd):  # noqa: F811
    check(name, value, model, data, tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), all_values())
def test_every_wrong_value_of_every_option(name, value, model, data, tmp_path, capfd):  # noqa: F811
    check(name, value, model, data, tmp_path, capfd)


def check(name, value, model, data, tmp_path, capfd):  # noqa: F811
    refused = one_line([*command(model, data, tmp_path / "run", "--max_steps", "1"), f"--{name}", value], capfd)
    one = option(name)
    parsed = one.type in ("int", "float", "bool") and value in ("much", "perhaps")
    assert refused or not (parsed or one.choices or one.status == "refused")


@pytest.mark.parametrize("package", MISSING)
def test_a_missing_package_is_named(package, model, data, tmp_path, capfd):  # noqa: F811
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    assert one_line(command(model, data, tmp_path / "run", *MISSING[package]), capfd)


WITHOUT = """
import sys
from importlib import machinery
hidden, found = sys.argv[1], machinery.PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] == hidden else found(name, path, target)
machinery.PathFinder.find_spec = classmethod(find_spec)
from sapo.commands.main import main
sys.exit(main(sys.argv[2:]))
"""
"""Runs a command in a process that does not have a package."""

EXTRAS = {
    "bitsandbytes": ("--use_peft", "--load_in_4bit"),
    "deepspeed": ("--accelerate_config", "zero2"),
    "trackio": ("--report_to", "trackio"),
    "gguf": ("--model_name_or_path", "model.gguf"),
    "lm_eval": ("evaluate", "model", "--suite", "leaderboard"),
}
"""Packages of extras, and what asks for them."""


def alone(package, arguments, folder):
    """What the command prints on standard error, all of it, in a process of its own that lacks a package."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *arguments], capture_output=True, text=True, cwd=folder, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert re.match(r"[A-Z]\w+Error: .+", line)
    return line


def test_nothing_is_printed_before_the_error(model, data, tmp_path):  # noqa: F811
    line = alone("no_such_package", command(model, data, tmp_path / "run", "--load_best_model_at_end"), tmp_path)
    assert "load_best_model_at_end" in line


@pytest.mark.slow
@pytest.mark.parametrize("package", EXTRAS)
def test_a_process_without_a_package_names_it(package, model, data, tmp_path):  # noqa: F811
    more = EXTRAS[package]
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    arguments = more if more[0] == "evaluate" else [*command(model, data, tmp_path / "run"), *more]
    line = alone(package, arguments, tmp_path)
    assert package in line or (package == "lm_eval" and "[evaluation]" in line)


@pytest.mark.parametrize("more", CLASHES, ids=" ".join)
def test_what_a_library_refuses(more, model, data, tmp_path, capfd):  # noqa: F811
    assert one_line(command(model, data, tmp_path / "run", *more), capfd)


def test_models_of_another_kind_are_refused(model, data, tmp_path, capfd):  # noqa: F811
    for kind in ("t5", "bert", "vit"):
        (model / "config.json").write_text(json.dumps({"model_type": kind}))
        assert one_line(command(model, data, tmp_path / "run"), capfd)


def test_a_fault_of_this_package_keeps_its_traceback(model, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sapo.commands.train.load_inputs", None)
    with pytest.raises(TypeError, match="not callable"):
        main(command(model, data, tmp_path / "run"))


def test_a_library_that_fails_after_the_first_step_keeps_its_traceback():
    from sapo.commands.starting import library_errors

    def fail():
        json.loads("{")

    said = r"the run cannot start: JSONDecodeError.*Given here: Expecting=b"
    given = {"dataset_name": "a", "Expecting": "b"}
    with pytest.raises(ConfigurationError, match=said), library_errors(given, lambda: False):
        fail()
    with pytest.raises(json.JSONDecodeError), library_errors({}, lambda: True):
        fail()
