"""Laws of the shared layout: it computes what the plain one does, on every architecture that can."""

import copy
import inspect
import itertools
import random

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from sapo.config import HAS_FUSED_LM_HEAD
from sapo.generation.forward import frozen
from sapo.preference import scoring, shared_prefix
from sapo.preference.batches import collate_pairs
from sapo.preference.objectives import IGNORE, chosen_nll, dpo_loss, orpo_loss, token_logps
from sapo.preference.pairs import Pair
from sapo.preference.scoring import heads_disagree, prepare_shared_layout, score, summed_logps
from sapo.preference.segments import Segment
from sapo.preference.shared_prefix import PairSpan, SharedPrefixes, may_attend
from tests.tiny import enable_checkpointing

VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 12
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3, sliding": Qwen3Config(
        **SMALL, head_dim=16, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "mistral, sliding": MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
}
UNABLE = {
    "alibi": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "recurrent": MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
    "linear attention": Qwen3NextConfig(
        **SMALL, layer_types=["linear_attention", "full_attention"] * 2, num_experts=2, num_experts_per_tok=1
    ),
}


def make(name, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[name]), **options).train()


def ragged_pairs():
    """Prompts of 1 to 30 tokens, segments at the start, inside and at the end, every third ends early."""
    rng = random.Random(3)

    def words(low, high):
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high)))

    pairs = []
    for row in range(7):
        prompt, chosen, written = words(1, 30), words(4, 40), words(1, 12)
        start = 0 if row == 1 else rng.randrange(len(chosen) - 1)
        stop = len(chosen) if row == 2 else rng.randint(start + 1, len(chosen))
        rejected = (*chosen[:start], *written, *(() if row % 3 == 0 else chosen[stop:]))
        pairs.append(Pair(row, 0, prompt, chosen, rejected, Segment(start, stop), Segment(start, start + len(written))))
    return pairs


def dpo(scores):
    zero = torch.zeros_like(scores.chosen_logps)
    return dpo_loss(scores.chosen_logps, scores.rejected_logps, zero, zero, beta=0.1).losses.mean()


def orpo(scores):
    pair = orpo_loss(
        scores.chosen_logps / scores.chosen_lengths, scores.rejected_logps / scores.rejected_lengths, beta=0.5
    )
    return chosen_nll(scores.chosen_logps, scores.chosen_lengths).mean() + pair.losses.mean()


def loss_and_gradients(model, objective, layout, fused=False, suffix="keep"):
    model.zero_grad()
    batch = collate_pairs(ragged_pairs(), pad_token_id=0, layout=layout, score_shared=objective is orpo, suffix=suffix)
    loss = objective(score(model, batch, fused_lm_head=fused))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return loss.item(), gradients


def assert_equal(model, objective, **options):
    """Loss and all gradients of both layouts, within 1e-5 of the largest gradient."""
    (plain, expected), (shared, found) = (
        loss_and_gradients(model, objective, layout, **options) for layout in ("plain", "shared")
    )
    assert shared == pytest.approx(plain, rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize("objective", [dpo, orpo])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_prefixes_change_neither_loss_nor_gradients(name, objective):
    model = make(name)
    assert prepare_shared_layout(model) is None
    assert_equal(model, objective)


@pytest.mark.parametrize(("name", "objective"), [*zip(ARCHITECTURES, itertools.cycle([dpo, orpo])), ("gemma3", orpo)])
def test_nor_with_gradient_checkpointing(name, objective):
    model = make(name)
    enable_checkpointing(model)
    assert prepare_shared_layout(model) is None
    assert_equal(model, objective, suffix="mask")


@pytest.mark.parametrize(("name", "objective"), [*zip(ARCHITECTURES, itertools.cycle([dpo, orpo])), ("gemma3", orpo)])
def test_nor_with_lora_and_gradient_checkpointing(name, objective):
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(make(name), lora)
    enable_checkpointing(model.get_base_model())
    model.enable_input_require_grads()
    assert prepare_shared_layout(model) is None
    assert_equal(model, objective, suffix="mask")


@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="trl 1.16 brought the fused head")
def test_nor_with_the_fused_head():
    from trl.trainer.utils import add_fused_lm_head

    model = make("llama, tied")
    assert prepare_shared_layout(model) is None
    add_fused_lm_head(model)
    gathered = loss_and_gradients(model, orpo, "plain")
    for layout in ("plain", "shared"):
        fused = loss_and_gradients(model, orpo, layout, fused=True)
        assert fused[0] == pytest.approx(gathered[0], rel=1e-5)
        for name, gradient in gathered[1].items():
            torch.testing.assert_close(fused[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_a_call_without_shared_prefixes_is_sdpa():
    plain, ready = make("mistral, sliding"), make("mistral, sliding")
    assert prepare_shared_layout(ready) is None
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        assert torch.equal(plain(ids, attention_mask=mask).logits, ready(ids, attention_mask=mask).logits)
    # Nothing of it is saved with the model.
    assert "sapo" not in ready.config.to_json_string()


@pytest.mark.parametrize(("name", "why"), [("alibi", "eager"), ("recurrent", "eager"), ("linear attention", "linear")])
def test_what_cannot_share_says_why(name, why):
    assert why in prepare_shared_layout(AutoModelForCausalLM.from_config(UNABLE[name]))


def test_eager_attention_does_not_share():
    assert "eager" in prepare_shared_layout(make("llama", attn_implementation="eager"))


def test_an_architecture_that_loses_the_prefixes_on_the_way_is_found_out(monkeypatch):
    model = make("llama")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, shared_prefixes=None, **k: forward(*a, **k))
    assert "other log-probabilities" in prepare_shared_layout(model)


def under_autocast(model):
    """As accelerate prepares a model: autocast is in the forward that it patches in."""
    model._original_forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def quantized(monkeypatch, model):
    monkeypatch.setattr(scoring, "_can_compute_in_float32", lambda inner: False)
    return model.bfloat16()


IMPRECISE = {
    "autocast": lambda monkeypatch, model: under_autocast(model),
    "bfloat16": lambda monkeypatch, model: model.bfloat16(),
    "quantized": quantized,
}


@pytest.mark.parametrize("how", IMPRECISE)
@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma3", "gpt2"])
def test_rounding_is_no_reason_for_the_plain_layout(name, how, monkeypatch):
    model = IMPRECISE[how](monkeypatch, make(name))
    before = {key: (p.dtype, p.data_ptr()) for key, p in model.named_parameters()}
    forward = model.forward
    assert prepare_shared_layout(model) is None
    assert {key: (p.dtype, p.data_ptr()) for key, p in model.named_parameters()} == before
    assert model.forward == forward


@pytest.mark.parametrize("how", IMPRECISE)
@pytest.mark.parametrize("lost", ["shared_prefixes", "position_ids"])
def test_nor_does_rounding_hide_a_fault(lost, how, monkeypatch):
    model = make("llama")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: forward(*a, **{**k, lost: None}))
    assert "other log-probabilities" in prepare_shared_layout(IMPRECISE[how](monkeypatch, model))


def test_a_model_that_fails_with_a_shared_prefix_falls_back(monkeypatch):
    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False
    )
    reason = prepare_shared_layout(AutoModelForCausalLM.from_config(config))
    assert reason == "falcon builds ALiBi's biases from a mask of one row per text"
    monkeypatch.setattr("sapo.preference.scoring.shared_layout_unsupported_reason", lambda model: None)
    reason = prepare_shared_layout(AutoModelForCausalLM.from_config(config))
    assert "Falcon" in reason
    assert "does not support a shared prefix (ValueError: too many values to unpack" in reason


@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="trl 1.16 brought the fused head")
@pytest.mark.parametrize("how", ["float32", "autocast", "bfloat16"])
def test_heads_are_compared_with_each_other(how):
    from trl.trainer.utils import add_fused_lm_head

    model = make("llama")
    add_fused_lm_head(model)
    if how != "float32":
        IMPRECISE[how](None, model)
    assert heads_disagree(model) is None
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    assert "other log-probabilities than its own" in heads_disagree(model)


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_a_routers_loss_is_not_formed(layout):
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, **experts))
    assert prepare_shared_layout(model) is None
    batch = collate_pairs(ragged_pairs(), pad_token_id=0, layout=layout)
    found = score(model, batch)
    model.config.output_router_logits = False
    assert torch.equal(found.chosen_logps, score(model, batch).chosen_logps)


def test_log_probabilities_are_summed_in_float32():
    model = make("llama").bfloat16()
    sums, _ = summed_logps(model, collate_pairs(ragged_pairs(), pad_token_id=0))
    assert sums.dtype == torch.float32
    real = scoring.token_logps
    try:
        scoring.token_logps = lambda logits, targets: real(logits, targets).bfloat16()
        rounded, _ = summed_logps(model, collate_pairs(ragged_pairs(), pad_token_id=0))
    finally:
        scoring.token_logps = real
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, sums, rtol=4e-3, atol=0)


@pytest.mark.parametrize("window", [None, 5])
def test_the_rule_for_flex_attention_is_the_same_attention(window):
    spans = (PairSpan(0, 9, 13, 4), PairSpan(13, 20, 26, 0))
    prefixes = SharedPrefixes(spans)
    rule = may_attend(prefixes, window, "cpu")
    index = torch.arange(26)
    found = rule(0, 0, index[:, None], index[None, :])
    expected = torch.zeros(26, 26, dtype=torch.bool)
    for span in spans:
        chosen, branch = span.middle - span.start, span.stop - span.middle
        inside = slice(span.start, span.middle), slice(span.middle, span.stop)
        expected[inside[0], inside[0]] = prefixes.mask(chosen, chosen, window, index.device)
        seen = prefixes.mask(branch, span.visible + branch, window, index.device)
        expected[inside[1], span.start : span.start + span.visible] = seen[:, : span.visible]
        expected[inside[1], inside[1]] = seen[:, span.visible :]
    assert torch.equal(found, expected)


def test_logits_are_formed_where_they_are_scored_and_nowhere_else():
    model = make("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    batch = collate_pairs(ragged_pairs(), pad_token_id=0, score_shared=False)
    sums, lengths = summed_logps(model, batch)
    assert seen == [(1, int((batch.targets != IGNORE).sum()), VOCABULARY)] == [(1, int(lengths.sum()), VOCABULARY)]
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = token_logps(logits, batch.targets).sum(-1)
    torch.testing.assert_close(sums[: len(expected)], expected)


def test_the_published_likelihood_term_changes_with_the_padding_and_ours_does_not():
    model = make("llama")
    short = ragged_pairs()[3]
    with frozen(model):
        alone = score(model, collate_pairs([short], pad_token_id=0, all_positions=True))
        laid_out = collate_pairs([short], pad_token_id=0)
        ids = laid_out.input_ids[:1]
        logits = model(ids, attention_mask=laid_out.attention_mask[:1]).logits
        longer = short.chosen_ids * 2
        padded = Pair(0, 0, short.prompt_ids, short.chosen_ids, longer, short.segment, Segment(8, len(longer)))
        wide = score(model, collate_pairs([padded], pad_token_id=0, all_positions=True))
    expected = -token_logps(logits[:, :-1], ids[:, 1:]).mean()
    torch.testing.assert_close(alone.all_positions_nll, expected)
    assert abs(float(wide.all_positions_nll - alone.all_positions_nll)) > 1e-3
    torch.testing.assert_close(wide.chosen_logps, alone.chosen_logps)


def test_scoring_leaves_the_mode_of_the_model_as_it_was():
    model = make("llama")
    with frozen(model) as inner:
        assert not inner.training
        assert not torch.is_grad_enabled()
    assert model.training
    assert torch.is_grad_enabled()


def varlen_reference(query, key, value, queries, keys, longest_query, longest_key, *, scale, window_size):
    """What `torch.nn.attention.varlen` computes on CUDA, sequence by sequence in the open."""
    left, right = window_size
    assert right == 0
    assert longest_query == int(queries.diff().max())
    assert longest_key == int(keys.diff().max())
    outputs = []
    for own, seen in zip(itertools.pairwise(queries.tolist()), itertools.pairwise(keys.tolist()), strict=True):
        q, k, v = query[slice(*own)], key[slice(*seen)], value[slice(*seen)]
        behind = torch.arange(len(k)) - (len(k) - len(q)) - torch.arange(len(q))[:, None]
        allowed = (behind <= 0) & ((behind >= -left) if left >= 0 else True)
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
        weights = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        outputs.append(torch.einsum("hqk,khd->qhd", weights.masked_fill(~allowed, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("objective", [dpo, orpo])
@pytest.mark.parametrize("name", ["llama", "qwen3, sliding", "mistral, sliding", "gemma3"])
def test_one_call_for_all_sequences_is_exact(name, objective, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return varlen_reference(*args, **options)

    monkeypatch.setattr(shared_prefix, "_flash_kernel", lambda query, value: counted)
    model = make(name)
    assert prepare_shared_layout(model) is None
    assert_equal(model, objective)
    assert calls


@pytest.mark.skipif(Version(torch.__version__) < Version("2.11"), reason="PyTorch 2.11 brought its windows")
def test_the_kernel_of_one_call_is_found_where_pytorch_has_it(monkeypatch):
    from torch.nn.attention import varlen

    assert shared_prefix._varlen_attention() is not None
    assert "window_size" in inspect.signature(varlen.varlen_attn).parameters
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    largest = {
        kind: shared_prefix._largest_flash_head(kind) for kind in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
    }
    assert list(largest.values()) == [0, 256, 192, 192, 256, 192]
    # Not on a processor.
    assert shared_prefix._flash_kernel(torch.zeros(1, 2, 3, 64).bfloat16(), torch.zeros(1, 2, 3, 64)) is None
