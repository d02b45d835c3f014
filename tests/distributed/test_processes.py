"""Laws of several processes: they train to what one trains to on the same global batch, sharded or not."""

import functools
import json
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.processes import FIXED_DRAWS, run, start
from tests.runs import metrics_of
from tests.tiny import save_tiny
from tests.vllm_servers import StandIn

SLOW = pytest.mark.slow

VARIANTS = {
    "dpo": {"objective": "dpo", "ref_model_sync_steps": 2},
    "orpo-lora": {"objective": "orpo", "lora": True},
    "paired": {"objective": "dpo", "pair_source": "paired"},
    "passes": {"objective": "dpo", "pairs_per_forward": 1, "steps_per_generation": 2},
    "orpo": {"objective": "orpo", "layout": "plain"},
    "dpo-lora": {"objective": "dpo", "lora": True, "pairs_per_forward": 1},
    "opponent": {"objective": "dpo", "reference": "opponent", "ema_decay": 0.9},
    "tied": {"objective": "dpo", "tied": True},
    "grown": {"objective": "dpo", "chat_template_path": str(Path(__file__).with_name("grown.jinja"))},
    "rare": {"objective": "dpo", "generation_interval": 2, "eval_strategy": "steps", "eval_steps": 2},
}
QUICK = {
    "ddp": ["dpo", "orpo-lora"],
    "zero2": ["dpo"],
    "zero3": ["dpo", "dpo-lora", "grown"],
    "fsdp2": ["passes", "orpo-lora"],
}
ALL = [
    pytest.param(strategy, name, marks=[] if name in quick else [SLOW])
    for strategy, quick in QUICK.items()
    for name in VARIANTS
]


@functools.cache
def one_process(name):
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder) / "one", 1, **FIXED_DRAWS | VARIANTS[name])


@pytest.mark.parametrize(("strategy", "name"), ALL)
def test_two_processes_train_to_the_weights_of_one(strategy, name, tmp_path):
    one, two = one_process(name), run(tmp_path / "two", 2, strategy=strategy, **FIXED_DRAWS | VARIANTS[name])
    assert one.keys() == two.keys()
    for weight, expected in one.items():
        # The gradients of the processes are averaged in another order than a sum over one batch: rounding only.
        torch.testing.assert_close(two[weight], expected, rtol=1e-5, atol=1e-6, msg=weight)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=SLOW)])
def test_two_processes_keep_their_start_like_one(strategy, tmp_path):
    options = {"objective": "sft", "kl_weight": 2.0, "token_weighting": "probability"}
    options |= {"replay_share": 0.5, "replay_max_new_tokens": 5}
    one, two = run(tmp_path / "one", 1, **options), run(tmp_path / "two", 2, strategy=strategy, **options)
    for weight, expected in one.items():
        torch.testing.assert_close(two[weight], expected, rtol=1e-5, atol=1e-6, msg=weight)


@pytest.fixture
def engine(tmp_path):
    """What answers like a vLLM server, in this process."""
    save_tiny(tmp_path / "served")
    server = StandIn(tmp_path / "served")
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("strategy", "name", "staleness", "transfer"),
    [
        pytest.param("ddp", "orpo-lora", 2, "folder", marks=SLOW),
        ("fsdp2", "dpo", 0, "stream"),
        pytest.param("ddp", "dpo", 0, "stream", marks=SLOW),
        pytest.param("fsdp2", "dpo", 2, "folder", marks=SLOW),
        pytest.param("fsdp2", "orpo-lora", 1, "folder", marks=SLOW),
        pytest.param("zero3", "dpo", 1, "stream", marks=SLOW),
        pytest.param("zero3", "dpo", 0, "folder", marks=SLOW),
        pytest.param("zero2", "dpo", 1, "folder", marks=SLOW),
    ],
)
def test_two_processes_with_a_server_train_to_the_weights_of_one(strategy, name, staleness, transfer, engine, tmp_path):
    options = FIXED_DRAWS | VARIANTS[name] | {"generation_backend": "vllm_server", "vllm_server_url": [engine.url]}
    options |= {"max_staleness": staleness, "vllm_weights_transfer": transfer}
    one = run(tmp_path / "one", 1, **options)
    two = run(tmp_path / "two", 2, strategy=strategy, **options)
    for weight, expected in one.items():
        torch.testing.assert_close(two[weight], expected, rtol=1e-5, atol=1e-6, msg=weight)
    loads = [body for path, body in engine.asked if path in ("/collective_rpc", "/v1/load_lora_adapter")]
    # One process hands the weights over, once a step.
    assert len(loads) == 2 * 3


@SLOW
@pytest.mark.parametrize("name", ["dpo", "orpo-lora", "paired", "tied"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_both_layouts_train_several_processes_to_the_same_weights(strategy, name, tmp_path):
    shared, plain = (
        run(tmp_path / layout, 2, strategy=strategy, **FIXED_DRAWS | VARIANTS[name] | {"layout": layout})
        for layout in ("shared", "plain")
    )
    assert shared.keys() == plain.keys()
    for weight, expected in plain.items():
        torch.testing.assert_close(shared[weight], expected, rtol=1e-5, atol=1e-6, msg=weight)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize(
    "strategy",
    ["ddp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow), "fsdp2"],
)
def test_two_processes_resume_bit_for_bit(strategy, lora, tmp_path):
    options = {
        "strategy": strategy,
        "lora": lora,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    options |= {"save_strategy": "steps", "save_steps": 2, "steps_per_generation": 4, "max_steps": 3}
    whole = run(tmp_path / "whole", 2, **options)
    again = run(tmp_path / "again", 2, resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("strategy", "earlier", "later"),
    [
        ("ddp", 2, 1),
        pytest.param("ddp", 1, 2, marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_inherits_every_pair(strategy, earlier, later, tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 2,
        "replay_buffer_size": 64,
        "strategy": strategy,
    }
    options |= {"optim": "adamw_torch", "skip_identical": False}
    before = run(tmp_path / "run", earlier, **options)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    # No step more: what was read is written as it is.
    after = run(tmp_path / "again", later, resume=str(checkpoint), **options | {"save_steps": 1})
    assert all(torch.equal(after[name], before[name]) for name in before)
    kept, dealt = (
        [load_file(folder / f"replay_buffer_{process}.safetensors") for process in range(processes)]
        for folder, processes in ((checkpoint, earlier), (tmp_path / "again" / "resumed", later))
    )
    assert sum(len(part["steps"]) for part in kept) == 16
    for column in ("steps", "draws", "places", "chosen_ids", "rejected_ids"):
        one, other = (sorted(row for part in parts for row in part[column].tolist()) for parts in (kept, dealt))
        assert one == other, column


def test_metrics_are_those_of_all_processes(tmp_path):
    options = FIXED_DRAWS | {"logging_steps": 1}
    for processes, name in ((1, "one"), (2, "two")):
        run(tmp_path / name, processes, **options)
    one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
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


STRATEGIES = ["ddp", *(pytest.param(strategy, marks=SLOW) for strategy in ("zero2", "zero3", "fsdp2"))]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_failing_process_ends_all_soon_with_its_own_error(strategy, tmp_path):
    began = time.monotonic()
    done = start(tmp_path / "run", 2, strategy=strategy, fault={"kind": "error", "process": 1, "step": 2})
    assert done.returncode != 0
    assert "ModelError: this process cannot go on" in done.stderr
    assert time.monotonic() - began < 90


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_gradient_of_one_process_changes_nothing_in_any(strategy, tmp_path):
    options = {"strategy": strategy, "max_steps": 2, "logging_steps": 1, "optim": "adamw_torch"}
    good = run(tmp_path / "good", 2, **options | {"max_steps": 1})
    bad = run(tmp_path / "bad", 2, fault={"kind": "nan", "process": 1, "step": 2}, **options)
    # The second step did nothing, to the opponent either.
    assert all(torch.equal(bad[name], weight) for name, weight in good.items())
    rows = metrics_of(tmp_path / "bad")
    assert [row["nonfinite_step_fraction"] for row in rows if "loss" in row] == [0, 1]


@SLOW
def test_local_measures_are_of_all_rows_whoever_has_them(tmp_path):
    options = FIXED_DRAWS | {"objective": "orpo", "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"eval_local": True, "eval_local_size": 3, "eval_local_max_time_fraction": 1.0}
    options |= {"eval_retention": True, "eval_retention_size": 3, "eval_retention_max_time_fraction": 1.0}
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run(folder, processes, **options)
        rows = metrics_of(folder)
        first = next(row for row in rows if "eval_local/nll" in row)
        kept = ("local/", "retention/")
        found.append({key: one for key, one in first.items() if any(k in key for k in kept) and "time" not in key})
    assert found[0].keys() == found[1].keys()
    assert found[1] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_the_first_process_keeps_pairs_for_the_report(strategy, tmp_path):
    run(tmp_path / "two", 2, strategy=strategy, objective="dpo", report_pairs=20)
    rows = [json.loads(line) for line in (tmp_path / "two/pairs.jsonl").read_text().splitlines()]
    followed = [row for row in rows if row["kind"] == "followed"]
    assert [row["step"] for row in followed] == [0] * 4 + [2] * 4 + [3] * 4
    assert all(isinstance(row["margin"], float) for row in rows)
    assert (tmp_path / "two/report.html").is_file()
