"""Laws of data parallelism: two real processes train to what one trains to on the same global batch."""

import json

import pytest
import torch

from tests.distributed.processes import FIXED_DRAWS, run

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
