"""What an engine of vLLM does to the process it is in, and what it needs from it."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

from sapo.errors import ConfigurationError, GenerationError
from sapo.generation.sampling import Sampling
from tests.colocated import LENGTH, NEEDS_VLLM, adapted, by_transformers, contexts_of, model, start

pytestmark = NEEDS_VLLM

CONTEXTS, BUDGETS, SEEDS = contexts_of(4, 6), [20] * 4, [0] * 4


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    before = dict(os.environ)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def started(tmp_path):
    engines = []

    def begin(policy=None, **options):
        (policy or model(0)).save_pretrained(tmp_path / "base")
        engines.append(start(tmp_path / "base", **options))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.close()


def written(engine):
    return engine.generate(CONTEXTS, BUDGETS, SEEDS)


def test_weights_from_memory_are_served(started):
    policies = [model(seed) for seed in range(3)]
    engine = started(policies[0])
    for number, policy in enumerate(policies):
        engine.load_tensors(policy.named_parameters(), str(number))
        assert written(engine) == by_transformers(policy, CONTEXTS, BUDGETS)
    rounded = model(3).to(torch.bfloat16)
    # As a float32 master: of another type than what it was rounded to.
    engine.load_tensors(rounded.named_parameters(), "rounded")
    assert written(engine) == by_transformers(rounded.float(), CONTEXTS, BUDGETS)
    assert all(weight.requires_grad for weight in rounded.parameters())


def test_weights_may_be_made_one_at_a_time(started):
    policy = model(1)
    asked = []

    def gathered():
        for name, weight in policy.named_parameters():
            asked.append(name)
            yield name, weight.detach().clone()

    engine = started()
    engine.load_tensors(gathered(), "1")
    assert asked == [name for name, _ in policy.named_parameters()]
    assert written(engine) == by_transformers(policy, CONTEXTS, BUDGETS)


PART = "model.layers.1.self_attn.k_proj.weight"


def refused(engine, weights, complaint):
    with pytest.raises(GenerationError, match=complaint) as error:
        engine.load_tensors(weights.items(), "refused")
    assert "\n" not in str(error.value)
    assert engine.version is None
    with pytest.raises(GenerationError, match="no weights"):
        written(engine)


def test_incomplete_weights_are_refused_until_there_are_all(started):
    policy = model(1)
    whole = dict(policy.named_parameters())
    engine = started()
    refused(engine, {name: whole[name] for name in whole if name != "model.norm.weight"}, r"lack 1 .*norm\.weight")
    engine.load_tensors(whole.items(), "1")
    # vLLM keeps the projections of queries, keys and values as one weight.
    refused(engine, {name: whole[name] for name in whole if name != PART}, f"lack 1 .*{PART}")
    engine.load_tensors(whole.items(), "2")
    assert written(engine) == by_transformers(policy, CONTEXTS, BUDGETS)


@pytest.mark.parametrize("what", ["unknown", "shape"])
def test_weights_of_another_model_end_the_engine(started, what):
    whole = dict(model(1).named_parameters())
    other = {"unknown": {"model.layers.2.mlp.other.weight": whole[PART]}, "shape": {PART: whole[PART][:, :-1]}}
    engine = started()
    refused(engine, whole | other[what], "cannot load the weights refused")
    refused(engine, whole, "Restart the engine")


def test_an_engine_without_weights_writes_nothing(started):
    with pytest.raises(GenerationError, match="no weights"):
        written(started())


def test_what_cannot_be_served_is_refused_in_one_line(started, tmp_path):
    with pytest.raises(ConfigurationError, match=r"temperature=0\.005"):
        started(sampling=Sampling(temperature=0.005))
    with pytest.raises(ConfigurationError, match="rank of 1000"):
        started(lora_rank=1000)
    with pytest.raises(GenerationError, match="max_model_len"):
        started(max_model_len=LENGTH + 1)
    with pytest.raises(GenerationError, match="nowhere"):
        start(tmp_path / "nowhere")
    # None of these attempts is in the way of a right one.
    engine = started()
    engine.load_tensors(model(0).named_parameters(), "0")
    assert written(engine)


def test_experts_are_refused_on_a_cpu(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32, "vocab_size": 63}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(GenerationError, match="experts"):
        start(tmp_path)
    assert not dist.is_initialized()


def test_adapters_beyond_what_was_asked_for_are_refused(started, tmp_path):
    engine = started(lora_rank=2)
    with pytest.raises(ConfigurationError, match="adapter"):
        engine.load_tensors([], "0")
    adapted(model(0), 0, r=16).save_pretrained(tmp_path / "large")
    with pytest.raises(GenerationError, match="rank"):
        engine.load(tmp_path / "large", "large")


def process_state():
    return {
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "precision": torch.get_float32_matmul_precision(),
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
    }


def test_the_process_is_as_before(tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path)
    # vLLM leaves threads alone where this is set.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(2)
    try:
        before = process_state()
        engine = start(tmp_path)
        assert process_state() == before
        engine.close()
        assert process_state() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(1)


def test_one_engine_may_follow_another(started):
    assert not dist.is_initialized()
    for seed in range(2):
        engine = started(model(seed))
        engine.load_tensors(model(seed).named_parameters(), str(seed))
        assert written(engine) == by_transformers(model(seed), CONTEXTS, BUDGETS)
        engine.close()
        engine.close()
        assert not dist.is_initialized()


def test_it_sleeps_until_it_is_needed(started, monkeypatch):
    """The order of calls alone: a CPU has no memory to free, so vLLM's worker there does nothing when told to."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    engine = started()
    sleeping = engine._llm.llm_engine.is_sleeping
    assert sleeping()
    for seed in range(2):
        engine.load_tensors(model(seed).named_parameters(), str(seed))
        assert not sleeping()
        for _ in range(2):
            assert written(engine) == by_transformers(model(seed), CONTEXTS, BUDGETS)
            assert sleeping()
    assert engine.generate(CONTEXTS, [0] * 4, SEEDS) == [[]] * 4
    assert sleeping()


class Following:
    """A generator for a trainer: gives the engine the opponent's weights as they are, then asks it."""

    def __init__(self, engine, folder):
        self.engine = engine
        self.folder = folder
        self.trainer = None
        self.calls = 0

    def generate(self, contexts, max_new_tokens, seeds):
        self.calls += 1
        opponent = self.trainer.opponent
        if self.trainer.is_adapter():
            opponent.save_pretrained(self.folder)
            self.engine.load(self.folder, str(self.calls))
        else:
            self.engine.load_tensors(opponent.tensors().items(), str(self.calls))
        return self.engine.generate(contexts, max_new_tokens, seeds)


@pytest.mark.parametrize("lora", [False, True], ids=["dense", "lora"])
def test_training_on_its_text_equals_training_on_that_of_transformers(started, make_trainer, tmp_path, lora):
    def trained(name, generator=None):
        trainer = make_trainer(
            name,
            lora=lora,
            model=model(0).train(),
            generator=generator,
            max_steps=4,
            gradient_accumulation_steps=2,
            temperature=0,
            disable_dropout=True,
        )
        if generator is not None:
            generator.trainer = trainer
        trainer.train()
        return [weight.detach() for weight in trainer.policy().parameters()]

    following = Following(started(lora_rank=4 if lora else None), tmp_path / "opponent")
    ours = trained("vllm", following)
    assert following.calls >= 4
    assert all(map(torch.equal, ours, trained("transformers")))


@pytest.mark.slow
def test_each_process_has_an_engine_of_its_own(tmp_path):
    policies = [model(0), model(1)]
    for seed, policy in enumerate(policies):
        policy.save_pretrained(tmp_path / str(seed))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*launch, __file__, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(2):
        text = torch.load(tmp_path / f"text-{rank}.pt", weights_only=True)
        assert text == [by_transformers(policy, CONTEXTS[rank:], BUDGETS[rank:]) for policy in (*policies, model(2))]


def broadcast(weight):
    own = weight.detach().clone()
    dist.broadcast(own, src=0)
    return own


def process(folder):
    """One of two: writes other rows than its neighbour, and the group outlives the engine."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    engine = start(folder / "0")
    texts = []
    for turn in (0, 1):
        engine.load(folder / str(turn), str(turn))
        texts.append(engine.generate(CONTEXTS[rank:], BUDGETS[rank:], SEEDS[rank:]))
    # As of a sharded opponent: each weight is put together by all when the engine asks for it.
    policy = model(2) if rank == 0 else model(3)
    engine.load_tensors(((name, broadcast(weight)) for name, weight in policy.named_parameters()), "2")
    texts.append(engine.generate(CONTEXTS[rank:], BUDGETS[rank:], SEEDS[rank:]))
    engine.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    torch.save(texts, folder / f"text-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    process(Path(sys.argv[1]))
