"""Laws of the generators: what a row becomes depends on its context, budget and seed, and on nothing else."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import random

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import GenerationConfig

from sapo.errors import ConfigurationError, ModelError
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.protocol import Generator
from sapo.generation.sampling import Sampling
from sapo.generation.scripted import ScriptedGenerator
from tests.decoding import (
    END,
    EVERY_ARCHITECTURE,
    GREEDY,
    OTHER_END,
    PAD,
    VOCABULARY,
    Spy,
    built,
    common,
    generator_for,
    greedy_text,
    request,
)
from tests.tiny import enable_checkpointing


@pytest.fixture
def llama():
    return copy.deepcopy(built("llama"))


@EVERY_ARCHITECTURE
def test_greedy_equals_generate(name):
    model = built(name)
    contexts, budgets, seeds = request()
    expected = [greedy_text(model, c, b, [END, OTHER_END]) for c, b in zip(contexts, budgets, strict=True)]
    got = generator_for(model, GREEDY, eos_ids=[END, OTHER_END]).generate(contexts, budgets, seeds)
    assert got == expected
    assert len({token for row in got for token in row}) > 5  # the comparison means something


@EVERY_ARCHITECTURE
def test_text_does_not_depend_on_batch_composition(name):
    model = built(name)
    contexts, budgets, seeds = request(rows=10, seed=1)
    together = generator_for(model, eos_ids=[END]).generate(contexts, budgets, seeds)
    alone = [
        generator_for(model, eos_ids=[END]).generate([c], [b], [s])[0]
        for c, b, s in zip(contexts, budgets, seeds, strict=True)
    ]
    assert together == alone
    order = random.Random(2).sample(range(10), 10)
    shuffled = generator_for(model, eos_ids=[END]).generate(
        *([values[i] for i in order] for values in (contexts, budgets, seeds))
    )
    assert shuffled == [together[i] for i in order]
    for batch_size in (1, 3):
        chunked = generator_for(model, eos_ids=[END], batch_size=batch_size)
        assert chunked.generate(contexts, budgets, seeds) == together


@EVERY_ARCHITECTURE
def test_text_does_not_depend_on_the_passes_that_read_the_contexts(name, monkeypatch):
    """Several passes where keys and values are all that a model keeps, else one."""
    contexts, budgets, seeds = request()
    model = built(name)
    expected = generator_for(model).generate(contexts, budgets, seeds)
    monkeypatch.setattr("sapo.generation.decoding.TOKENS_PER_PASS", 16)
    spy = Spy(model)
    try:
        assert generator_for(model).generate(contexts, budgets, seeds) == expected
    finally:
        spy.handle.remove()  # other tests use the model too
    if name == "llama":
        prompts = [rows * width for rows, width in spy.shapes if width > 1]
        assert len(prompts) > 2
        assert max(prompts) <= max(16, *map(len, contexts))


def test_seed_alone_decides_a_rows_randomness(llama):
    generator = generator_for(llama)
    same = generator.generate([[5, 6]] * 4, [12] * 4, [11, 11, 12, 13])
    assert same[0] == same[1]
    assert len({tuple(row) for row in same}) == 3
    torch.manual_seed(99)
    random.seed(99)
    assert generator.generate([[5, 6]] * 4, [12] * 4, [11, 11, 12, 13]) == same


def test_a_longer_budget_only_appends(llama):
    generator = generator_for(llama)
    (short,), (long,) = generator.generate([[5, 6]], [4], [1]), generator.generate([[5, 6]], [12], [1])
    assert long[:4] == short


def test_batches_are_grouped_by_context_length(llama):
    spy = Spy(llama)
    contexts = [[3] * length for length in (9, 2, 8, 1)]
    generator_for(llama, batch_size=2).generate(contexts, [1] * 4, range(4))
    assert spy.shapes == [(2, 2), (2, 9)]


def test_finished_rows_are_dropped(llama):
    spy = Spy(llama)
    generator_for(llama).generate([[3, 4], [5], [6, 7, 8], [9]], [1, 4, 2, 0], range(4))
    assert spy.shapes == [(3, 3), (2, 1), (1, 1), (1, 1)]


def test_nothing_to_write_runs_no_forward_yet_enters_the_context(llama):
    spy, entered = Spy(llama), []

    @contextlib.contextmanager
    def model_context():
        entered.append(True)
        yield llama

    generator = TransformersGenerator(model_context, Sampling(), eos_ids=[END], pad_token_id=PAD)
    assert generator.generate([[3], [4, 5]], [0, 0], [1, 2]) == [[], []]
    assert generator.generate([], [], []) == []
    assert spy.shapes == []
    assert len(entered) == 2  # collectives inside need every process


def test_every_end_token_stops(llama):
    free = generator_for(llama).generate([[5, 6, 7]], [18], [4])[0]
    for place in range(1, 18):
        ends = {free[place], free[min(17, place + 3)]}
        stop = next(i for i, token in enumerate(free) if token in ends)
        assert generator_for(llama, eos_ids=ends).generate([[5, 6, 7]], [18], [4]) == [free[: stop + 1]]


def test_an_end_token_inside_a_prompt_changes_nothing(llama):
    contexts = [[END, 5, END, 6], [7, END]]
    free = generator_for(llama, GREEDY).generate(contexts, [6, 6], [1, 2])
    stopping = generator_for(llama, GREEDY, eos_ids=[63]).generate(contexts, [6, 6], [1, 2])
    assert free == [greedy_text(llama, c, 6) for c in contexts]
    assert [row[:1] for row in stopping] == [row[:1] for row in free]


def test_budget_per_row(llama):
    budgets = [5, 0, 1, 12, 3]
    rows = generator_for(llama).generate([[5]] * 5, budgets, range(5))
    assert [len(row) for row in rows] == budgets


@EVERY_ARCHITECTURE
def test_prompt_starting_with_pad(name):
    model = built(name)
    contexts = [[PAD, PAD, 9, PAD, 12], [9, 12], [PAD], [5] * 9]
    expected = [greedy_text(model, context, 6) for context in contexts]
    assert generator_for(model, GREEDY).generate(contexts, [6] * 4, range(4)) == expected


def snapshot(model):
    return (
        {key: module.training for key, module in model.named_modules()},
        {key: (p.requires_grad, p.grad, p.clone()) for key, p in model.named_parameters()},
        copy.deepcopy(model.config.to_dict()),
        [module.__dict__.get("gradient_checkpointing") for module in model.modules()],
        [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
    )


def assert_same(before, after):
    for old, new in zip(before[1].values(), after[1].values(), strict=True):
        assert old[:2] == new[:2]
        assert torch.equal(old[2], new[2])
    assert torch.equal(before[5], after[5])
    for part in (0, 2, 3, 4, 6):
        assert before[part] == after[part]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_model_is_left_as_it_was(llama, mode, use_cache):
    llama.train(mode != "eval")
    if mode == "mixed":
        llama.model.layers[0].eval()
        llama.model.layers[0].mlp.train()
    llama.model.embed_tokens.requires_grad_(False)
    llama.config.use_cache = use_cache
    enable_checkpointing(llama)
    before = snapshot(llama)
    generator_for(llama).generate(*request())
    assert_same(before, snapshot(llama))
    assert torch.is_grad_enabled()


def test_model_is_left_as_it_was_after_an_error(llama):
    llama.train()
    llama.lm_head.weight.data[7] = math.nan
    with pytest.raises(ModelError):
        generator_for(llama).generate([[5]], [3], [1])
    assert all(module.training for module in llama.modules())
    assert torch.is_grad_enabled()


def test_a_call_can_be_abandoned_before_each_token(llama):
    spy, looks = Spy(llama), []

    def look():
        looks.append(len(spy.caches))
        if len(looks) == 4:
            raise KeyboardInterrupt

    generator = TransformersGenerator(
        lambda: contextlib.nullcontext(llama), Sampling(), eos_ids=(), pad_token_id=PAD, look=look
    )
    llama.train()
    with pytest.raises(KeyboardInterrupt):
        generator.generate([[5, 6], [7]], [50, 60], [1, 2])
    # One forward pass between two looks, and none after the last.
    assert looks == [0, 1, 2, 3] == list(range(len(spy.caches) + 1))
    assert all(module.training for module in llama.modules())


class FourBit(nn.Linear):
    """As a 4-bit layer with float32 around it: computes in bfloat16, returns the type of its input."""

    def forward(self, inputs):
        return nn.functional.linear(inputs.bfloat16(), self.weight).to(inputs.dtype)


def test_a_4_bit_model_keeps_keys_and_values_in_its_compute_type(llama):
    for layer in llama.model.layers:
        for parent, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "k_proj"), (layer.self_attn, "v_proj")):
            linear = FourBit(*getattr(parent, name).weight.shape[::-1], bias=False)
            linear.weight = nn.Parameter(getattr(parent, name).weight.bfloat16(), requires_grad=False)
            setattr(parent, name, linear)
    llama.config.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    before, spy = snapshot(llama), Spy(llama)
    rows = generator_for(llama).generate([[5, 6, 7], [8]], [6, 4], [1, 2])
    assert [len(row) for row in rows] == [6, 4]
    assert {layer.keys.dtype for layer in spy.caches[-1].layers} == {torch.bfloat16}
    after = snapshot(llama)
    assert {p[2].dtype for p in after[1].values()} == {torch.bfloat16, torch.float32}
    assert_same(before, after)


def test_weights_are_stored_by_input_while_decoding_and_as_before_afterwards(monkeypatch):
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**(common | {"tie_word_embeddings": True}))
    ).eval()
    contexts, _, seeds = request(rows=5, seed=2)
    contexts, budgets = [context[:6] for context in contexts], [0, 8, 8, 8, 8]
    expected = generator_for(model).generate(contexts, budgets, seeds)
    monkeypatch.setattr("sapo.generation.weight_layout._LEAST_BYTES", 0)
    monkeypatch.setattr("sapo.generation.weight_layout._LEAST_TOKENS", 8)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("torch._C.has_mkl", True)
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    strides = []
    handle = model.register_forward_pre_hook(lambda *_: strides.append(model.lm_head.weight.stride()))
    assert generator_for(model).generate(contexts, budgets, seeds) == expected
    assert set(strides) == {(1, VOCABULARY)}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_same(before, snapshot(model))
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(ModelError):
        generator_for(model).generate(contexts, budgets, seeds)
    handle.remove()
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.is_contiguous() for p in model.parameters())


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_training_mode_do_not_change_the_text(name, reentrant):
    expected = generator_for(built(name)).generate(*request())
    model = copy.deepcopy(built(name)).train()
    enable_checkpointing(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    spy = Spy(model)
    assert generator_for(model).generate(*request()) == expected
    assert max(width for _, width in spy.shapes[1:]) == 1  # the cache was in use
    spy.handle.remove()
    # and the model still trains with checkpointing
    loss = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    assert model.get_input_embeddings().weight.grad is not None


# peft 0.21 asks transformers 5.23 by a name that it deprecates.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("adapter", ["default", "opponent", None])
def test_peft_adapter(llama, adapter):
    lora = functools.partial(peft.LoraConfig, r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = copy.deepcopy(llama)
    model = peft.get_peft_model(llama, lora())
    model.add_adapter("opponent", lora())
    model.train()

    @contextlib.contextmanager
    def model_context():
        if adapter is None:
            with model.disable_adapter():
                yield model
            return
        model.set_adapter(adapter)
        yield model
        model.set_adapter("default")

    contexts, budgets, seeds = request()
    got = TransformersGenerator(model_context, GREEDY, eos_ids=(), pad_token_id=PAD).generate(contexts, budgets, seeds)
    assert all(module.training for module in model.modules())
    plain = copy.deepcopy(model)
    if adapter is None:
        plain = base
    else:
        plain.set_adapter(adapter)
        plain = plain.merge_and_unload()
    plain.eval()
    assert got == [greedy_text(plain, c, b) for c, b in zip(contexts, budgets, strict=True)]


def test_written_sequences_are_distributed_as_those_of_generate():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(common | {"vocab_size": 5, "initializer_range": 0.3}))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    rows, tokens, sampling = 20_000, 3, Sampling(1.3, 4, 0.9)
    ours = generator_for(model, sampling, batch_size=10_000).generate([[3, 4]] * rows, [tokens] * rows, range(rows))
    generation = GenerationConfig(
        do_sample=True, max_new_tokens=tokens, temperature=1.3, top_k=4, top_p=0.9, pad_token_id=PAD
    )
    prompt = torch.tensor([[3, 4]] * rows)
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=generation)[:, 2:]
    codes = [torch.tensor(ours), theirs]
    a, b = (torch.bincount((code * torch.tensor([25, 5, 1])).sum(-1), minlength=125).double() for code in codes)
    assert (a > 0).sum() > 20
    seen = a + b >= 20
    chi_square = ((a - b) ** 2 / (a + b))[seen].sum().item()
    freedom = int(seen.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_logits_that_are_not_finite_are_an_error(llama):
    llama.lm_head.weight.data[7] = math.nan
    with pytest.raises(ModelError, match=r"row 1: .*new token 0 .*not finite"):
        generator_for(llama).generate([[5], [6]], [0, 3], [1, 2])


def test_a_model_without_a_cache_is_an_error():
    class NoCache(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **options):
            logits = torch.zeros(*input_ids.shape, VOCABULARY)
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    with pytest.raises(ModelError, match="NoCache returned no key-value cache"):
        generator_for(NoCache()).generate([[5]], [3], [1])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"pad_token_id": -100}])
def test_settings_out_of_range_are_refused(options):
    arguments = {"eos_ids": [END], "pad_token_id": PAD} | options
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        TransformersGenerator(lambda: contextlib.nullcontext(nn.Identity()), Sampling(), **arguments)


@pytest.mark.parametrize("make", [lambda: generator_for(built("llama")), lambda: ScriptedGenerator([[[3]] * 2])])
def test_a_request_that_breaks_the_contract_is_refused(make):
    generator = make()
    assert isinstance(generator, Generator)
    with pytest.raises(ConfigurationError, match="row 1: the context is empty"):
        generator.generate([[5], []], [1, 0], [1, 2])
    with pytest.raises(ConfigurationError, match="row 0: max_new_tokens=-1"):
        generator.generate([[5], [6]], [-1, 0], [1, 2])
    with pytest.raises(ConfigurationError, match="2 contexts, 1 budgets and 2 seeds"):
        generator.generate([[5], [6]], [1], [1, 2])
