"""Properties of segments, splice, buffer and layout over many inputs."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo import Pair, ReplayBuffer, Segment, SelfPlay, choose_segment, splice
from sapo.batches import collate_pairs
from sapo.checkpoint import entries_from_tensors, entries_to_tensors
from sapo.data import Example, Turn
from sapo.generation import ScriptedGenerator
from sapo.pairs import SelfPlaySettings
from sapo.segments import truncate

tokens = st.lists(st.integers(2, 50), min_size=1, max_size=30)
lengths = st.one_of(st.none(), st.integers(1, 40), st.floats(0.01, 0.99))


@given(st.integers(1, 200), lengths, st.integers(0, 5), st.integers())
def test_a_segment_lies_inside_its_response(length, segment_length, margin, seed):
    segment = choose_segment(length, segment_length, random.Random(seed), tail_margin=margin)
    assert 0 <= segment.start < segment.stop <= length
    assert segment.start == 0 or segment.stop <= length - margin


def test_the_start_is_uniform():
    rng = random.Random(0)
    starts = Counter(choose_segment(23, 10, rng).start for _ in range(11_000))
    assert set(starts) == set(range(11))
    assert all(850 < count < 1150 for count in starts.values())


@given(tokens, st.data(), st.lists(st.integers(2, 50), max_size=10))
def test_splice_keeps_both_sides(response, data, replacement):
    start = data.draw(st.integers(0, len(response)))
    stop = data.draw(st.integers(start, len(response)))
    spliced = splice(response, Segment(start, stop), replacement, eos_ids={1})
    assert spliced == response[:start] + replacement + response[stop:]
    assert splice(response, Segment(start, stop), [*replacement, 1], eos_ids={1}) == [
        *response[:start],
        *replacement,
        1,
    ]
    assert splice(response, Segment(start, stop), replacement, suffix="drop") == response[:start] + replacement


@given(tokens, tokens, st.integers(1, 40), st.integers(1, 40))
def test_truncation_keeps_to_the_budget(prompt, response, most, prompt_most):
    kept, rest = truncate(prompt, response, max_length=most, max_prompt_length=min(prompt_most, most))
    assert len(kept) + len(rest) <= most
    assert prompt[len(prompt) - len(kept) :] == kept
    assert response[: len(rest)] == rest


@given(st.integers(1, 6), st.lists(st.integers(0, 3), max_size=40), st.booleans())
@settings(deadline=None)
def test_buffer_is_first_in_first_out_and_survives_a_round_trip(capacity, operations, replacement):
    buffer = ReplayBuffer(capacity, replacement=replacement)
    expected = []
    for step, count in enumerate(operations):
        buffer.add(step, step)
        expected = [*expected, step][-capacity:]
        drawn = buffer.draw(count, random.Random(step))
        assert len(drawn) == min(count, len(expected))
        assert replacement or len(set(drawn)) == len(drawn)
    assert [entry.item for entry in buffer.entries()] == expected
    again = ReplayBuffer(capacity, replacement=replacement)
    again.restore(buffer.entries())
    assert again.entries() == buffer.entries()
    assert again.draw(3, random.Random(9)) == buffer.draw(3, random.Random(9))


def test_draws_follow_one_over_count_plus_one():
    rng = random.Random(0)
    drawn = Counter()
    for _ in range(6000):
        buffer = ReplayBuffer(3)
        for item in "abc":
            buffer.add(item, 0)
        buffer.restore([type(e)(e.item, e.step, count) for e, count in zip(buffer.entries(), (0, 1, 3), strict=True)])
        drawn.update(buffer.draw(1, rng))
    weights = {"a": 1, "b": 1 / 2, "c": 1 / 4}
    expected = {item: 6000 * weight / 1.75 for item, weight in weights.items()}
    assert sum((drawn[i] - expected[i]) ** 2 / expected[i] for i in expected) < 13.8  # chi-square, 2 degrees, 0.1 %


def make_pair(prompt, chosen, rejected, start=0):
    return Pair(
        3, 0, tuple(prompt), tuple(chosen), tuple(rejected), Segment(start, len(chosen)), Segment(start, len(rejected))
    )


@given(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=5))
def test_layout_holds_every_token_once_and_scores_responses_only(triples):
    pairs = [make_pair(*triple) for triple in triples]
    batch = collate_pairs(pairs, pad_token_id=2)
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    for row, (prompt, response) in enumerate(rows):
        length = int(batch.attention_mask[row].sum())
        assert batch.input_ids[row, :length].tolist() == [*prompt, *response]
        scored = [t for t in batch.labels[row].tolist() if t != -100]
        assert scored == list(response)


def test_masked_suffix_is_present_and_not_scored():
    pair = Pair(0, 0, (5,), (6, 7, 8), (6, 9, 8), Segment(1, 2), Segment(1, 2))
    batch = collate_pairs([pair], pad_token_id=2, suffix="mask")
    assert batch.input_ids[1].tolist() == [5, 6, 9, 8]
    assert batch.labels[1].tolist() == [-100, 6, 9, -100]


@given(st.lists(st.tuples(tokens, tokens, tokens), max_size=5))
def test_pairs_survive_a_checkpoint(triples):
    buffer = ReplayBuffer(8)
    for step, triple in enumerate(triples):
        buffer.add(make_pair(*triple), step)
    assert entries_from_tensors(entries_to_tensors(buffer.entries())) == buffer.entries()


def play(generator, **options):
    return SelfPlay(
        generator,
        ReplayBuffer(100),
        SelfPlaySettings(segment_length=3, **options),
        end_ids={1},
        seed=0,
        batch_size=2,
    )


def example(row, length=9):
    return Example(row, (Turn(0, (4, 5), tuple(range(10, 10 + length))),))


def test_what_concerns_an_example_does_not_depend_on_its_batch():
    source = play(ScriptedGenerator(lambda contexts, budgets, seeds: [[seed % 40 + 2] for seed in seeds]))
    alone = [source.rewrite([example(row)], epoch=1)[0] for row in range(6)]
    assert source.rewrite([example(row) for row in range(6)], epoch=1) == alone
    assert source.rewrite([example(row) for row in range(6)], epoch=2) != alone


@pytest.mark.parametrize("skip", [True, False])
def test_identical_pairs_enter_only_an_empty_buffer(skip):
    original = {}

    def repeat(contexts, budgets, seeds):
        return [
            [10 + len(context) - 2 + k for k in range(budget)]
            for context, budget in zip(contexts, budgets, strict=True)
        ]

    source = play(ScriptedGenerator(repeat), skip_identical=skip)
    for step in range(3):
        drawn = source.pairs([example(step)], epoch=0, step=step, micro_batch=0)
        assert drawn
        assert all(pair.identical for pair in drawn)
        original[step] = len(source.buffer)
    assert list(original.values()) == ([1, 1, 1] if skip else [1, 2, 3])


def test_generation_interval_rests_and_max_age_discards():
    generator = ScriptedGenerator(lambda contexts, budgets, seeds: [[60]] * len(contexts))
    source = play(generator, generation_interval=2, replay_max_age=1)
    sizes = []
    for step in range(4):
        source.pairs([example(step)], epoch=0, step=step, micro_batch=0)
        sizes.append(len(source.buffer))
    assert sizes == [1, 1, 1, 1]
    assert len(generator.calls) == 2
