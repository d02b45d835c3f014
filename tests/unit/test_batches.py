"""Laws of `sapo.batches`: every token once, scores on responses only, padding known by length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.batches import collate_pairs, collate_responses
from sapo.pairs import Pair
from sapo.segments import Segment

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
def test_labels_are_on_every_response_token_and_on_nothing_else(pairs, pad):
    batch = collate_pairs(pairs, pad_token_id=pad)
    for row, (prompt, response) in enumerate(rows_of(pairs)):
        stop = len(prompt) + len(response)
        assert (batch.labels[row, : len(prompt)] == IGNORE).all()
        assert tuple(batch.labels[row, len(prompt) : stop].tolist()) == response
        assert (batch.labels[row, stop:] == IGNORE).all()


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
    assert batch.labels.tolist() == [[IGNORE] * 3 + [0, 8, IGNORE], [IGNORE] * 3 + [0, 0, 9]]


@laws
@given(pair_lists, st.integers(0, 4))
def test_the_pad_token_changes_nothing_but_the_padding(pairs, pad):
    one, other = collate_pairs(pairs, pad_token_id=pad), collate_pairs(pairs, pad_token_id=99)
    assert torch.equal(one.labels, other.labels)
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
    assert torch.equal(batch.labels[:half], plain.labels[:half])
    for pair, labels in zip(pairs, batch.labels[half:].tolist(), strict=True):
        start, stop = len(pair.prompt_ids), len(pair.prompt_ids) + pair.rewritten.stop
        assert tuple(labels[start:stop]) == pair.rejected_ids[: pair.rewritten.stop]
        assert set(labels[:start] + labels[stop:]) <= {IGNORE}


@laws
@given(pair_lists, st.integers(0, 4), st.sampled_from(["keep", "mask", "drop"]))
def test_first_label_is_the_lowest_column_with_a_label(pairs, pad, suffix):
    batch = collate_pairs(pairs, pad_token_id=pad, suffix=suffix)
    columns = (batch.labels != IGNORE).any(0).nonzero()
    assert batch.first_label == int(columns.min())


def test_without_a_prompt_the_first_label_is_column_1_since_column_0_has_no_prediction():
    assert collate_responses([((), (5, 6), 2)], pad_token_id=0).first_label == 1


def test_only_the_asked_for_number_of_response_tokens_is_scored():
    batch = collate_responses([((1, 2), (3, 4, 5), 1), ((1,), (3, 4), 0)], pad_token_id=0)
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 3, IGNORE, IGNORE], [IGNORE] * 5]
    assert batch.attention_mask.sum(1).tolist() == [5, 3]


def test_moving_a_batch_keeps_it():
    pair = Pair(0, 0, (7,), (8, 1), (9,), Segment(0, 2), Segment(0, 1))
    batch = collate_pairs([pair], pad_token_id=0)
    moved = batch.to("cpu")
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert moved.first_label == batch.first_label


def test_no_pairs_are_no_batch():
    with pytest.raises(ValueError, match="at least one pair"):
        collate_pairs([], pad_token_id=0)
