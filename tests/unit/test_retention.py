import math
import random

import pytest
import torch
from torch import nn

from sapo.data.examples import DataOptions
from sapo.data.unanswered import general_prompts, shipped_prompts
from sapo.measures.retention import (
    REPLY_SAMPLING,
    Forced,
    StartStates,
    fixed_head,
    generate_replies,
    kl_estimate,
    score_forced,
    spread,
    states_of,
)
from sapo.preference import token_distributions
from sapo.preference.token_distributions import Head, token_kl
from tests.tiny import byte_tokenizer, tiny_llama

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def forced(count=9, seed=0):
    rng = random.Random(seed)

    def tokens(low, high):
        return tuple(rng.randrange(3, 60) for _ in range(rng.randint(low, high)))

    return [Forced(tokens(1, 9), tokens(1, 12)) for _ in range(count)]


def start_of(model, rows, batch_size=4):
    model.eval()
    return StartStates(states_of(model, rows, pad_token_id=0, batch_size=batch_size), fixed_head(model))


def scores(model, rows, start, batch_size=4):
    return score_forced(model, rows, start, pad_token_id=0, batch_size=batch_size)


def kl_by_hand(start, model, row):
    """The definition, in float64: sum over the reply's positions and the vocabulary of p (log p - log q)."""
    tokens = torch.tensor([[*row.prompt_ids, *row.reply_ids]])
    with torch.no_grad():
        p, q = (one.eval().double()(input_ids=tokens).logits[0].log_softmax(-1) for one in (start, model))
    places = slice(len(row.prompt_ids) - 1, len(tokens[0]) - 1)
    return float((p[places].exp() * (p[places] - q[places])).sum())


def test_the_start_is_at_distance_exactly_zero():
    model, rows = tiny_llama(), forced()
    start = start_of(model, rows)
    assert all(one.kl == 0.0 for one in scores(model, rows, start))


def test_kl_is_the_sum_over_the_vocabulary_at_every_token_of_the_reply():
    one, other, rows = tiny_llama(), tiny_llama(seed=1), forced()
    found = scores(other, rows, start_of(one, rows))
    for row, score in zip(rows, found, strict=True):
        assert score.tokens == len(row.reply_ids)
        assert score.kl == pytest.approx(kl_by_hand(one, other, row), rel=1e-4)
        assert score.kl > 0
    estimate = kl_estimate(found)
    assert estimate.value == pytest.approx(sum(s.kl for s in found) / sum(s.tokens for s in found))
    assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize("chunk", [1, 100, 1 << 23])
def test_kl_changes_with_neither_batch_size_nor_chunks(chunk, monkeypatch):
    monkeypatch.setattr(token_distributions, "CHUNK_LOGITS", chunk)
    one, other, rows = tiny_llama(), tiny_llama(seed=1), forced()
    start = start_of(one, rows)
    first, *others = [[score.kl for score in scores(other, rows, start, size)] for size in (1, 2, 9)]
    for again in others:
        assert again == pytest.approx(first, rel=1e-4)


def test_training_changes_neither_the_kept_states_nor_the_kept_head():
    model, rows = tiny_llama(), forced()
    start = start_of(model, rows)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    before = tiny_llama().eval()
    for row, score in zip(rows, scores(model, rows, start), strict=True):
        assert score.kl == pytest.approx(kl_by_hand(before, model, row), rel=1e-3)
        model.float(), before.float()


def test_kl_is_never_negative_and_precise_near_zero():
    torch.manual_seed(0)
    logits = torch.randn(50, 1000)
    for size in (0.0, 1e-6, 1e-4, 1e-2, 1.0, 30.0):
        other = logits + size * torch.randn(50, 1000)
        found = token_kl(logits, other)
        exact = logits.double().log_softmax(-1)
        exact = (exact.exp() * (exact - other.double().log_softmax(-1))).sum(-1)
        assert bool((found >= 0).all())
        assert torch.allclose(found.double(), exact, rtol=1e-2 if size < 1e-3 else 1e-4, atol=1e-12)


def test_kl_is_finite_where_the_start_gives_nothing():
    start, other = torch.zeros(1, 4), torch.zeros(1, 4)
    start[0, 0], other[0, 1] = 300.0, 300.0
    assert float(token_kl(start, other)) == pytest.approx(300.0)


def test_gradient_of_kl_is_the_difference_of_the_distributions():
    torch.manual_seed(0)
    start, logits = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    token_kl(start, logits).sum().backward()
    assert torch.allclose(logits.grad, logits.softmax(-1) - start.softmax(-1), atol=1e-12)


@pytest.mark.parametrize(
    "config", [{"logit_scale": 0.25}, {"logits_scaling": 8.0}, {"final_logit_softcapping": 5.0}, {}]
)
def test_head_does_what_the_architecture_does_to_logits(config):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("C", (), {"model_type": "x", **config, "get_text_config": lambda self: self})()
            self.head = nn.Linear(3, 5, bias=False)

        def get_output_embeddings(self):
            return self.head

    model, hidden = Model(), torch.randn(2, 3)
    expected = model.head(hidden) * config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)
    if cap := config.get("final_logit_softcapping"):
        expected = cap * torch.tanh(expected / cap)
    assert torch.allclose(Head.of(model)(hidden), expected)


def test_a_model_that_treats_its_logits_in_another_way_is_refused():
    from sapo.errors import ModelError

    class Odd(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    model = tiny_llama()
    model.__class__ = Odd
    with pytest.raises(ModelError, match="Odd does not compute"):
        states_of(model, forced(), pad_token_id=0, batch_size=4)


def test_shipped_prompts_are_many_varied_and_without_repetition():
    general, replay = shipped_prompts(), shipped_prompts("replay")
    assert len(general) >= 200
    assert len({prompt.kind for prompt in general}) >= 15
    texts = [prompt.text for prompt in (*general, *replay)]
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() and 5 < len(text) < 400 for text in texts)


def test_general_prompts_go_through_the_chat_template():
    options = DataOptions(max_length=2000, max_prompt_length=1000)
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    ids = general_prompts(tokenizer, {tokenizer.eos_token_id}, options)
    assert len(ids) == len(shipped_prompts())
    text = tokenizer.decode(ids[0])
    assert text == f"<|im_start|>user\n{shipped_prompts()[0].text}<|im_end|>\n<|im_start|>assistant\n"
    short = general_prompts(tokenizer, {tokenizer.eos_token_id}, DataOptions(max_length=90, max_prompt_length=80))
    assert 0 < len(short) < len(ids)


def test_spread_takes_items_from_everywhere():
    assert spread(3, 9) == [0, 3, 6]
    assert spread(9, 3) == [0, 1, 2]


def test_replies_depend_on_nothing_but_model_and_prompts():
    from contextlib import nullcontext

    from sapo.generation.decoding import TransformersGenerator

    model, prompts = tiny_llama().eval(), [row.prompt_ids for row in forced()]

    def replies(size):
        generator = TransformersGenerator(
            lambda: nullcontext(model), REPLY_SAMPLING, eos_ids={1}, pad_token_id=0, batch_size=size
        )
        return generate_replies(generator, prompts, max_new_tokens=8, max_length=64)

    assert replies(2) == replies(9)
    assert math.isclose(REPLY_SAMPLING.temperature, 1.0)
