"""Laws of `sapo.preference.segments`: where a segment may lie, what splice keeps, what a seed depends on."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data.prepare import truncate
from sapo.preference.segments import Segment, choose_segment, segment_tokens, splice, truncate_at_eos
from sapo.seeds import derive_seed

settings.register_profile("laws", derandomize=True, deadline=None)
laws = settings(settings.get_profile("laws"))

EOS = 1
tokens = st.lists(st.integers(2, 50), max_size=30)
segment_lengths = st.one_of(st.none(), st.integers(1, 250), st.floats(0.001, 0.999))


@st.composite
def responses_with_segments(draw):
    response = draw(tokens)
    start = draw(st.integers(0, len(response)))
    return response, Segment(start, draw(st.integers(start, len(response))))


@laws
@given(n=st.integers(1, 300), length=segment_lengths, margin=st.integers(0, 10), seed=st.integers(0, 2**63))
def test_a_segment_is_never_empty_and_lies_inside_its_response(n, length, margin, seed):
    segment = choose_segment(n, length, random.Random(seed), tail_margin=margin)
    assert 0 <= segment.start < segment.stop <= n
    assert len(segment) == segment_tokens(n, length)


@laws
@given(n=st.integers(1, 300), length=segment_lengths, margin=st.integers(0, 10), seed=st.integers(0, 2**63))
def test_a_segment_that_starts_late_leaves_the_tail_margin(n, length, margin, seed):
    segment = choose_segment(n, length, random.Random(seed), tail_margin=margin)
    assert segment.start == 0 or segment.stop <= n - margin


def test_two_possible_starts_are_both_drawn():
    rng = random.Random(0)
    assert {choose_segment(14, 10, rng).start for _ in range(50)} == {0, 1}
    assert {choose_segment(13, 10, rng).start for _ in range(50)} == {0}


@pytest.mark.parametrize("margin", [0, 3, 7])
def test_every_start_from_0_to_n_minus_margin_minus_length_is_as_likely(margin):
    n, length, draws = 30, 12, 20_000
    rng = random.Random(11)
    starts = Counter(choose_segment(n, length, rng, tail_margin=margin).start for _ in range(draws))
    possible = n - margin - length + 1
    assert set(starts) == set(range(possible))
    expected = draws / possible
    statistic = sum((count - expected) ** 2 / expected for count in starts.values())
    assert statistic < possible - 1 + 4 * (2 * (possible - 1)) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_range_of_starts_are_reached_and_not_passed(uniform):
    class Fixed(random.Random):
        def random(self):
            return uniform

    assert choose_segment(23, 10, Fixed()).start == (0 if uniform == 0 else 10)


@laws
@given(n=st.integers(1, 300), beyond=st.integers(0, 50), seed=st.integers(0, 2**63))
def test_no_length_or_one_that_covers_the_response_rewrites_it_whole(n, beyond, seed):
    assert choose_segment(n, None, random.Random(seed)) == Segment(0, n)
    assert choose_segment(n, n + beyond, random.Random(seed)) == Segment(0, n)


@laws
@given(n=st.integers(1, 1000), fraction=st.floats(0.0001, 0.9999))
def test_a_fraction_is_rounded_to_tokens_and_is_at_least_one(n, fraction):
    length = segment_tokens(n, fraction)
    assert 1 <= length <= n
    assert length == 1 or abs(length - fraction * n) <= 0.5


@laws
@given(n=st.integers(1, 100), length=segment_lengths, seed=st.integers(0, 2**63))
def test_choosing_takes_one_number_from_the_generator_even_when_there_is_nothing_to_choose(n, length, seed):
    used, other = random.Random(seed), random.Random(seed)
    choose_segment(n, length, used)
    other.random()
    assert used.getstate() == other.getstate()


@pytest.mark.parametrize("length", [0, -1, -0.5])
def test_a_length_that_is_not_positive_is_refused(length):
    with pytest.raises(ValueError, match="must be positive"):
        segment_tokens(5, length)


def test_an_empty_response_has_no_segment():
    with pytest.raises(ValueError, match="must be 1 or more"):
        choose_segment(0, 3, random.Random(0))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2)])
def test_a_span_that_runs_backwards_or_starts_before_0_is_refused(start, stop):
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        Segment(start, stop)


@laws
@given(responses_with_segments(), tokens, st.sampled_from(["keep", "mask"]))
def test_splice_keeps_both_sides_of_the_segment(response_and_segment, replacement, suffix):
    response, segment = response_and_segment
    spliced = splice(response, segment, replacement, eos_ids={EOS}, suffix=suffix)
    after = response[segment.stop :]
    assert spliced == response[: segment.start] + replacement + after
    assert len(spliced) == len(response) - len(segment) + len(replacement)


@laws
@given(responses_with_segments())
def test_splicing_a_segment_into_its_own_place_changes_nothing(response_and_segment):
    response, segment = response_and_segment
    assert splice(response, segment, response[segment.start : segment.stop], eos_ids={EOS}) == response


@laws
@given(responses_with_segments(), tokens, st.sampled_from(["keep", "mask", "drop"]))
def test_nothing_follows_a_replacement_that_ends_the_response(response_and_segment, replacement, suffix):
    response, segment = response_and_segment
    written = [*replacement, EOS]
    spliced = splice(response, segment, written, eos_ids={EOS, 0}, suffix=suffix)
    assert spliced == response[: segment.start] + written


@laws
@given(responses_with_segments(), tokens)
def test_suffix_drop_leaves_nothing_after_the_replacement(response_and_segment, replacement):
    response, segment = response_and_segment
    spliced = splice(response, segment, replacement, eos_ids={EOS}, suffix="drop")
    assert spliced == response[: segment.start] + replacement


@laws
@given(tokens, st.integers(1, 5))
def test_splice_refuses_a_segment_beyond_the_response(response, beyond):
    with pytest.raises(ValueError, match="extends beyond"):
        splice(response, Segment(0, len(response) + beyond), [2])


@laws
@given(st.lists(st.integers(0, 5), max_size=20))
def test_truncate_at_eos_is_a_prefix_with_at_most_one_end_token_the_last(row):
    cut = truncate_at_eos(row, {0, 1})
    assert row[: len(cut)] == cut
    assert not {0, 1} & set(cut[:-1])
    assert cut == row or cut[-1] in {0, 1}
    assert truncate_at_eos(cut, {0, 1}) == cut


modes = st.sampled_from(["keep_end", "keep_start"])


@laws
@given(tokens, tokens, st.integers(1, 40), st.integers(1, 40), modes)
def test_truncation_never_exceeds_the_budget(prompt, response, most_prompt, room, mode):
    limits = {"max_length": most_prompt + room, "max_prompt_length": most_prompt}
    kept, rest = truncate(prompt, response, prompt_truncation=mode, **limits)
    assert len(kept) + len(rest) <= limits["max_length"]


@laws
@given(tokens, tokens, st.integers(1, 40), st.integers(1, 40), modes)
def test_truncation_cuts_the_prompt_first_and_no_more_than_it_must(prompt, response, most, most_prompt, mode):
    most_prompt = min(most_prompt, most)
    limits = {"max_length": most, "max_prompt_length": most_prompt}
    kept, rest = truncate(prompt, response, prompt_truncation=mode, **limits)
    if len(prompt) + len(response) <= most:
        assert (kept, rest) == (prompt, response)
        return
    size = min(len(prompt), most_prompt)
    assert kept == (prompt[len(prompt) - size :] if mode == "keep_end" else prompt[:size])
    assert rest == response[: len(rest)]
    assert len(rest) == min(len(response), max(0, most - size))


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("most_prompt", [-1, 0, 11])
def test_truncation_to_an_impossible_prompt_is_refused(most_prompt, mode):
    with pytest.raises(ValueError, match=rf"max_prompt_length={most_prompt}: must be between 1 and max_length=10"):
        truncate([1] * 20, [2], max_length=10, max_prompt_length=most_prompt, prompt_truncation=mode)


parts = st.lists(st.integers(-(2**40), 2**40) | st.sampled_from(["segment", "draw"]), min_size=1, max_size=5)


@laws
@given(parts, parts)
def test_a_seed_depends_on_all_parts_and_their_order_and_on_nothing_else(some, others):
    assert (derive_seed(*some) == derive_seed(*others)) == (some == others)


def test_a_part_that_could_pass_for_two_is_refused():
    with pytest.raises(ValueError, match="'a/b' contains the separator \"/\""):
        derive_seed(42, "a/b")


@laws
@given(parts, st.integers(0, 2**62))
def test_a_seed_is_not_touched_by_other_draws(what, seed):
    before = derive_seed(*what)
    random.seed(seed)
    derive_seed(seed)
    assert derive_seed(*what) == before
    assert 0 <= before < 2**63


def test_seeds_of_neighbouring_rows_share_no_pattern():
    bits = [derive_seed(0, "segment", 0, row, 0, 0) for row in range(4000)]
    for place in range(63):
        ones = sum(seed >> place & 1 for seed in bits)
        assert 1800 < ones < 2200
    changed = [(a ^ b).bit_count() for a, b in itertools.pairwise(bits)]
    assert 31 < sum(changed) / len(changed) < 32


def test_the_seed_of_a_purpose_stays_the_same_from_version_to_version():
    assert derive_seed(42, "segment", 1, 7, 0, 0) == 3997376712981755793
