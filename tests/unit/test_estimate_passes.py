"""Laws of the traced passes: the step that a run would do, without data."""

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from trl import ModelConfig

from sapo.estimate.devices import DEVICES
from sapo.estimate.estimate import trace_seconds
from sapo.estimate.passes import Lengths, pairs_of_a_pass, trace_passes
from sapo.estimate.tracing import Account, Trace
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.weights.footprint import Strategy, build_run_models
from tests.estimates import LENGTHS, MODELS, options, passes
from tests.unit.test_shared_prefix import SMALL


def test_the_account_holds_what_lives_and_forgets_what_is_freed():
    with FakeTensorMode():
        weight, given = torch.empty(64, 64), torch.empty(10, 64)
        with Account([weight, given]) as account:
            first = given @ weight
            second = first.t() + 1.0
            del first
            third = second * 2.0
            del second, third
    # Products of 10 x 64 floats, two of them at a time; a transposed view is nothing new.
    assert account.trace.peak == Counter(activations=2 * 10 * 64 * 4)
    assert [work.flops for work in account.trace.work] == [2 * 10 * 64 * 64, 0, 0]
    assert account.trace.work[1].moved == 2 * 10 * 64 * 4


def test_products_of_a_pass_are_those_known_by_formula():
    config = MODELS["llama"]
    found = passes(lengths=Lengths(20, 0, 8, 8))
    tokens, scored = 4 * (36 + 17), 4 * 2 * 16
    hidden, key_value = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * config.intermediate_size
    # Chosen causally, the branch at the prefix and itself.
    attention = 4 * hidden * (36 * 36 // 2 + 17 * (19 + 17)) * 4
    products = 2 * tokens * layer * config.num_hidden_layers + 2 * scored * hidden * config.vocab_size
    forward = products + attention * config.num_hidden_layers
    assert found.reference.flops == pytest.approx(forward, rel=0.001)
    backward = 2 * products + 2.5 * attention * config.num_hidden_layers
    assert found.training.flops == pytest.approx(forward + backward, rel=0.02)


def test_the_traced_pass_is_the_real_one():
    """The same operations with data: what autograd keeps alive at the worst time is what was foreseen."""
    from sapo.preference.batches import collate_pairs
    from sapo.preference.pairs import Pair
    from sapo.preference.scoring import prepare_shared_layout, summed_logps
    from sapo.preference.segments import Segment
    from tests.unit.test_shared_prefix import make

    model = make("mistral, sliding")
    assert prepare_shared_layout(model) is None
    pair = Pair(0, 0, (1,) * 20, (1,) * 20, (1,) * 20, Segment(4, 12), Segment(4, 12))
    batch = collate_pairs([pair] * 4, pad_token_id=0, layout="shared", score_shared=False)
    with Account([*model.parameters(), *model.buffers()]) as account:
        summed_logps(model, batch)[0].sum().backward()
    assert account.trace.bytes == pytest.approx(passes("mistral, sliding").training.bytes, rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_embeddings_are_traced_as_a_cpu_adds_them(tied, monkeypatch):
    """In place: the memory is that of the same passes with data, and less than where autograd makes a dense one."""
    from sapo.preference.batches import collate_pairs
    from sapo.preference.pairs import Pair
    from sapo.preference.scoring import summed_logps
    from sapo.preference.segments import Segment

    shape = {"num_hidden_layers": 1, "hidden_size": 128, "vocab_size": 4000, "tie_word_embeddings": tied}
    config = LlamaConfig(**SMALL | shape)
    monkeypatch.setitem(MODELS, "words", config)
    more = {"pairs": 1, "rows": 0, "lengths": Lengths(20, 4, 8, 8), "layout": "plain"}
    found = passes("words", **more, seed=int(tied))
    pair = Pair(0, 0, (1,) * 20, (1,) * 20, (1,) * 20, Segment(4, 12), Segment(4, 12))
    batch = collate_pairs([pair], pad_token_id=0, layout="plain", score_shared=False)
    model = LlamaForCausalLM(config).train()
    with Account([*model.parameters(), *model.buffers()]) as account:
        for _ in range(2):
            summed_logps(model, batch)[0].sum().backward()
    assert found.training.bytes == pytest.approx(account.trace.bytes, rel=0.02)
    table = 4 * config.vocab_size * config.hidden_size
    dense = passes("words", **more, seed=int(tied), on_gpu=True).training
    # Untied, the gradient of the head is as large, at another time.
    assert not tied or dense.bytes >= found.training.bytes + table
    assert dense.most["gradients"] == found.training.most["gradients"]


def test_contexts_are_traced_as_a_cpu_reads_them(monkeypatch):
    """In passes of a bounded number of tokens: less memory than one pass, the same work, the cache of all rows."""
    whole = passes(rows=13)
    monkeypatch.setattr("sapo.generation.decoding.TOKENS_PER_PASS", 4 * LENGTHS.context)
    parts, on_gpu = passes(rows=13, seed=1), passes(rows=13, seed=1, on_gpu=True)
    assert on_gpu.prefill.bytes == whole.prefill.bytes > 1.3 * parts.prefill.bytes
    assert parts.prefill.flops == whole.prefill.flops
    assert parts.token.flops == whole.token.flops
    assert parts.cache == whole.cache

    torch.manual_seed(0)
    model = LlamaForCausalLM(MODELS["llama"]).eval()
    generator = TransformersGenerator(lambda: contextlib.nullcontext(model), Sampling(), eos_ids=(), pad_token_id=0)
    with Account([*model.parameters(), *model.buffers()]) as account:
        generator.generate([[1] * LENGTHS.context] * 13, [1] * 13, range(13))
    assert account.trace.bytes == pytest.approx(parts.prefill.bytes, rel=0.1)


@pytest.mark.parametrize("lora", [False, True])
def test_each_memory_option_saves_what_it_is_for(lora):
    model = {"use_peft": True, "lora_target_modules": "all-linear"} if lora else {}
    long = {"name": "deep" if not lora else "llama", "lengths": Lengths(100, 0, 60, 60), "model": model}
    base = passes(**long).training.most["activations"]
    assert passes(gradient_checkpointing=True, **long).training.most["activations"] < base / 2
    assert passes(pairs=1, pairs_per_forward=1, **long).training.most["activations"] < base / 3
    assert passes(layout="plain", **long).training.most["activations"] > 1.2 * base


def test_the_fused_head_holds_no_logits():
    long = {"lengths": Lengths(20, 0, 60, 60), "pairs": 4}
    assert passes(**long).training.most["logits"] > 0
    fused = passes(fused=True, **long)
    assert not fused.training.most["logits"]
    # Its backward pass forms the logits again.
    config = MODELS["llama"]
    again = 2 * 4 * 2 * 120 * config.hidden_size * config.vocab_size
    assert fused.training.flops - passes(**long).training.flops == pytest.approx(again, rel=0.05)


def test_sharded_gradients_leave_the_device_as_they_are_formed():
    assert not passes(strategy=Strategy("fsdp2", 4)).training.most["gradients"]
    args = options()
    trained = build_run_models(MODELS["llama"], ModelConfig(), args, Strategy()).trained
    assert passes().training.most["gradients"] == sum(4 * weight.numel() for weight in trained)


def test_keys_and_values_are_counted_with_the_room_for_what_is_written():
    config = MODELS["llama"]
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert passes().cache == 4 * each * (LENGTHS.context + 1 + 128)


def test_parts_that_a_run_does_not_have_are_not_estimated():
    orpo = passes(objective="orpo")
    assert orpo.reference is None
    paired = passes(pair_source="paired", rows=0)
    assert (paired.prefill, paired.token, paired.cache) == (None, None, 0)


def test_the_published_likelihood_term_and_flash_attention_take_the_plain_layout():
    assert passes(objective="orpo", nll_scope="all").why_plain == "nll_scope=all"
    flash = ModelConfig(attn_implementation="flash_attention_2")
    roles = build_run_models(MODELS["llama"], flash, options(), Strategy())
    found = trace_passes(roles, LENGTHS, pairs=4, rows=0, fused_lm_head=False, on_gpu=False)
    assert (found.layout, found.why_plain) == ("plain", "attn_implementation is flash_attention_2")


def test_attention_and_large_new_blocks_take_what_was_measured():
    slow = dataclasses.replace(DEVICES["h100"], launch=0.0, attention_shares=(0.5, 0.25), fault=1e-9)
    with FakeTensorMode(), Account([]) as account:
        states = [torch.empty(1, 8, 512, 64) for _ in range(3)]
        torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True)
    (attention,) = (work for work in account.trace.work if work.attention)
    assert trace_seconds(Trace(work=[attention]), slow) == pytest.approx(2 * attention.flops / slow.float_rate)
    with FakeTensorMode():
        small, large = torch.empty(1000), torch.empty(10_000_000)
        with Account([small, large]) as account:
            small + 1
            large + 1
            large.add_(1)
            torch.logsumexp(large, 0)
    assert [work.fresh for work in account.trace.work] == [0, large.nbytes, 0, large.nbytes]
    new, same = (trace_seconds(Trace(work=[account.trace.work[place]]), slow) for place in (1, 2))
    assert new - same == pytest.approx(large.nbytes * 1e-9)


def test_an_operation_takes_a_least_time_in_a_graph_too():
    with FakeTensorMode():
        tiny = torch.empty(8)
        with Account([tiny]) as account:
            for _ in range(100):
                tiny.add_(1)
    device = dataclasses.replace(DEVICES["h200"], launch=0.0, least=2e-6)
    assert trace_seconds(account.trace, device, launches=1) == pytest.approx(100 * 2e-6)
    assert all(one.least > 0 for one in DEVICES.values())


def test_gathered_copies_generate_in_the_precision_of_the_run():
    whole, half = (passes(strategy=Strategy(name, 2), bf16=True).cache for name in ("multi_gpu", "fsdp2"))
    assert half == whole == passes().cache // 2
    # Beside float32 weights a cast of all of them, where they are not gathered in bfloat16 anyway.
    roles = build_run_models(MODELS["llama"], ModelConfig(), options(), Strategy())
    assert passes(bf16=True).cast == 2 * sum(weight.numel() for weight in roles.trained)
    assert passes(strategy=Strategy("fsdp2", 2), bf16=True).cast == passes().cast == 0


@pytest.mark.parametrize(("tokens", "pairs"), [(700, 2), (10, 1), (None, 4)])
def test_tokens_of_a_pass_bound_its_memory(tokens, pairs):
    roles = build_run_models(MODELS["llama"], ModelConfig(), options(tokens_per_forward=tokens), Strategy())
    # 220 tokens, and a branch of 121.
    assert pairs_of_a_pass(roles, Lengths(100, 0, 60, 60)) == pairs
