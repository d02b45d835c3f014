"""Runs of the command line with vLLM in the training process: what they end with, and after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sapo.runs.checkpoint import verify
from tests.colocated import NEEDS_VLLM, model
from tests.runs import metrics_of
from tests.tiny import tiny_tokenizer, write_rows

pytestmark = NEEDS_VLLM

ROOT = Path(__file__).parents[2]
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]
TIMES = ("time/", "memory/", "tokens_per_second", "train_")


@pytest.fixture
def begin(tmp_path, start):
    model(0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl")

    def started(folder, *more):
        command = [
            "train", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "train.jsonl"),
            "--use_cpu", "--gradient_checkpointing", "false", "--generation_backend", "vllm_colocate",
            "--max_steps", "12", "--per_device_train_batch_size", "2", "--max_length", "32", "--segment_length", "4",
            "--logging_steps", "1", "--learning_rate", "1e-2", "--save_strategy", "steps", "--save_steps", "2",
            "--ref_model_sync_steps", "3", "--chosen_probe_size", "2", "--report_to", "none", "--output_dir",
            str(folder), "--resume_from_checkpoint", "auto", *more,
        ]  # fmt: skip
        own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        with (tmp_path / "errors").open("w") as errors:
            return start(
                [sys.executable, "-m", "sapo", *command],
                env=os.environ | own,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    return started


def losses(folder):
    rows = metrics_of(folder)
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows if "loss" in row]


def same(ours, theirs):
    ours, theirs = load_file(ours), load_file(theirs)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="dense"),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),
        pytest.param([*LORA, "--sync_opponent_steps", "3"], id="lora-every-third", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_bit_equal_to_one_that_was_not(more, begin, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert begin(whole, *more).wait(300) == 0, (tmp_path / "errors").read_text()[-2000:]
    run = begin(killed, *more)
    until = time.monotonic() + 300
    while not (killed / "checkpoint-4").exists():
        assert run.poll() is None, (tmp_path / "errors").read_text()[-2000:]
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(60) == -signal.SIGKILL
    assert not (killed / "checkpoint-12").exists()
    verify(killed / "checkpoint-4")
    assert begin(killed, *more).wait(300) == 0, (tmp_path / "errors").read_text()[-2000:]
    name = "adapter_model.safetensors" if more else "model.safetensors"
    for file in (name, f"opponent/{name}"):
        assert same(killed / file, whole / file)
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 12
    # Neither what the killed run had on its way to the engine nor what this one had.
    assert not (killed / "engine").exists()
