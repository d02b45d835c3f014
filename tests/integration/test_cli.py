import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sapo import SAPOConfig, SAPOTrainer
from sapo.commands.main import main
from sapo.data.loading import load_rows
from tests.runs import metrics_of, refused
from tests.tiny import save_tiny, tiny_rows, write_rows


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "train.jsonl")


def command(model, data, out, *more):
    return [
        "train", "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(out),
        "--use_cpu", "--gradient_checkpointing", "false", "--max_steps", "3", "--max_length", "32",
        "--segment_length", "4", "--logging_steps", "1", "--report_to", "none", *more,
    ]  # fmt: skip


def check(model, *more):
    options = ("--model_name_or_path", str(model), "--segment_length", "4", "--max_length", "32")
    return ["data", "check", *options, *more]


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
    steps = [row["step"] for row in metrics_of(out)]
    assert steps[-1] == 5


def test_data_check_shows_what_the_trainer_will_see(model, data, capsys):
    assert main(check(model, "--dataset_name", str(data))) == 0
    assert "24 rows, 24 examples kept" in capsys.readouterr().out


def test_bad_input_is_one_line_that_names_the_way_out(model, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert "nearest: --learning_rate" in refused(command(model, data, out, "--lerning_rate", "1"), capsys)
    assert "--beta: much is not valid" in refused(command(model, data, out, "--beta", "much"), capsys)
    assert "raise max_length to 40" in refused(
        command(model, data, out, "--max_prompt_length", "30", "--segment_length", "10"), capsys
    )
    assert "did you mean" in refused(command(model, tmp_path / "trian.jsonl", out), capsys)
    assert "no such model folder" in refused(command(tmp_path / "nothing", data, out), capsys)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(command(tmp_path / "empty", data, out), capsys)
    assert "the checkpoint lacks lm_head.weight" in refused(command(broken(model), data, out), capsys)
    (model / "model.safetensors").write_bytes(b"damaged")
    assert "not a file of safetensors, or damaged (7 bytes)" in refused(command(model, data, out), capsys)
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


def broken(model):
    """The model folder with other weights: whatever is refused with it is refused before they are loaded."""
    save_file({"other": torch.zeros(1)}, model / "model.safetensors")
    return model


def test_bad_data_is_refused_before_the_model_loads(model, data, tmp_path, capsys):
    out = tmp_path / "run"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "w1", "completion": " w2"}\n{"prompt": "w1"}\n')
    assert "row 2 of" in refused(command(broken(model), bad, out), capsys)
    evaluated = ("--eval_strategy", "steps", "--eval_dataset_name", str(bad))
    assert "row 2 of" in refused(command(model, data, out, *evaluated), capsys)
    assert "needs rows to evaluate on" in refused(command(model, data, out, "--eval_strategy", "steps"), capsys)
    assert "the checkpoint lacks lm_head.weight" in refused(command(model, data, out), capsys)


def test_more_tokens_than_the_model_has_positions_are_refused_before_it_loads(model, data, tmp_path, capsys):
    given = command(broken(model), data, tmp_path / "run", "--max_length", "65")
    assert "65 exceeds the 64 positions of the model. Lower it: --max_length 64." in refused(given, capsys)
    assert "64 positions" in refused(check(model, "--dataset_name", str(data), "--max_length", "65"), capsys)


def test_command_and_trainer_prepare_alike(model, data, tmp_path, tokenizer, capsys):
    # An end token that only config.json knows: it has to count as one in either case.
    (model / "generation_config.json").unlink()
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"eos_token_id": [1, 7]}))
    data.write_text('{"prompt": "w1", "completion": " w2 w4"}\n' * 4)
    assert main(command(model, data, tmp_path / "run")) == 0
    saved = json.loads((tmp_path / "run" / "checkpoint-3" / "sapo_state.json").read_text())["facts"]["dataset"]
    config = SAPOConfig(str(tmp_path / "other"), max_length=32, segment_length=4, use_cpu=True, report_to="none")
    trainer = SAPOTrainer(str(model), config, load_rows(data), processing_class=tokenizer)
    assert trainer._context.eos_ids == {1, 7}
    assert trainer.train_dataset[0]["response_ids"] == [[5, 7]]
    assert trainer._eval_pairs.digest(trainer.train_dataset) == saved


@pytest.fixture
def mixture(tmp_path):
    """A recipe for two files of different shapes."""
    rows = tiny_rows(8)
    shapes = {
        "pairs.jsonl": rows[:5],
        "questions.jsonl": [{"question": row["prompt"], "answer": row["chosen"]} for row in rows[5:]],
    }
    for name, content in shapes.items():
        write_rows(tmp_path / name, content)
    recipe = tmp_path / "mixture.yaml"
    members = [
        {"path": "json", "data_files": str(tmp_path / "pairs.jsonl")},
        {"path": str(tmp_path / "questions.jsonl")},
    ]
    recipe.write_text(yaml.safe_dump({"datasets": members}))
    return recipe


def mixed(model, recipe, out, *more):
    arguments = command(model, "", out, "--config", str(recipe), *more)
    place = arguments.index("--dataset_name")
    return arguments[:place] + arguments[place + 2 :]


def test_mixture_of_shapes_trains_evaluates_and_resumes(model, mixture, tmp_path, capsys):
    out = tmp_path / "run"
    mixture.write_text(mixture.read_text() + "test_split_size: 0.25\n")
    assert main(mixed(model, mixture, out, "--eval_strategy", "steps", "--eval_steps", "1")) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert "pairs.jsonl: format chosen, 5 rows, 5 examples kept" in shown
    assert "questions.jsonl: format question/answer, 3 rows, 3 examples kept" in shown
    assert '"eval_loss"' in (out / "metrics.jsonl").read_text()
    again = ["train", "--config", str(out / "recipe.yaml"), "--resume_from_checkpoint", "true", "--max_steps", "4"]
    assert main(again) == 0


def test_data_check_shows_a_mixture(model, mixture, capsys):
    titles = set()
    for seed in range(8):
        assert main(check(model, "--config", str(mixture), "--seed", str(seed))) == 0
        shown = capsys.readouterr().out.replace("\n", "")
        titles |= set(re.findall(r"Example: row (\d) of \S*(pairs|questions).jsonl", shown))
    assert {name for _, name in titles} == {"pairs", "questions"}
    assert all(int(row) <= 3 for row, name in titles if name == "questions")


def test_malformed_row_of_a_mixture_names_its_file(model, mixture, tmp_path, capsys):
    file = tmp_path / "questions.jsonl"
    content = file.read_text()
    file.write_text(content + '{"question": "w1"}\n')
    assert f"row 4 of {file}: lacks answer" in refused(mixed(model, mixture, tmp_path / "run"), capsys)
    file.write_text(content + '{"question": \n')
    assert f"{file}, line 4: not valid JSON" in refused(mixed(model, mixture, tmp_path / "run"), capsys)
    file.unlink()
    assert "no file or folder" in refused(mixed(model, mixture, tmp_path / "run"), capsys)
    mixture.write_text(mixture.read_text() + "eval_strategy: steps\n")
    file.write_text(content)
    message = refused(mixed(model, mixture, tmp_path / "run"), capsys)
    assert "needs rows to evaluate on: name them with eval_dataset_name, or set test_split_size" in message


def test_wrong_recipe_names_file_and_option(model, data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"segment_lenght": 3}))
    message = refused([*command(model, data, tmp_path / "run"), "--config", str(recipe)], capsys)
    assert "unknown option segment_lenght; nearest: segment_length" in message
    recipe.write_text(yaml.safe_dump({"objective": "ppo"}))
    message = refused([*command(model, data, tmp_path / "run"), "--config", str(recipe)], capsys)
    assert "recipe.yaml, line 1: objective=ppo: must be one of dpo, orpo, sft." in message


def test_model_too_large_for_the_machine_is_refused_before_loading(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sapo.weights.footprint.psutil.virtual_memory", lambda: type("M", (), {"available": 1000})())
    assert "before activations" in refused(command(model, data, tmp_path / "run"), capsys)


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.20 GiB is "
    "free. Process 7 has 77.9 GiB memory in use. See documentation for Memory Management (https://pytorch.org/docs)"
)


@pytest.mark.parametrize(
    ("part", "step", "lower"),
    [
        ("sapo.preference.scoring.summed_logps", 1, "--tokens_per_forward or --pairs_per_forward"),
        ("sapo.preference.scoring.summed_logps", 30, "--tokens_per_forward or --pairs_per_forward"),
        ("sapo.generation.decoding.DecodingRows", 2, "--generation_batch_size"),
    ],
)
def test_memory_that_runs_out_is_one_line_with_a_way_out(part, step, lower, model, data, tmp_path, capfd, monkeypatch):
    module, name = part.rsplit(".", 1)
    original, called = getattr(sys.modules[module], name), []

    def short(*args, **kwargs):
        called.append(0)
        if len(called) >= step:
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return original(*args, **kwargs)

    monkeypatch.setattr(sys.modules[module], name, short)
    assert main([*command(model, data, tmp_path / "run", "--max_steps", "20"), "--quiet"]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")
    assert f"1.20 GiB is free. Lower {lower}" in line
    assert line.endswith("go on with --resume_from_checkpoint true.")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_signal_writes_a_checkpoint_and_ends_cleanly(number, model, data, tmp_path, start):
    out = tmp_path / "run"
    run = [sys.executable, "-m", "sapo", *command(model, data, out, "--max_steps", "100000")]
    process = start(
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


def test_a_quiet_run_says_nothing_and_writes_everything(model, data, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(command(model, data, out, "--quiet")) == 0
    assert capfd.readouterr().out == ""
    assert {"model.safetensors", "report.html", "pairs.jsonl"} <= {file.name for file in out.iterdir()}
