"""lm-evaluation-harness for real, on a small pretrained model: needs the extra `evaluation`, NLTK's and test data."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from sapo.commands.main import main
from sapo.errors import EvaluationError
from sapo.evaluation.harness import LEADERBOARD
from sapo.evaluation.harness_data import builtin_tasks, mmlu_subjects, require_packages
from tests import leaderboard
from tests.shared_data import DATA, needs_data

MODEL = DATA / "stories260k_llama" / "hf"
pytestmark = [
    pytest.mark.slow,
    needs_data,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="no lm_eval (extra evaluation)"),
]


def evaluate(folder, *arguments):
    flags = ["--task_data", str(DATA), "--output_dir", str(folder), "--device", "cpu", "--batch_size", "8"]
    return main(["evaluate", str(MODEL), *map(str, arguments), *flags])


@pytest.mark.parametrize(
    ("suite", "task", "shots", "metrics"),
    [
        ("leaderboard", "gsm8k", 5, {"gsm8k": "exact_match,strict-match"}),
        (
            "ifeval",
            "ifeval",
            0,
            {
                "prompt strict": "prompt_level_strict_acc,none",
                "instruction strict": "inst_level_strict_acc,none",
                "prompt loose": "prompt_level_loose_acc,none",
                "instruction loose": "inst_level_loose_acc,none",
            },
        ),
    ],
)
def test_harness_gives_the_numbers_of_its_own_command_line(suite, task, shots, metrics, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        require_packages([task])
    except EvaluationError as error:
        pytest.skip(str(error))
    assert evaluate(tmp_path, "--suite", suite, "--tasks", task, "--limit", 24, "--max_new_tokens", 96) == 0
    ours = json.loads((tmp_path / "results.json").read_text())["suites"][suite]["models"]["hf"]["measures"]
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={MODEL},dtype=auto",
    ]
    command += ["--tasks", task, "--num_fewshot", str(shots), "--batch_size", "8", "--device", "cpu", "--limit", "24"]
    command += ["--gen_kwargs", "max_gen_toks=96", "--include_path", str(tmp_path / "lm_eval_tasks")]
    command += ["--log_samples", "--output_path", str(tmp_path / "theirs")]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"][task]
    assert {name: ours[name]["value"] for name in metrics} == {name: theirs[key] for name, key in metrics.items()}
    (samples,) = (tmp_path / "theirs").rglob("samples_*.jsonl")
    digest = hashlib.sha256()
    for line in samples.read_text().splitlines():
        digest.update(json.dumps(json.loads(line)["resps"]).encode())
    (parts,) = (tmp_path / "lm_eval").glob("*.jsonl")
    assert json.loads(parts.read_text().splitlines()[0])["responses"] == digest.hexdigest()


def test_all_six_tasks_of_the_leaderboard_give_the_numbers_of_its_own_command_line(tmp_path, monkeypatch):
    """From local files in the shapes of the datasets, with rows of our own; every subject of MMLU."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data, out = tmp_path / "data", tmp_path / "out"
    leaderboard.write(data, mmlu_subjects(builtin_tasks()))
    model = os.environ.get("SAPO_TEST_REAL_MODEL") or str(MODEL)
    flags = ["--task_data", str(data), "--output_dir", str(out), "--device", "cpu", "--batch_size", "8"]
    assert main(["evaluate", model, "--suite", "leaderboard", "--max_new_tokens", "48", *flags]) == 0
    suite = json.loads((out / "results.json").read_text())["suites"]["leaderboard"]["models"]
    ((_, ours),) = suite.items()
    for one in LEADERBOARD:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
        command += [f"pretrained={model},dtype=auto", "--tasks", one.name, "--num_fewshot", str(one.shots)]
        command += ["--batch_size", "8", "--device", "cpu", "--include_path", str(out / "lm_eval_tasks")]
        command += ["--output_path", str(tmp_path / "theirs" / one.name)]
        if one.name == "gsm8k":
            command += ["--gen_kwargs", "max_gen_toks=48"]
        subprocess.run(command, check=True, capture_output=True)
        (file,) = (tmp_path / "theirs" / one.name).rglob("results_*.json")
        theirs = json.loads(file.read_text())["results"][one.name]
        for key, name in one.metrics.items():
            # The mean of the subjects of MMLU is summed in another order.
            assert ours["measures"][name]["value"] == pytest.approx(theirs[key], abs=1e-12), one.name
    print({name: one["value"] for name, one in ours["measures"].items()})


def test_finished_task_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ("--suite", "leaderboard", "--tasks", "gsm8k", "--limit", 2, "--max_new_tokens", 8)
    assert evaluate(tmp_path, *command) == 0
    first = json.loads((tmp_path / "results.json").read_text())["suites"]["leaderboard"]["models"]
    monkeypatch.setattr(subprocess, "Popen", None)
    assert evaluate(tmp_path, *command) == 0
    assert json.loads((tmp_path / "results.json").read_text())["suites"]["leaderboard"]["models"] == first


def test_task_without_data_or_network_is_one_line(tmp_path, monkeypatch, capsys):
    # In the process of its own: the libraries read the variable when they are imported.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    command = [
        sys.executable,
        "-m",
        "sapo",
        "evaluate",
        str(MODEL),
        "--suite",
        "leaderboard",
        "--tasks",
        "winogrande",
    ]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("DatasetError: winogrande: its data could not be loaded")
    assert "--task_data" in last


def test_responses_longer_than_the_model_are_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert evaluate(tmp_path, "--suite", "leaderboard", "--tasks", "gsm8k", "--max_new_tokens", 512) == 2
    assert "--max_new_tokens 256" in capsys.readouterr().err
    assert not (tmp_path / "lm_eval").exists()
