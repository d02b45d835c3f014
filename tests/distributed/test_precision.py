"""Laws of precision with several processes: every role computes alike, with the fused head too."""

import math

import pytest

from sapo.config import HAS_FUSED_LM_HEAD
from tests.distributed.processes import FIXED_DRAWS, run, start
from tests.runs import metrics_of
from tests.tiny import SIZE_IN_4_BITS, tiny_llama

SLOW = pytest.mark.slow
OPTIONS = FIXED_DRAWS | {"max_steps": 1, "logging_steps": 1, "bf16": True}


def first_line(folder):
    return metrics_of(folder, "loss")[0]


@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="trl 1.16 or newer")
@pytest.mark.parametrize(
    ("strategy", "objective", "lora"),
    [
        pytest.param(strategy, objective, lora, marks=[] if (strategy, objective, lora) in quick else [SLOW])
        for quick in [{("zero3", "dpo", False), ("fsdp2", "dpo", False)}]
        for strategy in ("ddp", "zero2", "zero3", "fsdp2")
        for objective, lora in (("dpo", False), ("dpo", True), ("orpo", False))
    ],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
def test_the_first_margin_is_exactly_zero_and_the_fused_head_is_the_gathered_one(
    strategy, objective, lora, dtype, tmp_path
):
    found = []
    # trl's fused head fails in the backward pass of a head that ZeRO-3 shards: refused.
    heads = (False,) if strategy == "zero3" else (True, False)
    for fused in heads:
        options = OPTIONS | {"objective": objective, "lora": lora, "dtype": dtype, "fused_lm_head": fused}
        run(tmp_path / f"fused-{fused}", 2, strategy=strategy, **options)
        found.append(first_line(tmp_path / f"fused-{fused}"))
        if objective == "dpo":
            assert found[-1]["rewards/margins"] == found[-1]["rewards/chosen"] == 0
            assert found[-1]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    for name in ("logps/chosen", "logps/rejected"):
        # Of some 40 nats; in bfloat16 sums of that size lie a quarter of a nat apart.
        assert found[0][name] == pytest.approx(found[-1][name], abs=0.02), name


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("dtype", "bf16", "reference"),
    [
        ("float32", False, "opponent_copy"),
        ("bfloat16", False, "opponent_copy"),
        ("float32", True, "initial"),
        ("bfloat16", True, "initial"),
        ("bfloat16", True, "opponent"),
    ],
)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_the_first_margin_is_exactly_zero_in_every_precision_with_every_reference(
    strategy, dtype, bf16, reference, lora, tmp_path
):
    if (strategy, dtype, bf16, lora) == ("fsdp2", "bfloat16", False, False):
        return  # refused: it would keep no float32 masters
    options = OPTIONS | {"bf16": bf16, "reference": reference, "lora": lora, "dtype": dtype}
    run(tmp_path / "run", 2, strategy=strategy, **options)
    first = first_line(tmp_path / "run")
    assert first["rewards/margins"] == first["rewards/chosen"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("strategy", [*(pytest.param(name, marks=SLOW) for name in ("ddp", "zero2", "zero3")), "fsdp2"])
def test_in_4_bits_the_first_margin_is_exactly_zero_and_a_resume_bit_identical(strategy, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(**SIZE_IN_4_BITS).save_pretrained(tmp_path / "model")
    options = OPTIONS | {"lora": True, "quantized": str(tmp_path / "model"), "strategy": strategy, "max_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    whole = run(tmp_path / "whole", 2, **options)
    first, second = metrics_of(tmp_path / "whole", "loss")
    assert first["rewards/margins"] == first["rewards/chosen"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert 0 < second["grad_norm"] < 10
    assert second["optimizer/moved_fraction"] > 0.5
    again = run(tmp_path / "again", 2, resume=str(tmp_path / "whole" / "checkpoint-1"), **options)
    assert all((again[name] == whole[name]).all() for name in whole)


def test_a_fused_head_is_refused_with_zero3(tmp_path):
    done = start(tmp_path / "run", 2, strategy="zero3", fused_lm_head=True)
    assert done.returncode != 0
    assert "ConfigurationError: fused_lm_head=true with ZeRO-3" in done.stderr


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(name, marks=SLOW) for name in ("zero2", "zero3", "fsdp2"))])
def test_bfloat16_weights_move_at_a_small_rate(strategy, tmp_path):
    options = {"dtype": "bfloat16", "optim": "rmsprop", "learning_rate": 5e-7, "max_steps": 2}
    run(tmp_path / "run", 2, strategy=strategy, **OPTIONS | options)
    assert first_line(tmp_path / "run")["optimizer/moved_fraction"] > 0.5


def test_a_run_of_two_processes_with_masters_resumes_bit_for_bit(tmp_path):
    options = OPTIONS | {"dtype": "bfloat16", "optim": "adamw_torch", "learning_rate": 5e-7, "max_steps": 3}
    options |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = run(tmp_path / "whole", 2, **options)
    again = run(tmp_path / "again", 2, resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert all((again[name] == whole[name]).all() for name in whole)
