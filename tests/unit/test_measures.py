import math
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapo.data.examples import Turn
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.generation.scripted import ScriptedGenerator
from sapo.measures.intervals import bootstrap_ratio, over_halves, paired_change
from sapo.measures.measure import LocalOptions, Measured, measure, sample_responses, summarize
from sapo.measures.text import distinct, ends_in_loop, jensen_shannon, ngram_counts, seq_rep
from sapo.seeds import derive_seed
from tests.tiny import tiny_llama

TOKENS = st.lists(st.integers(0, 5), max_size=40)


def test_seq_rep_counts_ngrams_that_came_before():
    assert seq_rep([1, 2, 3, 4, 5, 6]) == 0
    assert seq_rep([1, 2, 3]) is None
    # 1 2 1 2 1 2 has the 4-grams 1212, 2121, 1212: one of three came before.
    assert seq_rep([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)


@given(TOKENS)
def test_seq_rep_is_a_share_and_a_repeated_text_has_more(tokens):
    once, twice = seq_rep(tokens), seq_rep(tokens + tokens)
    if once is not None:
        assert 0 <= once < 1
        assert twice >= once


def test_loops_are_found_only_at_the_end_and_only_when_long():
    assert ends_in_loop([9, 8, *[1, 2, 3, 4] * 3])
    assert ends_in_loop([5] * 12)
    assert not ends_in_loop([5] * 11)
    assert not ends_in_loop([*[1, 2, 3, 4] * 3, 9])
    assert not ends_in_loop([1, 2, 3, 4] * 2)
    assert not ends_in_loop([])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(4, 9), max_size=10))
def test_any_block_repeated_often_enough_is_a_loop(block, head):
    assert ends_in_loop(head + block * 12)


def test_distinct_is_types_over_tokens():
    assert distinct([[1, 2], [1, 2]], 1) == 0.5
    assert distinct([[1, 2], [1, 2]], 2) == 0.5
    assert distinct([[1, 2], [1, 2]], 1, limit=2) == 1
    assert distinct([[1]], 2) is None


def test_jensen_shannon_is_zero_for_equals_and_one_for_strangers():
    assert jensen_shannon(Counter({(1,): 2, (2,): 2}), Counter({(1,): 5, (2,): 5})) == 0
    assert jensen_shannon(Counter({(1,): 2}), Counter({(2,): 5})) == pytest.approx(1)
    assert jensen_shannon(Counter(), Counter({(2,): 5})) is None


@given(TOKENS, TOKENS, TOKENS)
def test_jensen_shannon_is_a_distance(a, b, c):
    p, q, r = (ngram_counts([tokens], 1) for tokens in (a, b, c))
    if a and b and c:
        assert jensen_shannon(p, q) == pytest.approx(jensen_shannon(q, p))
        assert jensen_shannon(p, r) <= jensen_shannon(p, q) + jensen_shannon(q, r) + 1e-9


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(10)
    covered = 0
    for trial in range(400):
        estimate = bootstrap_ratio(rng.normal(3.0, 1.0, size=60).tolist(), seed=trial, resamples=500)
        covered += estimate.low <= 3.0 <= estimate.high
    assert 0.91 <= covered / 400 <= 0.98


def test_standard_error_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(1).normal(size=400)
    expected = values.std(ddof=1) / math.sqrt(400)
    assert bootstrap_ratio(values.tolist()).stderr == pytest.approx(expected, rel=0.1)


def test_ratio_weighs_examples_by_their_denominator():
    assert bootstrap_ratio([2.0, 30.0], [1, 10]).value == pytest.approx(32 / 11)
    assert bootstrap_ratio([]) is None
    assert bootstrap_ratio([1.0], [0.0]) is None


def test_paired_change_is_surer_than_two_separate_numbers():
    rng = np.random.default_rng(0)
    before = rng.normal(size=100)
    after = before + 0.1 + 0.01 * rng.normal(size=100)
    change = paired_change(after.tolist(), before.tolist())
    assert change.value == pytest.approx(0.1, abs=0.01)
    assert change.stderr < bootstrap_ratio(after.tolist()).stderr / 20


def test_halving_gives_the_standard_error_of_a_mean():
    values = np.random.default_rng(2).normal(size=400)
    estimate = over_halves(400, lambda half, rest: float(values[half].mean()), halves=400)
    assert estimate.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(400), rel=0.15)
    assert over_halves(3, lambda half, rest: 1.0) is None


def turns(count, length=6):
    rng = np.random.default_rng(0)
    return [
        Turn(0, tuple(rng.integers(3, 60, size=4).tolist()), (*rng.integers(3, 60, size=length - 1).tolist(), 1))
        for _ in range(count)
    ]


def test_likelihood_is_what_the_model_gives_token_by_token():
    model, (turn,) = tiny_llama().eval(), turns(1)
    (found,) = measure(
        lambda: nullcontext(model),
        ScriptedGenerator(lambda contexts, budgets, seeds: [[7, 1] for _ in contexts]),
        [0],
        [turn],
        LocalOptions(max_length=32),
        pad_token_id=0,
    )
    with torch.no_grad():
        logps = model(torch.tensor([[*turn.prompt_ids, *turn.response_ids]])).logits.log_softmax(-1)[0]
    start = len(turn.prompt_ids) - 1
    expected = sum(float(logps[start + place, token]) for place, token in enumerate(turn.response_ids))
    assert found.data_logp == pytest.approx(expected, rel=1e-5)
    assert found.own == (7, 1)
    assert found.own_logp < 0


def test_a_rows_sample_does_not_depend_on_the_other_rows():
    model = tiny_llama().eval()
    generator = TransformersGenerator(lambda: nullcontext(model), Sampling(1.0, 0, 1.0), eos_ids={1}, pad_token_id=0)
    options, given = LocalOptions(max_new_tokens=12, max_length=32), turns(6)
    together = sample_responses(generator, range(6), given, options)
    alone = [sample_responses(generator, [row], [given[row]], options)[0] for row in range(6)]
    assert together == alone


def test_samples_stay_within_the_positions():
    asked = []

    def reply(contexts, budgets, seeds):
        asked.extend(budgets)
        return [[] for _ in contexts]

    given = [Turn(0, tuple(range(3, 3 + length)), (1,)) for length in (5, 15, 16, 17)]
    sample_responses(ScriptedGenerator(reply), range(4), given, LocalOptions(max_new_tokens=8, max_length=16))
    assert asked == [8, 1, 0, 0]


def summary(own, data, **scores):
    measured = [
        Measured(
            row,
            data_logp=scores.get("data_logp", -10.0),
            data_tokens=len(theirs),
            own=tuple(ours),
            own_logp=scores.get("own_logp", -5.0),
            opponent_logp=scores.get("opponent_logp"),
            opponent_tokens=scores.get("opponent_tokens"),
        )
        for row, (ours, theirs) in enumerate(zip(own, data, strict=True))
    ]
    return summarize(measured, data, frozenset({1}), max_new_tokens=8)


def test_summary_of_a_model_that_writes_the_data():
    data = [[*range(10 * row + 2, 10 * row + 8), 1] for row in range(8)]
    found = summary(data, data, data_logp=-7.0, own_logp=-7.0)
    assert found["nll"].value == pytest.approx(1.0)
    assert found["ended"].value == found["ended_data"].value == 1
    assert found["length_ratio"].value == 1
    assert found["prefers_data_to_own"].value == 0.5
    assert found["gap_to_own"].value == 0
    assert found["ngram_distance_1"].value == pytest.approx(found["ngram_distance_1_data"].value)
    assert found["distinct_2"].value == pytest.approx(found["distinct_2_data"].value)
    assert "prefers_data_to_opponent" not in found


def test_summary_of_a_model_that_loops():
    data = [[2, 3, 4, 5, 6, 10 + row, 1] for row in range(8)]
    found = summary([[2] * 16 for _ in data], data, opponent_logp=-20.0, opponent_tokens=4)
    assert found["loops"].value == 1
    assert found["ended"].value == 0
    assert found["seq_rep_4"].value == pytest.approx(12 / 13)
    assert found["distinct_1"].value < found["distinct_1_data"].value
    assert found["ngram_distance_1"].value > found["ngram_distance_1_data"].value
    assert found["prefers_data_to_own"].value == 0
    assert found["prefers_data_to_opponent"].value == 1


def test_a_data_response_longer_than_the_budget_does_not_count_as_ended():
    data = [[*range(2, 20), 1] for _ in range(4)]
    assert summary(data, data)["ended_data"].value == 0


def test_seeds_of_samples_name_the_row():
    asked = []

    def reply(contexts, budgets, seeds):
        asked.extend(seeds)
        return [[] for _ in contexts]

    sample_responses(ScriptedGenerator(reply), [4], turns(1), LocalOptions(seed=3))
    assert asked == [derive_seed(3, "local", 4, 0)]
