"""Float32 masters rounded to bfloat16 by fixed thresholds: nothing is lost on average, and nothing moves by itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from peft import LoraConfig, get_peft_model

from sapo.weights import rounding
from sapo.weights.opponent import ModelCopy, policy_tensors
from sapo.weights.rounding import PERIOD, round_to
from sapo.weights.starts import merge_adapter
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
floats = st.floats(width=32, allow_nan=False)


def rounded(master):
    return rounding.rounded(master, torch.bfloat16)


def by_formula(master):
    """The same, a weight at a time, in Python's integers."""
    found = []
    for index, value in enumerate(master.flatten().tolist()):
        bits = int(torch.tensor(abs(value)).view(torch.int32))
        kept = (bits + int(rounding._thresholds(CPU)[index % PERIOD])) // 65536 * 65536
        found.append(math.copysign(float(torch.tensor(kept, dtype=torch.int32).view(torch.float32)), value))
    return torch.tensor(found).view(master.shape)


@given(arrays.arrays("float32", st.integers(1, 40), elements=floats))
def test_it_is_the_formula(values):
    master = torch.from_numpy(values)
    assert torch.equal(rounded(master).float(), by_formula(master))


@given(arrays.arrays("float32", st.integers(1, 40), elements=floats))
def test_what_bfloat16_can_hold_stays_as_it_is_and_the_rest_goes_to_a_neighbour(values):
    held = torch.from_numpy(values).bfloat16()
    assert torch.equal(rounded(held.float()), held)
    master = torch.from_numpy(values)
    below = (master.view(torch.int32) & -65536).view(torch.float32)
    above = ((master.view(torch.int32) | 65535) + 1).view(torch.float32)
    result = rounded(master).float()
    assert ((result == below) | (result == above)).all()


@given(arrays.arrays("float32", 30, elements=floats), arrays.arrays("float32", 30, elements=floats))
def test_a_weight_never_moves_against_its_master(one, other):
    low, high = torch.from_numpy(one.clip(max=other)), torch.from_numpy(other)
    assert (rounded(low).float() <= rounded(high).float()).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_stay(value):
    kept = rounded(torch.full((100,), value))
    assert kept.isnan().all() if math.isnan(value) else (kept == value).all()
    assert rounded(torch.full((100,), 0x7F800001, dtype=torch.int32).view(torch.float32)).isnan().all()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7])
@pytest.mark.parametrize("start", [0.0234375, -1.5])
def test_a_small_step_moves_as_many_weights_as_it_is_long(start, share):
    master = torch.full((PERIOD,), start)
    step = (rounded(torch.tensor([start * 1.01])).float() - start).abs().item()
    spacing = 2.0 ** (math.floor(math.log2(abs(start))) - 7)
    assert step >= spacing
    moved = rounded(master + share * spacing).float() - start
    spread = math.sqrt(share * (1 - share) / PERIOD)
    assert moved.mean().item() / spacing == pytest.approx(share, abs=4 * spread)
    assert set(moved.unique().tolist()) == {0.0, spacing}


def test_thresholds_are_spread_evenly_and_repeat():
    table = rounding._thresholds(CPU)
    counts = torch.histc(table.float(), 16, 0, 65536)
    assert counts.min() > 0.95 * PERIOD / 16
    master = torch.linspace(0.01, 0.02, 3).repeat_interleave(2 * PERIOD + 10)[: 2 * PERIOD + 10].fill_(0.0123)
    result = rounded(master)
    assert torch.equal(result[:PERIOD], result[PERIOD : 2 * PERIOD])
    assert torch.equal(result[:10], result[-10:])


def test_more_periods_at_once_as_on_a_gpu_change_nothing(monkeypatch):
    master = torch.randn(3 * PERIOD + 17)
    expected, table = rounded(master), rounding._thresholds(CPU)
    monkeypatch.setattr(rounding, "_thresholds", lambda device: table.repeat(2))
    assert torch.equal(rounded(master), expected)


def test_the_layout_in_memory_changes_nothing():
    master = torch.randn(30, 50)
    weight = torch.empty(50, 30, dtype=torch.bfloat16).t()
    round_to(weight, master)
    assert torch.equal(weight, rounded(master))
    round_to(weight, master.t().contiguous().t())
    assert torch.equal(weight, rounded(master))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_are_rounded_as_torch_does(dtype):
    master = torch.randn(100)
    weight = torch.empty(100, dtype=dtype)
    round_to(weight, master)
    assert torch.equal(weight, master.to(dtype))


@settings(max_examples=10)
@given(st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_an_opponent_that_has_caught_up_computes_with_the_policys_weights(decay):
    policy = tiny_llama(dtype=torch.bfloat16)
    opponent = ModelCopy(policy, decay=decay)
    masters = {name: weight.detach().float() * (1 + 1e-4) for name, weight in policy_tensors(policy).items()}
    opponent.follow(masters, 0.0)
    reference = ModelCopy(policy)
    reference.copy_from(opponent.tensors())
    for name, weight in policy.named_parameters():
        round_to(weight, masters[name])
    for model in (opponent.model, reference.model):
        own = dict(model.named_parameters())
        assert all(torch.equal(own[name], weight) for name, weight in policy.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merged_adapter_keeps_updates_far_below_a_rounding_error(dtype):
    torch.manual_seed(0)
    base = tiny_llama(dtype=dtype)
    start = {name: weight.detach().float().clone() for name, weight in base.named_parameters()}
    policy = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    updates = {}
    with torch.no_grad():
        for name, layer in policy.base_model.model.named_modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B["default"].weight.mul_(1e-4)
                updates[f"{name}.weight"] = layer.get_delta_weight("default").float()
    merged = dict(merge_adapter(policy).named_parameters())
    assert updates
    assert {weight.dtype for weight in merged.values()} == {dtype}
    got = wanted = lost = 0.0
    for name, weight in merged.items():
        moved = weight.detach().float() - start[name]
        if name not in updates:
            assert not moved.any()
            continue
        update = updates[name]
        got, wanted = got + float((moved * update).sum()), wanted + float(update.square().sum())
        lost += float((((start[name] + update).to(dtype).float() - start[name]) * update).sum())
    assert got == pytest.approx(wanted, rel=0.25 if dtype == torch.bfloat16 else 1e-3)
    # To the nearest, bfloat16 loses most of it.
    assert (lost < 0.5 * wanted) == (dtype == torch.bfloat16)
