"""Law of SECURITY.md: whatever command is given a model that needs code of its own, that code is not run."""

import ast
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

import sapo
from sapo import SAPOConfig, SAPOTrainer
from sapo.commands.catalog import COMMANDS
from sapo.commands.main import main
from sapo.errors import ConfigurationError, ModelError, SapoError
from tests.tiny import save_tiny, tiny_llama, tiny_rows, tiny_tokenizer, write_rows

RUN = ["--use_cpu", "--max_length", "32", "--segment_length", "4", "--report_to", "none"]
REFUSED = ("code from a model is never run", "is not a causal language model")


def write(folder, file, **changes):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


def with_model_code(folder):
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    write(folder, "config.json", model_type="evil", architectures=["Evil"], auto_map=names)


def with_known_type_that_cannot_generate(folder):
    write(
        folder, "config.json", model_type="t5", architectures=["Evil"], auto_map={"AutoModelForCausalLM": "evil.Evil"}
    )


def with_tokenizer_code(folder):
    write(folder, "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (folder / "tokenizer.json").unlink()


@pytest.fixture(params=[with_model_code, with_known_type_that_cannot_generate, with_tokenizer_code, "adapter"])
def trap(request, tmp_path, monkeypatch):
    """A model that asks for code, which would leave a file behind, and a user who agrees to everything."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    folder, owned = tmp_path / "model", tmp_path / "owned"
    save_tiny(folder)
    adapter = request.param == "adapter"
    (with_model_code if adapter else request.param)(folder)
    (folder / "evil.py").write_text(
        f"open({str(owned)!r}, 'w').close()\nclass Evil: pass\nclass EvilConfig:\n    model_type = 'evil'\n"
    )
    given = folder
    if adapter:
        given = tmp_path / "adapter"
        get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")).save_pretrained(given)
        write(given, "adapter_config.json", base_model_name_or_path=str(folder))
    write_rows(tmp_path / "rows.jsonl")
    return given, owned, request.param is with_tokenizer_code


def commands(model, folder):
    rows, out = str(folder / "rows.jsonl"), str(folder / "out")
    data = ["--model_name_or_path", str(model), "--dataset_name", rows]
    evaluate = ["evaluate", str(model), "--output_dir", out, "--limit", "2", "--device", "cpu"]
    return {
        "train": ["train", *data, "--output_dir", out, "--max_steps", "1", *RUN],
        "rounds": [
            "train",
            *data,
            "--output_dir",
            out,
            "--num_rounds",
            "2",
            "--ema_decay",
            "1",
            "--max_steps",
            "1",
            *RUN,
        ],
        "data check": ["data", "check", *data[2:], *data[:2], "--max_length", "32"],
        "generate": ["generate", *data, "--output_file", str(folder / "pairs.parquet"), *RUN],
        "generate --self_replay": [
            *["generate", "--self_replay", rows, "--model_name_or_path", str(model), "--use_cpu"],
            *["--output_file", str(folder / "pairs.parquet"), "--max_length", "32"],
        ],
        "export": ["export", str(model), out, "--device", "cpu"],
        "demo --chat": ["demo", "--chat", "--model_name_or_path", str(model), "--output_dir", out],
        "evaluate retention": [*evaluate, "--suite", "retention", "--start", str(model), "--dataset_name", rows],
        "estimate": ["estimate", *data, "--gpu", "h200", "--max_length", "32"],
        "chat": ["chat", str(model), "--prompt", "w1", "--plain", "--device", "cpu"],
        "evaluate local": [*evaluate, "--suite", "local", "--dataset_name", rows, "--max_length", "32"],
        "evaluate leaderboard": [*evaluate, "--suite", "leaderboard"],
        "evaluate ifeval": [*evaluate, "--suite", "ifeval"],
        "evaluate mt_bench": [*evaluate, "--suite", "mt_bench", "--mt_bench_dir", str(folder)],
        "evaluate alpaca_eval": [*evaluate, "--suite", "alpaca_eval", "--alpaca_eval_data", rows],
        "serve": ["serve", *data, "--output_dir", out, "--generation_backend", "vllm_server", *RUN],
        "report": ["report", str(model)],
        "compare": ["compare", str(model), str(model)],
    }


def test_every_command_is_asked_to_run_code_of_a_model():
    asked = list(commands("m", Path()))
    assert {name for name in COMMANDS if not any(one.startswith(name) for one in asked)} == {"recipes", "completion"}


@pytest.mark.parametrize("command", list(commands(Path("m"), Path())))
def test_no_command_runs_code_of_a_model(command, trap, tmp_path, capsys):
    model, owned, needs_tokenizer = trap
    status = main(commands(model, tmp_path)[command])
    error = capsys.readouterr().err.strip()
    assert not owned.exists()
    assert status == 2
    assert len(error.splitlines()) == 1, error
    assert error.split(":")[0].endswith("Error")
    # Those below read no model; to serve, vLLM reads the tokenizer, and it is not here.
    if command not in ("report", "compare") and not (command == "serve" and needs_tokenizer):
        assert any(reason in error for reason in REFUSED), error


def test_the_trainer_does_not_run_code_of_a_model(trap, tmp_path):
    model, owned, _ = trap
    options = SAPOConfig(output_dir=str(tmp_path / "python"), use_cpu=True, report_to="none", max_length=32)
    with pytest.raises(SapoError):
        SAPOTrainer(str(model), options, tiny_rows())
    assert not owned.exists()


@pytest.mark.parametrize("given", [{"trust_remote_code": True}, {"weights_only": False}, {"allow_all_kernels": True}])
def test_options_of_a_recipe_that_would_run_foreign_code_are_refused(given, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    options = SAPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, model_init_kwargs=given)
    with pytest.raises(ConfigurationError, match=next(iter(given))):
        SAPOTrainer(str(tmp_path), options, tiny_rows(), processing_class=tiny_tokenizer())


def test_the_flag_for_foreign_code_is_refused(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    for command in ("train", "generate", "data check", "estimate"):
        assert main([*commands(tmp_path / "model", tmp_path)[command], "--trust_remote_code"]) == 2
        assert "trust_remote_code" in capsys.readouterr().err


def test_only_the_loader_loads():
    """Every call that could run code of a model stands in two files: its description and its weights."""
    root = Path(sapo.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name in ("from_pretrained", "create_model_from_path", "load_custom_generate"):
                found.add(str(file.relative_to(root)))
    assert found == {"weights/description.py", "weights/loading.py"}


def test_an_adapter_that_names_a_module_to_import_is_refused(tmp_path):
    save_tiny(tmp_path / "base")
    get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    named = {"megatron_config": {"a": 1}, "megatron_core": "evil", "base_model_name_or_path": str(tmp_path / "base")}
    write(tmp_path / "adapter", "adapter_config.json", **named)
    with pytest.raises(ModelError, match="megatron_config"):
        SAPOTrainer(str(tmp_path / "adapter"), SAPOConfig(output_dir=str(tmp_path / "r"), use_cpu=True), tiny_rows())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks for modules in the working folder")
def test_modules_in_the_working_folder_are_not_run(tmp_path):
    save_tiny(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    for name in ("types", "multiprocessing", "torch", "datasets", "tokenizers"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()\n")
    started = "import sys; sys.path[:] = [p for p in sys.path if p]; from sapo.__main__ import run; sys.exit(run())"
    command = [sys.executable, "-c", started, "data", "check", "rows.jsonl", "--model_name_or_path", "model"]
    given = ["--max_length", "32", "--segment_length", "4", "--dataset_num_proc", "2"]
    done = subprocess.run([*command, *given], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "owned").exists()
