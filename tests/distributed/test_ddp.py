"""Laws of data parallelism: two real processes train to what one trains to on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

# A buffer that holds the newest batch and is drawn empty: then the draws do not depend on the number of processes.
FIXED_DRAWS = {"replay_replacement": False, "skip_identical": False}


def run(folder, processes, *, lora=False, resume=None, **options):
    batch = 4 // processes
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "replay_buffer_size": batch,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "segment_length": 4,
        "max_length": 32,
        "chosen_probe_size": 0,
        "use_cpu": True,
        "ddp_backend": "gloo" if processes > 1 else None,
        "gradient_checkpointing": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "layout": "shared",
    } | options
    folder.mkdir(exist_ok=True)
    asked = folder.parent / f"{folder.name}-{settings['max_steps']}.json"
    asked.write_text(
        json.dumps(
            {
                "options": settings,
                "lora": lora,
                "processes": processes,
                "resume": resume,
                "distributed_type": "MULTI_CPU" if processes > 1 else "NO",
            }
        )
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "tests.distributed.worker", str(asked)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "end.safetensors")


VARIANTS = {
    "dpo": {"objective": "dpo", "reference_sync_steps": 2},
    "orpo-lora": {"objective": "orpo", "lora": True},
    "paired": {"objective": "dpo", "pair_source": "paired"},
    "passes": {"objective": "dpo", "pairs_per_forward": 1, "steps_per_generation": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_to_the_weights_of_one(name, tmp_path):
    options = FIXED_DRAWS | VARIANTS[name]
    one, two = run(tmp_path / "one", 1, **options), run(tmp_path / "two", 2, **options)
    assert one.keys() == two.keys()
    for weight, expected in one.items():
        # The gradients of the processes are averaged in another order than a sum over one batch: rounding only.
        torch.testing.assert_close(two[weight], expected, rtol=1e-5, atol=1e-6, msg=weight)


def test_two_processes_resume_bit_for_bit(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    options |= {"save_strategy": "steps", "save_steps": 2, "steps_per_generation": 4, "max_steps": 3}
    whole = run(tmp_path / "whole", 2, **options)
    again = run(tmp_path / "again", 2, resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_metrics_are_those_of_all_processes(tmp_path):
    options = FIXED_DRAWS | {"logging_steps": 1}
    for processes, name in ((1, "one"), (2, "two")):
        run(tmp_path / name, processes, **options)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    compared = {
        "loss",
        "train_loss",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "self_play/rejected_length",
    }
    for ours, theirs in zip(two, one, strict=True):
        for name in compared & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
