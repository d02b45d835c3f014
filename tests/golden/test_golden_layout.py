"""Vectors that `test_golden.py` reads in part: masks, labels, widths, metrics, the average in time."""

import pytest
import torch

from sapo.data.examples import Example, Turn
from sapo.generation.scripted import ScriptedGenerator
from sapo.preference.batches import collate_pairs, collate_responses
from sapo.preference.objectives import dpo_loss, log_odds, orpo_loss, sequence_logps
from sapo.preference.pairs import Pair
from sapo.preference.replay_buffer import ReplayBuffer
from sapo.preference.segments import Segment
from sapo.preference.self_play import SelfPlay, SelfPlaySettings
from sapo.weights.opponent import ModelCopy
from tests.golden.test_golden import OneWeight, cases, tensor, truncated

REFERENCE_SYNC_STEPS = 108


def prompt_length(labels):
    return sum(label == -100 for label in labels)


def pair_of(item):
    cut = prompt_length(item["real_labels"])
    prompt, chosen = item["real_input_ids"][:cut], item["real_input_ids"][cut:]
    rejected = item["generated_input_ids"][cut:]
    return Pair(
        0,
        0,
        tuple(prompt),
        tuple(chosen),
        tuple(rejected),
        Segment(0, len(chosen)),
        Segment(0, len(rejected)),
    )


@pytest.mark.parametrize("case", cases("batch_loss"))
def test_a_batch_is_laid_out_as_published(case):
    given, expected = case["inputs"], case["expected"]["concatenated"]
    batch = collate_pairs([pair_of(item) for item in given["items"]], pad_token_id=given["pad_token_id"])
    assert batch.targets[:, :-1].tolist() == [labels[1:] for labels in expected["concatenated_labels"]]
    assert batch.attention_mask.tolist() == expected["concatenated_attention_mask"]
    seen = batch.attention_mask.bool()
    published = torch.tensor(expected["concatenated_input_ids"])
    assert published.shape == batch.input_ids.shape
    assert torch.equal(batch.input_ids[seen], published[seen])


@pytest.mark.parametrize("case", [c for c in cases("replay_buffer") if c["inputs"]["kind"] == "collate"])
def test_drawn_pairs_are_padded_as_published_to_one_width(case):
    given, expected = case["inputs"], case["expected"]
    for role in ("generated", "real"):
        rows = [((), (item["value"],) * item[f"{role}_len"], item[f"{role}_len"]) for item in given["items"]]
        batch = collate_responses(rows, pad_token_id=given["pad_token_id"])
        assert batch.input_ids.tolist() == expected[f"{role}_input_ids"]
        assert batch.attention_mask.tolist() == expected[f"{role}_attention_mask"]
        assert batch.targets[:, :-1].tolist() == [labels[1:] for labels in expected[f"{role}_labels"]]


def close(ours, published, tolerance=1e-5):
    assert float(ours) == pytest.approx(published, abs=tolerance)


@pytest.mark.parametrize("case", cases("batch_loss"))
def test_rewards_and_log_probabilities_of_a_batch_are_the_published_ones(case):
    given, metrics = case["inputs"], case["expected"]["metrics"]
    labels = torch.tensor(case["expected"]["concatenated"]["concatenated_labels"])
    logits = torch.tensor(given["policy_logits"])
    dpo = given["trainer"] == "dpo"
    names = ("real", "generated") if dpo else ("chosen", "rejected")
    policy = sequence_logps(logits, labels, average=not dpo).chunk(2)
    if dpo:
        reference = sequence_logps(torch.tensor(given["reference_logits"]), labels).chunk(2)
        ours = dpo_loss(*policy, *reference, beta=given["beta"], loss_type=given["loss_type"])
    else:
        ours = orpo_loss(*policy, beta=given["beta"])
        close(ours.losses.mean() / -given["beta"], metrics["log_odds_ratio"])
        close((log_odds(policy[0]) - log_odds(policy[1])).mean(), metrics["log_odds_chosen"])
    for name, logps, rewards in zip(names, policy, ours[1:], strict=True):
        close(logps.mean(), metrics[f"logps/{name}"], 1e-4)
        close(rewards.mean(), metrics[f"rewards/{name}"])
    close((ours.chosen_rewards > ours.rejected_rewards).float().mean(), metrics["rewards/accuracies"])
    close((ours.chosen_rewards - ours.rejected_rewards).mean(), metrics["rewards/margins"])


@pytest.mark.parametrize("case", [c for c in cases("pair_loss") if not c["inputs"]["reference_free"]])
def test_mean_loss_margins_and_accuracies_of_pairs_are_the_published_ones(case):
    given, expected = case["inputs"], case["expected"]
    names = ("policy_real", "policy_generated", "reference_real", "reference_generated")
    inputs = [tensor(given[f"{name}_logps"]) for name in names]
    ours = dpo_loss(*inputs, beta=given["beta"], loss_type=given["loss_type"])
    margins = ours.chosen_rewards - ours.rejected_rewards
    assert ours.losses.mean().item() == pytest.approx(float(expected["mean_loss"]), rel=1e-12)
    torch.testing.assert_close(margins, tensor(expected["margins"]), rtol=1e-12, atol=1e-12)
    assert (margins > 0).double().tolist() == expected["accuracies"]


@pytest.mark.parametrize("case", cases("odds_ratio_loss"))
def test_mean_log_sigmoid_is_the_published_one(case):
    given = case["inputs"]
    ours = orpo_loss(tensor(given["chosen_avg_logps"]), tensor(given["rejected_avg_logps"]), beta=1.0)
    published = float(case["expected"]["mean_log_sigmoid_log_odds"])
    assert -ours.losses.mean().item() == pytest.approx(published, rel=1e-9)


def test_cut_prompts_and_responses_are_the_published_ones_wherever_the_published_code_ran():
    compared = 0
    for case in cases("segment_geometry"):
        given, expected = case["inputs"], case["expected"]
        if "error" in expected:
            continue
        prompt, response = truncated(given)
        first, last = expected["prompt_first_kept_index"], expected["prompt_last_kept_index"]
        assert prompt == list(range(first, last + 1))
        assert response == list(range(expected["response_length"]))
        assert (response[-1] == given["response_tokens_before_eos"]) == expected["ends_with_eos"]
        compared += 1
    assert compared == 536


@pytest.mark.parametrize("case", cases("stitching"), ids=lambda case: case["inputs"]["tag"])
def test_self_play_asks_for_and_lays_out_what_the_published_step_does(case, monkeypatch):
    given, expected = case["inputs"], case["expected"]
    each = given["responses_per_prompt"]
    count = len(given["real_input_ids"])
    segments = [
        Segment(start, start + length)
        for start, length in zip(given["truncate_at"], given["actual_token_generate_length"], strict=True)
    ]
    chosen = iter([segment for segment in segments for _ in range(each)])
    monkeypatch.setattr("sapo.preference.self_play.choose_segment", lambda *args, **options: next(chosen))
    # Recorded rows may run beyond their own segment: our generators get a budget per row.
    written = []
    for number, row in enumerate(given["model_output_rows"]):
        index = number // each
        written.append(row[len(expected["generation_input_ids"][index]) :][: len(segments[index])])
    generator = ScriptedGenerator(lambda contexts, budgets, seeds: written)
    source = SelfPlay(
        generator,
        ReplayBuffer(count * each),
        SelfPlaySettings(num_generations=each),
        eos_ids={given["eos_token_id"]},
        seed=0,
        batch_size=1,
    )
    examples = [
        Example(row, (Turn(0, tuple(real[:cut]), tuple(real[cut:])),))
        for row, (real, cut) in enumerate(zip(given["real_input_ids"], given["prompt_length"], strict=True))
    ]
    pairs = source.regenerate(examples, epoch=0)
    masks = expected["generation_attention_mask"]
    for index, (ids, mask) in enumerate(zip(expected["generation_input_ids"], masks, strict=True)):
        context = [token for token, seen in zip(ids, mask, strict=True) if seen]
        assert generator.calls[0].contexts[index * each] == context
    for pair, experience in zip(pairs, expected["experiences"], strict=True):
        batch = collate_pairs([pair], pad_token_id=given["pad_token_id"])
        for row, role in enumerate(("real", "generated")):
            length = int(batch.attention_mask[row].sum())
            assert batch.input_ids[row, :length].tolist() == experience[f"{role}_input_ids"]
            assert batch.targets[row, : length - 1].tolist() == experience[f"{role}_labels"][1:]
            if f"{role}_attention_mask" in experience:
                assert batch.attention_mask[row, :length].tolist() == experience[f"{role}_attention_mask"]


@pytest.mark.parametrize("case", cases("ema"))
def test_following_at_the_end_of_a_step_gives_the_published_average_at_the_start_of_the_next(case):
    given, expected = case["inputs"], case["expected"]
    policy = OneWeight(given["initial"])
    opponent, reference = ModelCopy(policy, decay=given["beta"]), ModelCopy(policy)
    trace = iter(expected["trace"])

    def synchronize(step):
        mode = given["ref_update_mode"]
        if mode != "none" and step % REFERENCE_SYNC_STEPS == 0:
            reference.copy_from(opponent.tensors() if mode == "ema" else dict(policy.named_parameters()))

    def check(record):
        for module, name in (
            (policy, "policy_before_optimizer_step"),
            (opponent.model, "ema_used_for_generation"),
            (reference.model, "reference"),
        ):
            torch.testing.assert_close(module.weight.data, tensor(record[name]), rtol=1e-12, atol=1e-12)

    step = given["first_global_step"]
    synchronize(step)
    for delta in given["optimizer_deltas"]:
        for micro_batch in range(given["gradient_accumulation_steps"]):
            record = next(trace)
            assert (record["step"], record["micro_batch"]) == (step, micro_batch)
            check(record)
        final_ema, final_reference = opponent.model.weight.data.clone(), reference.model.weight.data.clone()
        policy.weight.data.add_(tensor(delta))
        step += 1
        opponent.follow(dict(policy.named_parameters()), given["beta"])
        synchronize(step)
    assert next(trace, None) is None
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(policy.weight.data, tensor(expected["policy_after_last_step"]), **exact)
    # The record ends before the follow that our last step adds.
    torch.testing.assert_close(final_ema, tensor(expected["final_ema"]), **exact)
    torch.testing.assert_close(final_reference, tensor(expected["final_reference"]), **exact)
