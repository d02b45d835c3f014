"""Laws of `sapo.preference.batches`: every token once, scores on responses only, padding known by length."""

import dataclasses
import random
from functools import partial

import pytest
import torch
from benchmarks.padding import real_pairs, share
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.preference.batches import (
    MAX_PADDING,
    collate_pairs,
    collate_responses,
    padding_share,
    pass_tokens,
    split_pairs,
)
from sapo.preference.pairs import Pair
from sapo.preference.segments import Segment
from tests.shared_data import DATA, needs_data

IGNORE = -100
laws = settings(derandomize=True, deadline=None)
# Few values, the pad id among them: it occurs in prompts and responses.
tokens = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@st.composite
def one_pair(draw):
    prompt, chosen, replacement = draw(tokens), draw(tokens), draw(tokens)
    start = draw(st.integers(0, len(chosen) - 1))
    stop = draw(st.integers(start + 1, len(chosen)))
    return Pair(
        row=draw(st.integers(0, 99)),
        turn=0,
        prompt_ids=tuple(prompt),
        chosen_ids=tuple(chosen),
        rejected_ids=(*chosen[:start], *replacement, *chosen[stop:]),
        segment=Segment(start, stop),
        rewritten=Segment(start, start + len(replacement)),
    )


pair_lists = st.lists(one_pair(), min_size=1, max_size=5)


def rows_of(pairs):
    return [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]


@laws
@given(pair_lists, st.integers(0, 4))
def test_rows_are_the_chosen_then_the_rejected_each_token_once(pairs, pad):
    batch = collate_pairs(pairs, pad_token_id=pad)
    rows = rows_of(pairs)
    assert len(batch) == len(pairs)
    assert batch.input_ids.shape == (len(rows), max(len(p) + len(r) for p, r in rows))
    assert batch.tokens == sum(len(p) + len(r) for p, r in rows)
    for row, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        assert batch.input_ids[row, :length].tolist() == [*prompt, *response]
        assert (batch.input_ids[row, length:] == pad).all()


@laws
@given(pair_lists, st.integers(0, 4))
def test_every_response_token_is_predicted_and_nothing_else(pairs, pad):
    batch = collate_pairs(pairs, pad_token_id=pad)
    for row, (prompt, response) in enumerate(rows_of(pairs)):
        stop = len(prompt) + len(response)
        # Position t predicts token t + 1.
        assert (batch.targets[row, : len(prompt) - 1] == IGNORE).all()
        assert tuple(batch.targets[row, len(prompt) - 1 : stop - 1].tolist()) == response
        assert (batch.targets[row, stop - 1 :] == IGNORE).all()


@laws
@given(pair_lists, st.integers(0, 4))
def test_attention_is_by_length_whatever_the_tokens_are(pairs, pad):
    batch = collate_pairs(pairs, pad_token_id=pad)
    lengths = torch.tensor([len(p) + len(r) for p, r in rows_of(pairs)])
    places = torch.arange(batch.input_ids.shape[1])
    assert torch.equal(batch.attention_mask, (places < lengths[:, None]).long())


def test_a_pad_token_inside_the_prompt_or_the_response_stays_attended_and_scored():
    pair = Pair(0, 0, (7, 0, 7), (0, 8), (0, 0, 9), Segment(1, 2), Segment(1, 3))
    batch = collate_pairs([pair], pad_token_id=0)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch.targets.tolist() == [[IGNORE] * 2 + [0, 8, IGNORE, IGNORE], [IGNORE] * 2 + [0, 0, 9, IGNORE]]


@laws
@given(pair_lists, st.integers(0, 4))
def test_the_pad_token_changes_nothing_but_the_padding(pairs, pad):
    one, other = collate_pairs(pairs, pad_token_id=pad), collate_pairs(pairs, pad_token_id=99)
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.attention_mask, other.attention_mask)
    seen = one.attention_mask.bool()
    assert torch.equal(one.input_ids[seen], other.input_ids[seen])


@laws
@given(pair_lists, st.integers(0, 4))
def test_a_masked_suffix_is_present_and_not_scored(pairs, pad):
    batch, plain = (collate_pairs(pairs, pad_token_id=pad, suffix=suffix) for suffix in ("mask", "keep"))
    assert torch.equal(batch.input_ids, plain.input_ids)
    assert torch.equal(batch.attention_mask, plain.attention_mask)
    half = len(pairs)
    assert torch.equal(batch.targets[:half], plain.targets[:half])
    for pair, targets in zip(pairs, batch.targets[half:].tolist(), strict=True):
        start, stop = len(pair.prompt_ids) - 1, len(pair.prompt_ids) + pair.rewritten.stop - 1
        assert tuple(targets[start:stop]) == pair.rejected_ids[: pair.rewritten.stop]
        assert set(targets[:start] + targets[stop:]) <= {IGNORE}


@laws
@given(pair_lists, st.integers(0, 4))
def test_a_masked_suffix_is_scored_as_a_dropped_one(pairs, pad):
    """What comes after changes nothing before it in a causal model, so the two have the same loss."""
    dropped = [dataclasses.replace(pair, rejected_ids=pair.rejected_ids[: pair.rewritten.stop]) for pair in pairs]
    masked = collate_pairs(pairs, pad_token_id=pad, suffix="mask")
    other = collate_pairs(dropped, pad_token_id=pad, suffix="drop")
    width = other.targets.shape[1]
    assert torch.equal(masked.targets[:, :width], other.targets)
    assert (masked.targets[:, width:] == IGNORE).all()
    assert torch.equal(masked.lengths, other.lengths)


def test_the_first_token_of_all_is_predicted_by_none():
    assert collate_responses([((), (5, 6), 2)], pad_token_id=0).targets.tolist() == [[6, IGNORE]]


def test_only_the_asked_for_number_of_response_tokens_is_scored():
    batch = collate_responses([((1, 2), (3, 4, 5), 1), ((1,), (3, 4), 0)], pad_token_id=0)
    assert batch.targets.tolist() == [[IGNORE, 3, IGNORE, IGNORE, IGNORE], [IGNORE] * 5]
    assert batch.attention_mask.sum(1).tolist() == [5, 3]


def test_moving_a_batch_keeps_it():
    pair = Pair(0, 0, (7,), (8, 1), (9,), Segment(0, 2), Segment(0, 1))
    batch = collate_pairs([pair], pad_token_id=0)
    moved = batch.to("cpu")
    for name in ("input_ids", "attention_mask", "targets", "owners"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert (moved.sums, moved.tokens, len(moved)) == (batch.sums, batch.tokens, 1)


def test_no_pairs_are_no_batch():
    with pytest.raises(ValueError, match="at least one pair"):
        collate_pairs([], pad_token_id=0)


def scored(batch):
    """Every scored prediction: the sum it adds to, and the token."""
    places = batch.targets != IGNORE
    return sorted(zip(batch.owners[places].tolist(), batch.targets[places].tolist(), strict=True))


def whole(pairs, batch):
    """Scored tokens of each response, what both share counted for both."""
    found = [[] for _ in range(2 * len(pairs))]
    for owner, token in scored(batch):
        for response in [owner] if owner < 2 * len(pairs) else [owner - 2 * len(pairs), owner - len(pairs)]:
            found[response].append(token)
    return [sorted(tokens) for tokens in found]


@laws
@given(pair_lists, st.sampled_from(["keep", "mask"]), st.booleans())
def test_both_layouts_score_the_same_tokens_of_each_response(pairs, suffix, score_shared):
    options = {"pad_token_id": 0, "suffix": suffix, "score_shared": score_shared}
    plain, shared = (collate_pairs(pairs, layout=layout, **options) for layout in ("plain", "shared"))
    assert whole(pairs, plain) == whole(pairs, shared)


@laws
@given(pair_lists)
def test_without_the_shared_beginning_only_what_differs_is_scored(pairs):
    batch = collate_pairs(pairs, pad_token_id=0, score_shared=False)
    expected = [p.chosen_ids[p.segment.start :] for p in pairs] + [p.rejected_ids[p.segment.start :] for p in pairs]
    assert whole(pairs, batch) == [sorted(tokens) for tokens in expected]


@laws
@given(pair_lists)
def test_a_packed_row_has_no_padding_and_each_prefix_once(pairs):
    batch = collate_pairs(pairs, pad_token_id=0, layout="shared")
    (ids,), (positions,) = batch.input_ids.tolist(), batch.position_ids.tolist()
    assert batch.tokens == len(ids) == batch.prefixes.spans[-1].stop
    for pair, span in zip(pairs, batch.prefixes.spans, strict=True):
        prompt, start = pair.prompt_ids, pair.segment.start
        assert tuple(ids[span.start : span.middle]) == prompt + pair.chosen_ids
        # The branch repeats the last shared token, then goes on.
        assert tuple(ids[span.middle : span.stop]) == (prompt + pair.rejected_ids)[len(prompt) + start - 1 :]
        assert positions[span.start : span.stop] == [
            *range(span.middle - span.start),
            *range(span.visible, span.visible + span.stop - span.middle),
        ]


@laws
@given(pair_lists, st.integers(1, 6), st.sampled_from(["plain", "shared"]))
def test_passes_hold_every_pair_once_and_their_number_depends_on_nothing_but_numbers(pairs, most, layout):
    parts = split_pairs(pairs, most, layout=layout, equal_passes=True)
    assert len(parts) == -(-len(pairs) // most)
    assert all(1 <= len(part) <= most for part in parts)
    assert sorted(map(id, (pair for part in parts for pair in part))) == sorted(map(id, pairs))


@laws
@given(
    pair_lists, st.none() | st.integers(1, 6), st.integers(1, 200), st.sampled_from(["plain", "shared"]),
    st.booleans(), st.integers(1, 6),
)  # fmt: skip
def test_passes_stay_within_their_tokens_and_hold_every_pair_once(pairs, most, tokens, layout, equal, least):
    split = partial(split_pairs, pairs, most, layout=layout, tokens=tokens, equal_passes=equal)
    parts = split(least=least)
    assert parts == split(least=least)
    assert sorted(map(id, (pair for part in parts for pair in part))) == sorted(map(id, pairs))
    assert all(len(part) <= (most or len(pairs)) for part in parts)
    assert all(len(part) == 1 or pass_tokens(part, layout) <= tokens for part in parts)
    # Processes that agree on the most that one of them needs take equally many.
    assert len(parts) == max(len(split()), min(least, len(pairs)))


@laws
@given(pair_lists, st.sampled_from(["plain", "shared"]))
def test_tokens_of_a_pass_are_those_of_its_rows(pairs, layout):
    assert pass_tokens(pairs, layout) == collate_pairs(pairs, pad_token_id=0, layout=layout).input_ids.numel()


@laws
@given(pair_lists, st.none() | st.integers(1, 6))
def test_plain_passes_of_several_pairs_hold_little_padding_and_every_pair_once(pairs, most):
    parts = split_pairs(pairs, most, layout="plain")
    assert all(1 <= len(part) <= (most or len(pairs)) for part in parts)
    assert all(len(part) == 1 or padding_share(part) <= MAX_PADDING for part in parts)
    assert sorted(map(id, (pair for part in parts for pair in part))) == sorted(map(id, pairs))
    for part in parts:
        batch = collate_pairs(part, pad_token_id=0)
        assert padding_share(part) == pytest.approx(1 - batch.tokens / batch.input_ids.numel())


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "gpteacher_roleplay", "oasst_sample"])
def test_padding_of_real_lengths_stays_below_the_bound(name):
    rng = random.Random(0)
    pairs = real_pairs(DATA, name, rng, count=400)
    batches = [rng.sample(pairs, 8) for _ in range(100)]
    assert share(batches) > MAX_PADDING
    cut = [part for batch in batches for part in split_pairs(batch, None, layout="plain")]
    assert share(cut) < MAX_PADDING
    packed = [collate_pairs(batch, pad_token_id=0, layout="shared") for batch in batches[:3]]
    assert all(batch.tokens == batch.input_ids.numel() for batch in packed)


def test_the_published_positions_need_padding():
    pair = Pair(0, 0, (7,), (8, 1), (9,), Segment(0, 2), Segment(0, 1))
    with pytest.raises(ValueError, match="padding"):
        collate_pairs([pair], pad_token_id=0, layout="shared", all_positions=True)
