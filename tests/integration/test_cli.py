import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sapo.cli import main
from tests.tiny import tiny_llama, tiny_rows


@pytest.fixture
def model(tmp_path, tokenizer):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    return file


def command(model, data, out, *more):
    return [
        "train", "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(out),
        "--use_cpu", "--gradient_checkpointing", "false", "--max_steps", "3", "--max_length", "32",
        "--segment_length", "4", "--logging_steps", "1", "--report_to", "none", *more,
    ]  # fmt: skip


def test_train_writes_a_whole_run_folder_that_trains_on(model, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(model, data, out)) == 0
    names = {file.name for file in out.iterdir()}
    expected = {"model.safetensors", "tokenizer.json", "opponent", "metrics.jsonl", "recipe.yaml", "README.md"}
    assert expected | {"checkpoint-3", "sapo_config.yaml"} <= names
    shown = capsys.readouterr().out
    assert "Done after step 3 of 3" in shown
    again = ["train", "--config", str(out / "recipe.yaml"), "--resume_from_checkpoint", "true", "--max_steps", "5"]
    assert main(again) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 5


def test_data_check_shows_what_the_trainer_will_see(model, data, capsys):
    assert main(["data", "check", str(data), "--model_name_or_path", str(model), "--segment_length", "4"]) == 0
    assert "prompt" in capsys.readouterr().out


def refused(arguments, capsys, *, status=2):
    assert main(arguments) == status
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_bad_input_is_one_line_that_names_the_way_out(model, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert "nearest: --learning_rate" in refused(command(model, data, out, "--lerning_rate", "1"), capsys)
    assert "argument --beta" in refused(command(model, data, out, "--beta", "much"), capsys)
    assert "raise max_length to 40" in refused(
        command(model, data, out, "--max_prompt_length", "30", "--segment_length", "10"), capsys
    )
    assert "nearest here:" in refused(command(model, tmp_path / "trian.jsonl", out), capsys)
    assert "no such model folder" in refused(command(tmp_path / "nothing", data, out), capsys)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(command(tmp_path / "empty", data, out), capsys)
    (model / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(command(model, data, out), capsys)
    assert not out.exists()


def test_malformed_data_names_the_line(model, tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "w1", "completion": " w2"}\n{"prompt": "w1", \n')
    assert "line 2" in refused(command(model, file, tmp_path / "run"), capsys)
    file.write_text("")
    assert "DatasetError" in refused(command(model, file, tmp_path / "run"), capsys)
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "w1"}]}) + "\n")
    assert "has no assistant message" in refused(command(model, file, tmp_path / "run"), capsys)
    file.write_text(
        json.dumps({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}) + "\n"
    )
    assert "chat_template" in refused(command(model, file, tmp_path / "run"), capsys)


def test_wrong_recipe_names_file_and_option(model, data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"segment_lenght": 3}))
    message = refused([*command(model, data, tmp_path / "run"), "--config", str(recipe)], capsys)
    assert "unknown option segment_lenght; nearest: segment_length" in message
    recipe.write_text(yaml.safe_dump({"objective": "ppo"}))
    assert "not" in refused([*command(model, data, tmp_path / "run"), "--config", str(recipe)], capsys)


def test_model_too_large_for_the_machine_is_refused_before_loading(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sapo.models.psutil.virtual_memory", lambda: type("M", (), {"available": 1000})())
    assert "before activations" in refused(command(model, data, tmp_path / "run"), capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_writes_a_checkpoint_and_ends_cleanly(number, model, data, tmp_path):
    out = tmp_path / "run"
    run = [sys.executable, "-m", "sapo.cli", *command(model, data, out, "--max_steps", "100000")]
    process = subprocess.Popen(
        run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert "Stopped after step" in shown
    assert "Traceback" not in shown
    assert [path for path in Path(out).glob("checkpoint-*") if (path / "sapo_manifest.json").is_file()]
