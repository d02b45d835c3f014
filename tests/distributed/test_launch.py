"""Laws of launching: `sapo train --accelerate_config` runs the command in as many processes as were asked for."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from sapo.commands.catalog import COMMANDS
from sapo.commands.launch import CONFIGS, config_file, is_asked_for, launcher_flags
from sapo.commands.main import main
from sapo.commands.parser import parse_command
from sapo.errors import ConfigurationError
from sapo.runs.checkpoint import verify
from tests.distributed.processes import ROOT
from tests.tiny import save_tiny, tiny_llama, write_rows


@pytest.fixture
def command(tmp_path):
    save_tiny(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl")
    return [
        "train", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "train.jsonl"),
        "--use_cpu", "--ddp_backend", "gloo", "--max_steps", "2", "--per_device_train_batch_size", "2",
        "--max_length", "32", "--segment_length", "4", "--logging_steps", "1", "--learning_rate", "0.1",
        "--optim", "sgd", "--report_to", "none", "--output_dir",
    ]  # fmt: skip


@pytest.fixture
def begin(start):
    path = f"{ROOT / 'tests/distributed/on_cpu'}:{ROOT / 'src'}:{ROOT}"

    def begin(devices, arguments):
        return start(
            [sys.executable, "-m", "tests.distributed.launch_on_cpu", str(devices), *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def end(started, folder, processes):
    """The weights; the checkpoint tells how many processes wrote it."""
    for process in started:
        shown, told = process.communicate(timeout=240)
        assert process.returncode == 0, told[-8000:]
        # Of several processes the first speaks.
        assert shown.count("Done after step 2 of 2") <= 1
    state = json.loads((folder / "checkpoint-2" / "sapo_state.json").read_text())
    assert state["facts"]["world_size"] == processes
    return state["facts"], load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "sharding"), [("multi_gpu", "none"), pytest.param("fsdp2", "fsdp2", marks=pytest.mark.slow)]
)
def test_the_command_runs_on_every_device(config, sharding, command, tmp_path, begin):
    folder = tmp_path / "run"
    started = begin(2, [*command, str(folder), "--accelerate_config", config])
    facts, weights = end([started], folder, 2)
    assert facts["sharding"] == sharding
    assert not torch.equal(weights["lm_head.weight"], tiny_llama().lm_head.weight)


@pytest.mark.slow
def test_two_machines_train_to_what_one_machine_with_as_many_devices_does(command, tmp_path, begin):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, two = tmp_path / "one", tmp_path / "two"
    _, expected = end([begin(2, [*command, str(one), "--accelerate_config", "multi_gpu"])], one, 2)
    machines = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    started = [
        begin(1, [*command, str(two), "--accelerate_config", "multi_gpu", *machines, "--machine_rank", str(rank)])
        for rank in range(2)
    ]
    _, own = end(started, two, 2)
    assert all(torch.equal(own[name], weight) for name, weight in expected.items())


@pytest.mark.slow
def test_a_failing_process_is_named_and_its_message_shown(command, tmp_path, begin):
    started = begin(2, [*command, str(tmp_path / "run"), "--accelerate_config", "multi_gpu", "--beta", "0"])
    _, told = started.communicate(timeout=240)
    assert started.returncode == 2
    assert "beta=0" in told
    assert "TrainingError: process" in told


def test_a_stop_signal_ends_all_processes_at_the_same_step_with_a_checkpoint(command, tmp_path, begin):
    folder = tmp_path / "run"
    started = begin(2, [*command, str(folder), "--accelerate_config", "multi_gpu", "--max_steps", "100000"])
    until = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists():
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    shown, told = started.communicate(timeout=120)
    assert started.returncode == 0, told[-8000:]
    step = int(re.search(r"Stopped after step (\d+) of 100000", shown)[1])
    verify(folder / f"checkpoint-{step}")


def test_a_shipped_configuration_is_found_by_name_and_a_misspelt_one_gets_the_nearest():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {"multi_gpu", "zero2", "zero3", "fsdp2"}
    assert config_file("zero3").is_file()
    with pytest.raises(ConfigurationError, match="nearest: zero3"):
        config_file("zero-3")


def test_the_launcher_gets_its_flags_and_the_run_the_others():
    train = COMMANDS["train"]
    given = parse_command(train, ["--accelerate_config=zero3", "--beta", "0.1", "--num_machines", "2"])
    assert launcher_flags(given.own) == {"--accelerate_config": "zero3", "--num_machines": "2"}
    assert given.rest == ["--beta", "0.1"]
    with pytest.raises(ConfigurationError, match="--num_processes needs a value"):
        parse_command(train, ["--num_processes", "--beta"])


def test_flags_of_the_launcher_are_never_ignored(monkeypatch):
    train = COMMANDS["train"]
    with pytest.raises(ConfigurationError, match="--num_machines belongs to --accelerate_config"):
        is_asked_for(parse_command(train, ["--num_machines", "2"]).own)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigurationError, match="starts the processes itself"):
        is_asked_for(parse_command(train, ["--accelerate_config", "zero3"]).own)


def test_without_a_gpu_the_way_out_is_named(capsys):
    needed = ["--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--output_dir", "run"]
    assert main(["train", "--accelerate_config", "multi_gpu", *needed]) == 2
    assert "torchrun --nproc_per_node" in capsys.readouterr().err
