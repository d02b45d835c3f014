"""Laws of `sapo.generation.sampling`: the same distribution as transformers, drawn without shared state."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import sapo.generation.sampling as sampling_module
from sapo.errors import ConfigurationError
from sapo.generation.sampling import (
    INVALID_TOKEN,
    UNDECIDED_TOKEN,
    Sampling,
    filtered_probabilities,
    sample_tokens,
)


def dense(logits, sampling):
    """Probabilities over the whole vocabulary, from our sparse ones."""
    probabilities, ids = filtered_probabilities(logits, sampling)
    return torch.zeros(logits.shape, dtype=torch.float32).scatter(1, ids, probabilities)


def reference(logits, sampling):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers(None, logits.float()).softmax(-1)


def random_logits(seed, rows=4, vocabulary=120, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, vocabulary, generator=generator)).to(dtype)


def uniform_numbers(count, seed=0):
    rng = random.Random(seed)
    return torch.tensor([rng.random() for _ in range(count)], dtype=torch.float64)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    vocabulary=st.sampled_from([2, 17, 64, 65, 200]),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.95, 1.0]),
)
def test_filtered_distribution_equals_transformers_warpers(seed, vocabulary, temperature, top_k, top_p):
    logits = random_logits(seed, vocabulary=vocabulary)
    sampling = Sampling(temperature, top_k, top_p)
    torch.testing.assert_close(dense(logits, sampling), reference(logits, sampling), atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_p", [0.8, 1.0])
@pytest.mark.parametrize("spacing", [0.5, 2.0, 50.0])
def test_ties_with_the_kth_token_are_kept_as_in_transformers(top_p, spacing):
    # Coarse logits tie often; at a spacing of 50 the whole vocabulary ties, far beyond the fetched margin.
    logits = (random_logits(5, rows=16, vocabulary=300) / spacing).round() * spacing
    sampling = Sampling(1.0, 20, top_p)
    ours = dense(logits, sampling)
    if top_p == 1:
        torch.testing.assert_close(ours, reference(logits, sampling), atol=1e-6, rtol=0)
    else:
        # Of tokens that tie at the threshold transformers keeps any; how many, and how likely, agree.
        theirs = reference(logits, sampling)
        torch.testing.assert_close(ours.sort(-1).values, theirs.sort(-1).values, atol=1e-6, rtol=0)


def test_half_precision_logits_give_a_float32_distribution():
    logits = random_logits(3, vocabulary=500, dtype=torch.bfloat16)
    probabilities, _ = filtered_probabilities(logits, Sampling())
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(dense(logits, Sampling()), reference(logits, Sampling()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [0, 5, 50])
def test_token_ids_ascend(top_k):
    _, ids = filtered_probabilities(random_logits(1), Sampling(top_k=top_k))
    assert (ids.diff(dim=-1) > 0).all()


def test_excluded_tokens_have_no_probability():
    logits = random_logits(2)
    logits[:, 10:] = -math.inf
    for sampling in (Sampling(), Sampling(top_k=0), Sampling(top_k=0, top_p=1.0)):
        ours = dense(logits, sampling)
        assert (ours[:, 10:] == 0).all()
        torch.testing.assert_close(ours.sum(-1), torch.ones(4))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_k=0), Sampling(top_k=4, top_p=1.0), Sampling(1.5, 0, 1.0)]
)
def test_sampling_follows_the_distribution(sampling):
    draws = 20_000
    logits = random_logits(7, rows=1, vocabulary=90, scale=2.0)
    tokens = sample_tokens(logits.expand(draws, -1), uniform_numbers(draws), sampling)
    counts = torch.bincount(tokens, minlength=90).double()
    expected = reference(logits, sampling)[0].double() * draws
    assert (counts[expected == 0] == 0).all()
    large = expected > 5
    counts, expected = counts[large], expected[large]
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 1  # four standard deviations, seed fixed


def test_borders_of_the_unit_interval_give_the_first_and_last_possible_token():
    logits = torch.full((2, 8), -math.inf)
    logits[:, [2, 5]] = 0.0
    uniforms = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_k=0, top_p=1.0), Sampling(1.0, 2, 1.0)):
        assert sample_tokens(logits, uniforms, sampling).tolist() == [2, 5]


def test_each_row_uses_its_own_uniform_number():
    logits, uniforms = random_logits(4, rows=32), uniform_numbers(32)
    together = sample_tokens(logits, uniforms, Sampling())
    alone = torch.cat([sample_tokens(logits[i : i + 1], uniforms[i : i + 1], Sampling()) for i in range(32)])
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together, alone)
    assert torch.equal(together[order], sample_tokens(logits[order], uniforms[order], Sampling()))


def test_small_noise_hardly_ever_changes_a_token():
    # Near-equal logits: laid out by probability, noise would swap neighbours and change about every other token.
    logits = 1e-6 * random_logits(8, rows=500)
    noise = 1e-6 * random_logits(9, rows=500)
    uniforms = uniform_numbers(500)
    sampling = Sampling(top_k=0, top_p=1.0)
    before, after = (sample_tokens(x, uniforms, sampling) for x in (logits, logits + noise))
    assert (before != after).sum() <= 1


def test_temperature_zero_takes_the_likeliest_token():
    logits = random_logits(6)
    tokens = sample_tokens(logits, uniform_numbers(4), Sampling(temperature=0))
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=0), Sampling(1.0, 0, 1.0), Sampling(0)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_marked(sampling, value):
    logits = random_logits(6)
    expected = sample_tokens(logits, uniform_numbers(4), sampling)
    logits[1, 100] = value
    logits[2] = -math.inf
    expected[[1, 2]] = INVALID_TOKEN
    assert torch.equal(sample_tokens(logits, uniform_numbers(4), sampling), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ConfigurationError, match=name):
        Sampling(**wrong)


def test_published_settings_are_the_defaults():
    assert Sampling() == Sampling(temperature=0.7, top_k=50, top_p=0.95)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 5, 1.0), Sampling(0.5, 20, 0.8)])
def test_an_accelerator_draws_the_same_tokens_and_marks_rows_it_cannot_decide(sampling, monkeypatch):
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[3] = 0.0  # everything ties
    logits[4, :400] = 2.0
    logits[5, 7] = math.nan
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = sample_tokens(logits, uniforms, sampling)
    monkeypatch.setattr(sampling_module, "host_computes", lambda device: False)
    drawn = sample_tokens(logits, uniforms, sampling)
    assert drawn[3:6].tolist() == [UNDECIDED_TOKEN, UNDECIDED_TOKEN, INVALID_TOKEN]
    others = [row for row in range(64) if row not in (3, 4)]
    assert torch.equal(drawn[others], expected[others])
    assert torch.equal(sample_tokens(logits, uniforms, sampling, whole=True), expected)
