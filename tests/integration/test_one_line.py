"""A law: whatever is wrong or missing before the first step is one `...Error:` line and exit status 2."""

import importlib.util
import json
import logging
import re
import subprocess
import sys
import warnings
from importlib import machinery
from pathlib import Path

import pytest
import transformers

from sapo.commands.main import main
from sapo.commands.notices import held_notices
from sapo.commands.starting import check_libraries
from sapo.config import SAPOConfig
from sapo.errors import EXTRAS, ConfigurationError
from sapo.options import option, options
from tests.integration.test_cli import command, data, model  # noqa: F401 - fixtures

IMPLAUSIBLE = {
    "int": ["-7", "much"],
    "float": ["-7.5", "much"],
    "numbers": ["-7.5,1", "much"],
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
    ("--optim", "galore_adamw"),
    ("--optim", "adamw_torch", "--optim_args", "speed=3"),
    ("--optim", "sgd", "--optim_args", "momentum=0.9,nesterovv=True"),
    ("--use_peft", "--lora_task_type", "SEQ_CLS"),
    ("--use_peft", "--lora_target_modules", "q_proj", "--lora_target_parameters", "w_pack"),
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

_ON_GGUF = ("--model_name_or_path", "model.gguf", "--dataset_name", "train.jsonl")
_JUDGED = ("--judge_model", "judge", "--judge_base_url", "http://127.0.0.1:9/v1")
NEEDS = (
    ("bitsandbytes", ("train", "--use_peft", "--load_in_4bit")),
    ("bitsandbytes", ("train", "--use_peft", "--load_in_8bit")),
    ("bitsandbytes", ("train", "--optim", "paged_adamw_8bit")),
    ("bitsandbytes", ("generate", "--output_file", "pairs.jsonl", "--use_peft", "--load_in_4bit")),
    ("deepspeed", ("train", "--accelerate_config", "zero2")),
    ("deepspeed", ("train", "--deepspeed", "zero.json")),
    ("deepspeed", ("generate", "--output_file", "pairs.jsonl", "--deepspeed", "zero.json")),
    ("trackio", ("train", "--report_to", "trackio")),
    ("gguf", ("train", *_ON_GGUF)),
    ("gguf", ("data check", *_ON_GGUF)),
    ("gguf", ("generate", *_ON_GGUF, "--output_file", "pairs.jsonl")),
    ("gguf", ("estimate", "--model_name_or_path", "model.gguf")),
    ("gguf", ("chat", "model.gguf", "--prompt", "w1")),
    ("gguf", ("evaluate", "model.gguf", "--suite", "local", "--dataset_name", "train.jsonl")),
    ("gguf", ("export", "model", "exported", "--gguf", "q8_0")),
    ("gguf", ("demo", "--chat")),
    ("vllm", ("train", "--generation_backend", "vllm_server")),
    ("vllm", ("train", "--generation_backend", "vllm_colocate")),
    ("vllm", ("generate", "--output_file", "pairs.jsonl", "--generation_backend", "vllm_server")),
    ("vllm", ("serve", "--generation_backend", "vllm_server")),
    ("lm_eval", ("evaluate", "model", "--suite", "leaderboard")),
    ("nltk", ("evaluate", "model", "--suite", "ifeval")),
    ("langdetect", ("evaluate", "model", "--suite", "ifeval")),
    ("immutabledict", ("evaluate", "model", "--suite", "ifeval")),
    ("openai", ("evaluate", "model", "--suite", "alpaca_eval", "--alpaca_eval_data", "asked.json", *_JUDGED)),
    ("openai", ("evaluate", "model", "--suite", "mt_bench", "--mt_bench_dir", "mt_bench", *_JUDGED)),
)
"""Packages of extras, and each command that asks for them; options of a run are added."""


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


def asking(more, model, data, folder):  # noqa: F811
    """A command line of `NEEDS`, in a folder that has what it names."""
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "asked.json").write_text(json.dumps([{"instruction": "w1", "output": "w2"}]))
    (folder / "mt_bench").mkdir()
    question = {"question_id": 1, "category": "writing", "turns": ["w1", "w2"]}
    (folder / "mt_bench" / "question.jsonl").write_text(json.dumps(question) + "\n")
    prompts = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
    lines = [json.dumps({"name": name, "system_prompt": "", "prompt_template": "{question}"}) for name in prompts]
    (folder / "mt_bench" / "judge_prompts.jsonl").write_text("\n".join(lines) + "\n")
    name, *flags = more
    if name in ("train", "serve"):
        return [name, *command(model, data, folder / "run")[1:], *flags]
    if name == "generate":
        options = ("--model_name_or_path", str(model), "--segment_length", "4", "--max_length", "32")
        return [name, *options, "--dataset_name", str(data), *flags]
    return [*name.split(), *flags]


def names_the_package(package, line):
    """The error has the command that installs the package."""
    if package == "vllm":
        return re.search(r'pip install "(vllm>=0\.32|sapo-llm\[vllm\])"', line) is not None
    # transformers names bitsandbytes itself for its optimizers.
    return f'pip install "sapo-llm[{EXTRAS[package]}]"' in line or f"pip install -U {package}" in line


def id_of(one):
    return one if isinstance(one, str) else "-".join(one[:3]).replace(" ", "-")


@pytest.mark.parametrize(("package", "more"), NEEDS, ids=id_of)
def test_a_missing_package_of_an_extra_is_one_line(package, more, model, data, tmp_path, capfd, monkeypatch):  # noqa: F811
    found = machinery.PathFinder.find_spec

    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] == package else found(name, *rest)

    monkeypatch.setattr(machinery.PathFinder, "find_spec", classmethod(find_spec))
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = asking(more, model, data, tmp_path)
    capfd.readouterr()
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.match(r"[A-Z]\w+Error: .+", line)
    assert names_the_package(package, line), line


@pytest.mark.slow
@pytest.mark.parametrize(("package", "more"), NEEDS, ids=id_of)
def test_a_process_without_a_package_names_it(package, more, model, data, tmp_path):  # noqa: F811
    line = alone(package, asking(more, model, data, tmp_path), tmp_path)
    assert names_the_package(package, line), line


def test_every_extra_is_asked_without_its_packages():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    extras = {
        (re.split(r"[<>=]", package)[0].replace("-", "_"), extra)
        for extra, packages in re.findall(r"^(\w+) = \[(.*)\]$", section, flags=re.MULTILINE)
        for package in re.findall(r'"(.+?)"', packages)
        if extra != "docs"
    }
    assert extras == set(EXTRAS.items())
    assert {package for package, _ in NEEDS} == set(EXTRAS)


@pytest.mark.parametrize("more", CLASHES, ids=" ".join)
def test_what_a_library_refuses(more, model, data, tmp_path, capfd):  # noqa: F811
    assert one_line(command(model, data, tmp_path / "run", *more), capfd)


def test_arguments_that_an_optimizer_takes_are_taken(tmp_path):
    for optim, given in (("sgd", "momentum=0, nesterov=False"), ("adamw_torch", None)):
        check_libraries(SAPOConfig(str(tmp_path), use_cpu=True, report_to="none", optim=optim, optim_args=given))


def test_a_mistyped_optimizer_is_answered_with_the_nearest(model, data, tmp_path, capfd):  # noqa: F811
    assert main(command(model, data, tmp_path / "run", "--optim", "adamw_hf")) == 2
    said = capfd.readouterr().err
    assert "optim=adamw_hf: not an optimizer of transformers; nearest: adamw_" in said
    assert "adafactor" in said


def test_an_output_dir_that_cannot_be_one_is_refused_before_anything_is_loaded(model, data, tmp_path, capfd):  # noqa: F811
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "folder")
    for name, says in (("link", "is a link to .*gone/folder, which is not there"), ("x" * 300, "File name too long")):
        assert main(command(model, data, tmp_path / name)) == 2
        assert re.match(f"ConfigurationError: output_dir=.*{says}", capfd.readouterr().err)


def test_models_of_another_kind_are_refused(model, data, tmp_path, capfd):  # noqa: F811
    for kind in ("t5", "bert", "vit"):
        (model / "config.json").write_text(json.dumps({"model_type": kind}))
        assert one_line(command(model, data, tmp_path / "run"), capfd)


def test_a_fault_of_this_package_keeps_its_traceback(model, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sapo.commands.train.load_inputs", None)
    with pytest.raises(TypeError, match="not callable"):
        main(command(model, data, tmp_path / "run"))


def test_a_run_that_fails_in_its_first_step_leaves_nothing_and_says_the_error_first(model, data, tmp_path):  # noqa: F811
    kind = transformers.OpenAIGPTConfig(vocab_size=63, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.OpenAIGPTLMHeadModel(kind).save_pretrained(model)  # it has no cache to decode with
    out = tmp_path / "run"
    said = alone("no_such_package", command(model, data, out), tmp_path)
    assert "no key-value cache" in said
    assert list(out.iterdir()) == []
    (out / "notes.txt").write_text("mine")
    alone("no_such_package", command(model, data, out, "--overwrite_output_dir"), tmp_path)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]


@pytest.mark.filterwarnings("default")
def test_notices_wait_for_an_error(capfd):
    def fail():
        logging.getLogger("of.a.library").warning("before")
        warnings.warn("before too", stacklevel=1)
        raise ConfigurationError("first")

    with pytest.raises(ConfigurationError), held_notices():
        fail()
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("default")
def test_notices_are_shown_in_their_order_once_released():
    script = (
        "import logging, sys, warnings\n"
        "from sapo.commands.notices import held_notices\n"
        "with held_notices() as notices:\n"
        "    logging.getLogger('a').warning('one')\n"
        "    warnings.warn('two')\n"
        "    sys.stderr.write('at once\\n')\n"
        "    notices.release()\n"
        "    logging.getLogger('a').warning('three')\n"
        "    1 / 0\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    places = [done.stderr.index(text) for text in ("at once", "one", "two", "three", "ZeroDivisionError")]
    assert places == sorted(places)


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


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--dataset_name", "train.jsonl", "--output_file", "pairs.jsonl", "--model_name_or_path", "model"),
        ("generate", "--self_replay", "shipped", "--output_file", "a.parquet", "--model_name_or_path", "model"),
        ("data check", "no.jsonl", "--model_name_or_path", "model", "--max_length", "32"),
        ("estimate", "--model_name_or_path", "model", "--max_length", "32", "--gpu", "abacus"),
        ("evaluate", "model", "--suite", "local", "--dataset_name", "train.jsonl"),
        ("chat", "model", "--prompt", "w1"),
        ("export", "model", "exported"),
    ],
    ids=lambda given: given[0],
)
def test_a_notice_does_not_precede_the_error_of_any_command(arguments, model, data, capfd, monkeypatch):  # noqa: F811
    config = transformers.MixtralConfig(**{**TINY_EXPERTS, "output_router_logits": True})
    config.save_pretrained(model)
    (model / "model.safetensors").unlink()
    transformers.utils.logging.warning_once.cache_clear()
    # Without pytest's own handlers, Python writes warnings to standard error.
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(sys.stderr)])
    name, *rest = arguments
    assert one_line([*name.split(), *rest], capfd)


TINY_EXPERTS = {
    "vocab_size": 63, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 64,
}  # fmt: skip
