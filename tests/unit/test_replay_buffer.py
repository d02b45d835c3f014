"""Laws of `sapo.preference.replay_buffer`: order, counts, the distribution of draws, what is restored."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.preference.replay_buffer import BufferEntry, ReplayBuffer

laws = settings(derandomize=True, deadline=None)
kinds = st.sampled_from(["inverse_count", "uniform"])
# How many items to draw after each addition.
histories = st.lists(st.integers(0, 8), max_size=30)

CHI_SQUARE_1_IN_1000 = {2: 13.82, 3: 16.27, 4: 18.47}


def filled(capacity, history, seed=0, **options):
    buffer, rng = ReplayBuffer(capacity, **options), random.Random(seed)
    for step, count in enumerate(history):
        buffer.add(f"item {step}", step)
        buffer.draw(count, rng)
    return buffer


def with_counts(counts, **options):
    buffer = ReplayBuffer(len(counts), **options)
    buffer.restore([BufferEntry(item, 0, count) for item, count in enumerate(counts)])
    return buffer


def chi_square(counts, probabilities, draws):
    return sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(probabilities))


@laws
@given(st.integers(1, 6), histories)
def test_the_newest_items_stay_in_the_order_they_came(capacity, history):
    buffer = filled(capacity, history)
    steps = list(range(len(history)))[-capacity:]
    held = [(entry.item, entry.step) for entry in buffer.entries()]
    assert held == [(f"item {step}", step) for step in steps]
    assert len(buffer) == len(steps)


@laws
@given(st.integers(1, 6), histories, st.booleans(), kinds)
def test_every_draw_is_counted_once_and_eviction_forgets(capacity, history, replacement, draw):
    buffer, rng = ReplayBuffer(capacity, draw=draw, replacement=replacement), random.Random(1)
    expected = {}
    for step, count in enumerate(history):
        expected = dict(list({**expected, step: 0}.items())[-capacity:])
        buffer.add(step, step)
        drawn = buffer.draw(count, rng)
        assert len(drawn) == min(count, len(expected))
        for item in drawn:
            expected[item] += 1
        assert {entry.item: entry.draws for entry in buffer.entries()} == expected
    assert buffer.mean_draws() == pytest.approx(sum(expected.values()) / max(len(expected), 1))


@laws
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=10))
def test_the_probability_of_an_item_is_proportional_to_one_over_its_draws_plus_one(counts):
    total = sum(1 / (count + 1) for count in counts)
    assert with_counts(counts).probabilities() == pytest.approx([1 / (count + 1) / total for count in counts])
    uniform = with_counts(counts, draw="uniform").probabilities()
    assert uniform == pytest.approx([1 / len(counts)] * len(counts))


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("counts", [(0, 1, 3), (0, 0, 9, 99), (5, 4, 3, 2, 1)])
def test_a_single_draw_follows_one_over_count_plus_one(counts, replacement):
    rng, drawn, draws = random.Random(5), Counter(), 6000
    probabilities = with_counts(counts).probabilities()
    for _ in range(draws):
        drawn.update(with_counts(counts, replacement=replacement).draw(1, rng))
    assert chi_square(drawn, probabilities, draws) < CHI_SQUARE_1_IN_1000[len(counts) - 1]


def test_all_items_of_one_draw_are_drawn_with_the_same_probabilities():
    rng, second, draws = random.Random(6), Counter(), 6000
    for _ in range(draws):
        second.update(with_counts((0, 1, 3)).draw(2, rng)[1:])
    assert chi_square(second, with_counts((0, 1, 3)).probabilities(), draws) < CHI_SQUARE_1_IN_1000[2]


def test_without_replacement_the_second_item_follows_the_weights_of_those_left():
    rng, pairs, draws = random.Random(7), Counter(), 6000
    weights = (1, 1 / 2, 1 / 4)
    for _ in range(draws):
        pairs[tuple(with_counts((0, 1, 3), replacement=False).draw(2, rng))] += 1
    total = sum(weights)
    statistic = 0.0
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            p = weights[first] / total * weights[second] / (total - weights[first])
            statistic += (pairs[first, second] - draws * p) ** 2 / (draws * p)
    assert statistic < 20.52  # chi-square, 5 degrees of freedom, 1 in 1000


def test_uniform_draws_do_not_look_at_the_counts():
    rng, drawn, draws = random.Random(8), Counter(), 6000
    for _ in range(draws):
        drawn.update(with_counts((0, 10, 1000), draw="uniform").draw(1, rng))
    assert chi_square(drawn, [1 / 3] * 3, draws) < CHI_SQUARE_1_IN_1000[2]


@laws
@given(st.integers(1, 6), histories, st.integers(0, 20), kinds)
def test_a_draw_without_replacement_never_holds_an_item_twice(capacity, history, count, draw):
    buffer = filled(capacity, history, draw=draw, replacement=False)
    drawn = buffer.draw(count, random.Random(2))
    assert len(set(drawn)) == len(drawn) == min(count, len(buffer))


@laws
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 2**32))
def test_draws_with_replacement_are_those_of_random_choices(counts, seed):
    weights = [1 / (count + 1) for count in counts]
    expected = random.Random(seed).choices(range(len(counts)), weights=weights, k=len(counts))
    assert with_counts(counts).draw(len(counts), random.Random(seed)) == expected


@laws
@given(st.integers(1, 6), histories, histories, st.booleans())
def test_a_buffer_restored_from_its_entries_goes_on_as_the_original(capacity, before, after, replacement):
    original = filled(capacity, before, replacement=replacement)
    restored = ReplayBuffer(capacity, replacement=replacement)
    restored.restore(original.entries())
    rng, other = random.Random(3), random.Random(3)
    for step, count in enumerate(after, start=len(before)):
        assert restored.entries() == original.entries()
        assert restored.mean_age(step) == pytest.approx(original.mean_age(step))
        for buffer in (original, restored):
            buffer.add(f"item {step}", step)
        assert restored.draw(count, other) == original.draw(count, rng)
    assert restored.entries() == original.entries()


@laws
@given(st.integers(1, 6), histories, histories)
def test_restore_forgets_what_was_there(capacity, before, other):
    buffer, source = filled(capacity, before), filled(capacity, other, seed=4)
    buffer.restore(iter(source.entries()))
    assert buffer.entries() == source.entries()


@laws
@given(st.integers(1, 6), histories, st.integers(-2, 32), histories)
def test_expiry_removes_exactly_what_is_too_old_and_keeps_the_counts(capacity, history, oldest, after):
    buffer = filled(capacity, history)
    entries = buffer.entries()
    kept = [entry for entry in entries if entry.step >= oldest]
    assert buffer.expire(oldest) == len(entries) - len(kept)
    assert buffer.entries() == kept
    for step in range(100, 100 + len(after)):
        buffer.add(step, step)
        assert buffer.entries()[-1] == BufferEntry(step, step, 0)
    assert len(buffer) == min(capacity, len(kept) + len(after))


def test_age_is_measured_in_steps():
    buffer = ReplayBuffer(3)
    for step in (2, 4):
        buffer.add("item", step)
    assert buffer.mean_age(5) == 2.0


def test_an_empty_buffer_gives_nothing_and_takes_nothing_from_the_generator():
    buffer, rng = ReplayBuffer(2), random.Random(0)
    state = rng.getstate()
    assert buffer.draw(3, rng) == []
    assert buffer.entries() == []
    assert buffer.probabilities() == []
    assert (buffer.mean_age(7), buffer.mean_draws(), buffer.expire(9)) == (0.0, 0.0, 0)
    assert rng.getstate() == state


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_buffer_holds_at_least_one_item(capacity):
    with pytest.raises(ValueError, match="must be 1 or more"):
        ReplayBuffer(capacity)


def test_more_entries_than_fit_are_refused_and_the_contents_stay():
    buffer = filled(2, [1, 1])
    before = buffer.entries()
    with pytest.raises(ValueError, match="3 entries exceed"):
        buffer.restore([BufferEntry(item, 0, 0) for item in range(3)])
    assert buffer.entries() == before
