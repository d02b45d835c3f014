"""Laws of trust: a model folder runs no code of its own, and no secret reaches a file or the screen."""

import json

import pytest

from sapo import SAPOConfig, SAPOTrainer
from sapo.commands.main import main
from tests.tiny import save_tiny, tiny_rows, tiny_tokenizer, write_rows

SECRET = "hf_thisIsNobodysToken"


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model")


def command(model, out, *more):
    write_rows(out.parent / "train.jsonl")
    return [
        "train", "--model_name_or_path", str(model), "--dataset_name", str(out.parent / "train.jsonl"),
        "--output_dir", str(out), "--use_cpu", "--gradient_checkpointing", "false", "--max_steps", "2",
        "--max_length", "32", "--segment_length", "4", "--report_to", "none", *more,
    ]  # fmt: skip


def with_code(model, file, key, value):
    """Let a file of the model ask for code that lies beside it."""
    owned = model.parent / "owned"
    (model / "own.py").write_text(f"open({str(owned)!r}, 'w')\nclass Own: pass\n")
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(content | {key: value}))
    return owned


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "auto_map", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["own.Own", "own.Own"]}),
    ],
)
def test_code_in_a_model_folder_is_not_run(model, tmp_path, capsys, file, key, value):
    owned = with_code(model, file, key, value)
    # What transformers knows by itself needs no code; what it does not know is refused.
    assert main(command(model, tmp_path / "known")) == 0
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"model_type": "own", "architectures": ["Own"]}))
    assert main(command(model, tmp_path / "unknown")) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    options = SAPOConfig(output_dir=str(tmp_path / "python"), use_cpu=True, report_to="none", max_length=32)
    with pytest.raises((ValueError, OSError)):
        SAPOTrainer(str(model), options, tiny_rows(), processing_class=tiny_tokenizer())
    assert not owned.exists()


def test_no_secret_reaches_a_file_or_the_screen(model, tmp_path, capfd, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    out = tmp_path / "run"
    assert main(command(model, out, "--hub_token", SECRET, "--save_steps", "1")) == 0
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {"sapo_config.yaml", "recipe.yaml", "README.md", "trainer_state.json"} <= {file.name for file in files}
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_a_token_among_the_options_of_the_model_is_refused(model, tmp_path, capsys):
    assert main(command(model, tmp_path / "run", "--model_init_kwargs", json.dumps({"token": SECRET}))) == 2
    shown = capsys.readouterr().err
    assert "hf auth login" in shown
    assert SECRET not in shown


def test_options_of_the_model_reach_it(model, tmp_path, capsys):
    assert main(command(model, tmp_path / "run", "--model_init_kwargs", json.dumps({"no_such_option": 1}))) == 2
    assert "no_such_option" in capsys.readouterr().err
