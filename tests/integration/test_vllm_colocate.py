"""vLLM in this process, for real, on a CPU: its text against that of transformers."""

import os
import random
import shutil

import numpy as np
import pytest
import torch

from sapo.errors import ConfigurationError, GenerationError
from sapo.generation.protocol import Engine
from sapo.generation.sampling import Sampling, filtered_probabilities
from sapo.seeds import derive_seed
from tests.colocated import END, LENGTH, NEEDS_VLLM, adapted, by_transformers, contexts_of, model, start

pytestmark = NEEDS_VLLM

SAMPLINGS = [Sampling(1.0, 0, 1.0), Sampling(0.7, 50, 0.95), Sampling(1.3, 7, 1.0), Sampling(0.9, 0, 0.6)]


@pytest.fixture(scope="module", autouse=True)
def small_cache():
    before = dict(os.environ)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    yield
    # What vLLM sets for its own children is not for the tests after these.
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module", params=["dense", "tied", "lora"])
def served(request, tmp_path_factory):
    """An engine, and two policies that it can serve by name, with their folders."""
    folder = tmp_path_factory.mktemp(request.param)
    policies = {}
    for number, name in enumerate(("first", "second")):
        lora = request.param == "lora"
        policies[name] = model(0 if lora else number, tie_word_embeddings=request.param == "tied")
        if lora:
            policies[name].save_pretrained(folder / "base")
            policies[name] = adapted(policies[name], number)
        policies[name].save_pretrained(folder / name)
    engine = start(folder / ("base" if request.param == "lora" else "first"), lora_rank=4 if lora else None)
    yield engine, policies, folder
    engine.close()


def test_it_is_an_engine(served):
    assert isinstance(served[0], Engine)


def test_greedy_text_is_that_of_transformers_after_each_load(served):
    engine, policies, folder = served
    contexts = [*contexts_of(4, 5), *contexts_of(3, 40, seed=1), *contexts_of(1, 1, seed=2)]
    budgets = [12, 1, 0, 40, 30, 7, 40, 20]
    texts = {name: by_transformers(policy, contexts, budgets) for name, policy in policies.items()}
    assert texts["first"] != texts["second"]
    for number, name in enumerate(("first", "second", "first")):
        engine.load(folder / name, f"{name}-{number}")
        assert engine.generate(contexts, budgets, [0] * len(contexts)) == texts[name]
        assert engine.version == engine._llm.llm_engine.get_weight_version() == f"{name}-{number}"


def test_keys_and_values_of_earlier_weights_are_not_used(served, monkeypatch):
    engine, policies, folder = served
    # Longer than a block of the cache: shorter contexts are never found again.
    contexts, budgets = contexts_of(3, 280, seed=3), [16] * 3
    # Of one name: vLLM tells adapters apart by that.
    for version in ("first", "second"):
        shutil.copytree(folder / version, folder / "current", dirs_exist_ok=True)
        engine.load(folder / "current", version)
        if version == "first":
            engine.generate(contexts, budgets, [0] * 3)
    right = by_transformers(policies["second"], contexts, budgets)
    with monkeypatch.context() as patched:
        patched.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        assert engine.generate(contexts, budgets, [0] * 3) != right
    assert engine.generate(contexts, budgets, [0] * 3) == right


def test_a_cache_that_is_not_reset_is_refused(served, monkeypatch):
    engine, _, folder = served
    engine.load(folder / "first", "first")
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(GenerationError, match="prefix cache"):
        engine.generate([[5]], [1], [0])


def test_a_row_depends_on_its_seed_alone(served, monkeypatch):
    engine, _, folder = served
    engine.load(folder / "first", "first")
    monkeypatch.setattr(engine, "_sampling", SAMPLINGS[1])
    contexts, budgets = contexts_of(6, 8, seed=4), [9, 24, 3, 24, 15, 1]
    seeds = [derive_seed("row", row) for row in range(6)]
    together = engine.generate(contexts, budgets, seeds)
    assert engine.generate(contexts, budgets, seeds) == together
    assert engine.generate(contexts[::-1], budgets[::-1], seeds[::-1])[::-1] == together
    for row in range(6):
        assert engine.generate(contexts[row : row + 1], budgets[row : row + 1], seeds[row : row + 1]) == [together[row]]
    assert engine.generate(contexts, budgets, [seed + 1 for seed in seeds]) != together


def test_rows_end_with_their_budget_or_first_end_token(served, monkeypatch):
    engine, _, folder = served
    engine.load(folder / "first", "first")
    monkeypatch.setattr(engine, "_sampling", SAMPLINGS[0])
    contexts, budgets = contexts_of(40, 6, seed=5), [0, 1, 7, 30] * 10
    seeds = list(range(40))
    monkeypatch.setattr(engine, "_end_ids", frozenset())
    free = engine.generate(contexts, budgets, seeds)
    # The end token of the model's configuration means nothing unless it is among `eos_ids`.
    assert [len(reply) for reply in free] == budgets
    assert any(END in reply for reply in free)
    ends = frozenset({END, 7, 20})
    monkeypatch.setattr(engine, "_end_ids", ends)
    cut = [reply[: next((i + 1 for i, t in enumerate(reply) if t in ends), len(reply))] for reply in free]
    assert engine.generate(contexts, budgets, seeds) == cut
    assert cut != free


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_have_the_distribution_of_filtered_probabilities(served, sampling, monkeypatch):
    engine, policies, folder = served
    engine.load(folder / "second", "second")
    monkeypatch.setattr(engine, "_sampling", sampling)
    monkeypatch.setattr(engine, "_end_ids", frozenset())
    context, rows = contexts_of(1, 8, seed=6)[0], 3000
    replies = engine.generate([context] * rows, [2] * rows, [derive_seed("draw", row) for row in range(rows)])
    counts = torch.zeros(63, 63, dtype=torch.float64)
    for first, second in replies:
        counts[first, second] += 1
    batch = torch.tensor([[*context, token] for token in range(63)])
    with torch.no_grad():
        logits = policies["second"](batch).logits
    expected = rows * probabilities(logits[:1, -2], sampling).T * probabilities(logits[:, -1], sampling)
    assert not counts[expected == 0].any()
    for seen, wanted in ((counts.sum(1), expected.sum(1)), (counts.flatten(), expected.flatten())):
        assert chi_square_tail(seen, wanted) > 1e-4


def probabilities(logits, sampling):
    values, ids = filtered_probabilities(logits, sampling)
    return torch.zeros(logits.shape, dtype=torch.float64).scatter(1, ids, values.double())


def chi_square_tail(counts, expected, least=5.0):
    """Chance of a statistic as large as that of `counts`, or larger; cells that expect fewer than `least` are one."""
    rare = expected < least
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))


def test_the_distribution_test_tells_other_samplings_apart(served):
    _, policies, _ = served
    with torch.no_grad():
        logits = policies["second"](torch.tensor(contexts_of(1, 8, seed=6))).logits[:, -1]
    for other in (Sampling(0.8, 50, 0.95), Sampling(0.7, 50, 0.9)):
        seen, wanted = (3000 * probabilities(logits, sampling)[0] for sampling in (other, SAMPLINGS[1]))
        assert (seen[wanted == 0] > 0).any() or chi_square_tail(seen, wanted) < 1e-4


def test_training_draws_the_numbers_it_would_have_drawn(served, monkeypatch):
    engine, _, folder = served
    monkeypatch.setattr(engine, "_sampling", SAMPLINGS[0])
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    engine.load(folder / "first", "first")
    engine.generate(contexts_of(2, 4), [8, 8], [1, 2])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_requests_that_do_not_fit_are_refused(served):
    engine, _, folder = served
    engine.load(folder / "first", "first")
    assert [len(reply) for reply in engine.generate(contexts_of(1, LENGTH - 1), [1], [0])] == [1]
    with pytest.raises(ConfigurationError, match=r"row 1: 319 tokens and 2 new ones .* Raise it to 321"):
        engine.generate([[4], *contexts_of(1, LENGTH - 1)], [1, 2], [0, 0])
    with pytest.raises(ConfigurationError, match="tokenizer"):
        engine.generate([[63]], [1], [0])
    with pytest.raises(ConfigurationError, match="empty"):
        engine.generate([[]], [1], [0])


@pytest.mark.parametrize(
    ("tokens", "budget"), [([5, 6], 3), ([5, 6, 7], 2), ([END, 5], 2), ([5, END, END], 3), ([5, 63], 2), ([5, -1], 2)]
)
def test_replies_that_cannot_be_are_refused(served, tokens, budget):
    with pytest.raises(GenerationError, match="row 3"):
        served[0]._checked(3, tokens, budget)


def test_weights_that_cannot_be_loaded_leave_nothing_to_generate_with(served, tmp_path):
    engine, _, folder = served
    engine.load(folder / "first", "first")
    with pytest.raises(GenerationError):
        engine.load(tmp_path / "nothing", "nothing")
    assert engine.version is None
    with pytest.raises(GenerationError, match="no weights"):
        engine.generate([[5]], [1], [0])
