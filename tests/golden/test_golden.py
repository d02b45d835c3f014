"""The published implementation's numbers, reproduced; where we depart on purpose, the difference is pinned."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from sapo import ReplayBuffer, Segment, choose_segment, dpo_loss, orpo_loss, sequence_logps, splice
from sapo.data.prepare import truncate
from sapo.preference.objectives import chosen_nll, log_odds, token_logps
from sapo.preference.segments import truncate_at_eos
from sapo.weights.opponent import ModelCopy

HERE = Path(__file__).parent


def cases(name):
    return json.loads((HERE / f"{name}.json").read_text())["cases"]


def tensor(values):
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


@pytest.mark.parametrize("case", cases("pair_loss"))
def test_pair_losses_and_rewards_are_the_published_ones(case):
    given, expected = case["inputs"], case["expected"]
    reference = [tensor(given["reference_real_logps"]), tensor(given["reference_generated_logps"])]
    if given["reference_free"]:
        reference = [torch.zeros_like(values) for values in reference]
    ours = dpo_loss(
        tensor(given["policy_real_logps"]),
        tensor(given["policy_generated_logps"]),
        *reference,
        beta=given["beta"],
        loss_type=given["loss_type"],
    )
    torch.testing.assert_close(ours.losses, tensor(expected["losses"]), rtol=1e-12, atol=1e-12)
    if not given["reference_free"]:
        torch.testing.assert_close(ours.chosen_rewards, tensor(expected["real_rewards"]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.rejected_rewards, tensor(expected["generated_rewards"]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", cases("odds_ratio_loss"))
def test_odds_ratio_loss_is_the_published_one(case):
    given, expected = case["inputs"], case["expected"]
    chosen, rejected = tensor(given["chosen_avg_logps"]), tensor(given["rejected_avg_logps"])
    ours = orpo_loss(chosen, rejected, beta=given["beta"])
    torch.testing.assert_close(-ours.losses, tensor(expected["scaled_log_sigmoid"]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.chosen_rewards, tensor(expected["chosen_rewards"]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.rejected_rewards, tensor(expected["rejected_rewards"]), rtol=1e-12, atol=1e-12)
    assert (log_odds(chosen) - log_odds(rejected)).mean().item() == pytest.approx(expected["mean_log_odds"], rel=1e-9)
    total = given["nll_loss"] + ours.losses.mean().item()
    assert total == pytest.approx(float(expected["total_loss"]), rel=1e-9)


@pytest.mark.parametrize("case", cases("odds_ratio_loss_edge_float32"))
def test_odds_ratio_stays_finite_where_the_published_formula_does_not(case):
    chosen = torch.tensor(case["inputs"]["chosen_avg_logps"], dtype=torch.float32, requires_grad=True)
    rejected = torch.tensor(case["inputs"]["rejected_avg_logps"], dtype=torch.float32, requires_grad=True)
    loss = orpo_loss(chosen, rejected, beta=0.1).losses.sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()


@pytest.mark.parametrize("case", cases("sequence_logps"))
def test_sequence_logps_are_the_published_ones(case):
    given, expected = case["inputs"], case["expected"]
    logits = torch.tensor(given["logits"], dtype=torch.float64)
    labels = torch.tensor(given["labels"])
    summed, averaged = tensor(expected["sum_logps"]), tensor(expected["average_logps"])
    # A sequence without scored tokens: nan as published, 0 here, so that it cannot poison a batch.
    averaged = averaged.nan_to_num(0.0)
    torch.testing.assert_close(sequence_logps(logits, labels), summed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sequence_logps(logits, labels, average=True), averaged, rtol=1e-12, atol=1e-12)


def fixed_draw(place, count):
    rng = random.Random(0)
    rng.random = lambda: (place + 0.5) / count
    return rng


def truncated(given):
    return truncate(
        range(given["prompt_tokens"]),
        range(given["response_tokens_before_eos"] + 1),
        max_length=given["max_length"],
        max_prompt_length=given["max_prompt_length"],
        prompt_truncation=given["prompt_truncation"],
    )


def test_segment_geometry_is_the_published_one_or_better():
    published = departures = 0
    for case in cases("segment_geometry"):
        given, expected = case["inputs"], case["expected"]
        prompt, response = truncated(given)
        assert len(prompt) + len(response) <= given["max_length"]
        whole = len(response) == given["response_tokens_before_eos"] + 1
        length = given["token_generate_length"]
        if "error" in expected or not whole:
            # Departure 2: a response that was cut draws like any other, and its segment always fits.
            for place in range(5):
                segment = choose_segment(len(response), length, fixed_draw(place, 5))
                assert segment.stop <= len(response)
                assert len(segment) == min(length, len(response))
            departures += 1
            continue
        published += 1
        assert len(prompt) == expected["prompt_length"]
        assert len(response) == expected["response_length"]
        assert prompt[0] == expected["prompt_first_kept_index"]
        assert prompt[-1] == expected["prompt_last_kept_index"]
        starts = expected["truncate_at_after"]
        count = expected["draw_range"][1] + 1 if expected["draw_range"] else 1
        for place, start in zip(expected["drawn"] or [0], starts, strict=True):
            segment = choose_segment(len(response), length, fixed_draw(place, count))
            assert segment == Segment(start, start + expected["actual_token_generate_length"])
    assert (published, departures) == (337, 227)


@pytest.mark.parametrize("case", cases("stitching"), ids=lambda case: case["inputs"]["tag"])
def test_stitching_is_the_published_one(case):
    given = case["inputs"]
    eos = {given["eos_token_id"]}
    each = given["responses_per_prompt"]
    outputs = iter(given["model_output_rows"])
    for index, real in enumerate(given["real_input_ids"]):
        cut, start = given["prompt_length"][index], given["truncate_at"][index]
        for draw in range(each):
            expected = case["expected"]["experiences"][index * each + draw]
            width = len(case["expected"]["generation_input_ids"][index])
            response = real[cut:]
            segment = Segment(start, min(start + given["actual_token_generate_length"][index], len(response)))
            written = truncate_at_eos(next(outputs)[width:][: len(segment)], eos)
            rejected = splice(response, segment, written, eos_ids=eos)
            assert [*real[:cut], *rejected] == expected["generated_input_ids"]


@pytest.mark.parametrize("case", [c for c in cases("replay_buffer") if c["inputs"]["kind"] != "collate"])
def test_replay_buffer_is_the_published_one(case):
    given, expected = case["inputs"], case["expected"]
    if given["kind"] == "fifo":
        buffer = ReplayBuffer(given["max_size"])
        for item, contents in zip(given["added_in_order"], expected["contents_after_each_add"], strict=True):
            buffer.add(item, 0)
            assert [entry.item for entry in buffer.entries()] == contents
    elif given["kind"] == "weights":
        buffer = ReplayBuffer(given["max_size"])
        for operation, after in zip(given["operations"], expected["trace"], strict=True):
            if operation[0] == "add":
                buffer.add(operation[1], 0)
                assert [entry.item for entry in buffer.entries()] == after["contents"]
                continue
            probabilities = buffer.probabilities()
            assert probabilities == pytest.approx(after["probabilities"], rel=1e-12)
            places = after["forced_positions"][: after["k"]]
            picks = iter([sum(probabilities[:place]) + probabilities[place] / 2 for place in places])

            class Picks:
                def random(self, picks=picks):
                    return next(picks)

            buffer.draw(operation[1], Picks())
            counts = [entry.draws for entry in buffer.entries()]
            if len(places) == operation[1]:
                assert counts == after["counts_after"]
    elif given["kind"] == "probabilities":
        buffer = ReplayBuffer(len(given["counts"]))
        for item in range(len(given["counts"])):
            buffer.add(item, 0)
        buffer._draws[:] = given["counts"]
        assert buffer.probabilities() == pytest.approx(expected["probabilities"], rel=1e-12)
        assert len(buffer.draw(given["batch_size"], random.Random(0))) == expected["draws"]
    else:
        buffer = ReplayBuffer(given["size"])
        for item in range(given["size"]):
            buffer.add(item, 0)
        rng = random.Random(given["seed"])
        picks = [buffer.draw(given["batch_size"], rng) for _ in range(given["rounds"])]
        assert picks == expected["picks"]
        assert [entry.draws for entry in buffer.entries()] == expected["counts_after"]


class OneWeight(torch.nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def same(module, values):
    torch.testing.assert_close(module.weight.data, tensor(values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", cases("ema"))
def test_moving_average_and_reference_are_the_published_ones_at_every_micro_batch(case):
    given, expected = case["inputs"], case["expected"]
    policy = OneWeight(given["initial"])
    opponent, reference = ModelCopy(policy, decay=given["beta"]), ModelCopy(policy)
    recorded = iter(expected["trace"])
    for step, delta in enumerate(given["optimizer_deltas"], start=given["first_global_step"]):
        for micro_batch in range(given["gradient_accumulation_steps"]):
            record = next(recorded)
            assert (record["step"], record["micro_batch"]) == (step, micro_batch)
            same(policy, record["policy_before_optimizer_step"])
            same(opponent.model, record["ema_used_for_generation"])
            same(reference.model, record["reference"])
        policy.weight.data += tensor(delta)
        # Published at the start of the next step, ours at the end of this one: the same sequence (departure 17).
        opponent.follow(dict(policy.named_parameters()), given["beta"])
        if (step + 1) % 108 == 0 and given["ref_update_mode"] != "none":
            source = opponent.tensors() if given["ref_update_mode"] == "ema" else dict(policy.named_parameters())
            reference.copy_from(source)
    assert next(recorded, None) is None
    same(policy, expected["policy_after_last_step"])
    same(reference.model, expected["final_reference"])
    # Departure 17: one more update than published, after the last step.
    last = given["beta"] * tensor(expected["final_ema"]) + (1 - given["beta"]) * policy.weight.data
    same(opponent.model, last.tolist())


@pytest.mark.parametrize("case", cases("batch_loss"))
def test_batch_loss_is_the_published_one(case):
    given, expected = case["inputs"], case["expected"]
    logits = torch.tensor(given["policy_logits"])
    ids = torch.tensor(expected["concatenated"]["concatenated_input_ids"])
    labels = torch.tensor(expected["concatenated"]["concatenated_labels"])
    metrics = expected["metrics"]
    if given["trainer"] == "dpo":
        policy = sequence_logps(logits, labels).chunk(2)
        reference = sequence_logps(torch.tensor(given["reference_logits"]), labels).chunk(2)
        ours = dpo_loss(*policy, *reference, beta=given["beta"], loss_type=given["loss_type"])
        assert ours.losses.mean().item() == pytest.approx(expected["loss"], abs=1e-5)
        assert ours.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/real"], abs=1e-5)
        assert policy[0].mean().item() == pytest.approx(metrics["logps/real"], abs=1e-4)
        return
    chosen, rejected = sequence_logps(logits, labels, average=True).chunk(2)
    pair = orpo_loss(chosen, rejected, beta=given["beta"])
    nll = -token_logps(logits[:3, :-1], ids[:3, 1:]).mean()
    assert nll.item() == pytest.approx(expected["nll_alternatives"]["official_all_positions"], abs=1e-5)
    assert (nll + pair.losses.mean()).item() == pytest.approx(expected["loss"], abs=1e-5)
    # Departure 15: the response alone, averaged per pair and then over pairs; it needs neither prompt nor padding.
    lengths = (labels[:3, 1:] != -100).sum(-1)
    own = chosen_nll(sequence_logps(logits[:3], labels[:3]), lengths).mean().item()
    assert own == pytest.approx(-metrics["logps/chosen"], abs=1e-5)
    assert abs(own - expected["nll_alternatives"]["response_only"]) > 1e-3
