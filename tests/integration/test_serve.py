"""Laws of `sapo serve`: it starts the servers of a recipe, runs it beside them, and stops them."""

import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from sapo.commands.main import main
from tests.integration.test_engine_queue import same
from tests.runs import metrics_of
from tests.tiny import tiny_rows, write_rows
from tests.vllm_servers import LENGTH, NO_VLLM, PORT, vllm_python


@pytest.fixture
def recipe(served, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny_rows()]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model_name_or_path: {served}\ndataset_name: {data}\noutput_dir: {tmp_path / 'run'}\nuse_cpu: true\n"
        f"max_steps: 3\nper_device_train_batch_size: 2\nsegment_length: 4\nmax_length: {LENGTH}\nmax_staleness: 1\n"
        f"logging_steps: 1\ngeneration_backend: vllm_server\nvllm_server_url: http://127.0.0.1:{PORT + 1}\n"
        "report_to: none\nvllm_server_timeout: 5\n"
    )
    return file


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason=NO_VLLM)
def test_serve_starts_servers_trains_and_stops_them(recipe, tmp_path):
    command = [sys.executable, "-m", "sapo", "serve", "--config", str(recipe), "--train", "--vllm_python"]
    done = subprocess.run(
        [*command, vllm_python(), "--", "--enforce-eager"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Done after step 3 of 3" in done.stdout
    rows = metrics_of(tmp_path / "run")
    assert [row["self_play/staleness"] for row in rows if "loss" in row] == [0, 1, 1]
    assert not (tmp_path / "run" / "engine").exists()
    left = subprocess.run(["pgrep", "-f", f"port {PORT + 1}"], capture_output=True, text=True, check=False).stdout
    assert left == ""


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason=NO_VLLM)
def test_serve_says_why_a_server_ended(recipe, tmp_path, capsys):
    flags = ["--vllm_python", vllm_python(), "--", "--enforce-eager", "--max-num-seqs", "0"]
    assert main(["serve", "--config", str(recipe), *flags]) == 2
    shown = capsys.readouterr().err
    assert "GenerationError: vLLM at http://127.0.0.1:" in shown
    assert str(tmp_path / f"run-vllm-{PORT + 1}.log") in shown


def test_serve_stops_at_a_signal(recipe, tmp_path, start):
    """With a server that is none: it sleeps, and would for long."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 300\n")
    python.chmod(0o755)
    command = [sys.executable, "-m", "sapo", "serve", "--config", str(recipe), "--vllm_python", str(python)]
    process = start(command, stdout=subprocess.PIPE, text=True)
    assert "Starting vLLM" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_serve_without_vllm_or_with_clashing_flags_says_so(recipe, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = ["serve", "--config", str(recipe)]
    assert main(command) == 2
    assert "name an interpreter that has vLLM with --vllm_python" in capsys.readouterr().err
    assert main([*command, "--vllm_python", "x", "--devices", "0", "--devices", "1"]) == 2
    assert "--devices is given 2 times and there are 1 servers" in capsys.readouterr().err
    assert main([*command, "--vllm_python"]) == 2
    assert "--vllm_python needs a value" in capsys.readouterr().err
    assert main([*command, "--generation_backend", "transformers", "--max_staleness", "0"]) == 2
    assert "ConfigurationError" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("staleness", ["0", "2"])
@pytest.mark.parametrize("lora", ["false", "true"])
def test_a_run_killed_with_its_server_ends_like_an_undisturbed_one(lora, staleness, real, recipe, tmp_path, start):
    """SIGKILL to both in the middle, sampled text, another start of both."""
    flags = ["--vllm_server_url", real.url, "--max_staleness", staleness, "--use_peft", lora, "--lora_r", "4"]
    flags += ["--max_steps", "12", "--save_strategy", "steps", "--save_steps", "2", "--vllm_server_timeout", "90"]
    command = [sys.executable, "-m", "sapo", "train", "--config", str(recipe), *flags, "--output_dir"]
    real.wait()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    process = start([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint-4" / "sapo_manifest.json").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    real.restart()
    again = [*command, str(tmp_path / "killed"), "--resume_from_checkpoint", "true"]
    subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
    for file in ("adapter_model" if lora == "true" else "model", "opponent"):
        name = f"{file}.safetensors" if file != "opponent" else "checkpoint-12/opponent.safetensors"
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert same(ours, theirs)
