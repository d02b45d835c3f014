import pytest
import torch
from torch.autograd import gradcheck

from sapo import SAPOConfig
from sapo.data.examples import Example, Turn
from sapo.errors import ConfigurationError
from sapo.preference import token_distributions
from sapo.preference.batches import collate_pairs
from sapo.preference.pair_loss import pair_loss
from sapo.preference.pairs import sft_pair
from sapo.preference.shared_prefix import use_shared_attention
from sapo.preference.token_distributions import Anchor, hidden_at, score_sft, token_kl
from tests.tiny import tiny_llama

ROWS = [((3, 4, 5), (6, 7, 8, 1)), ((9, 10), (11, 1)), ((12,), (13, 14, 15, 16, 17, 1))]


def batch(layout="plain"):
    pairs = [sft_pair(Example(row, ()), Turn(0, *ids)) for row, ids in enumerate(ROWS)]
    return collate_pairs(pairs, pad_token_id=0, layout=layout)


def config(**options):
    return SAPOConfig("out", use_cpu=True, report_to="none", objective="sft", **options)


def using(model):
    from contextlib import nullcontext

    return lambda: nullcontext(model)


def loss_of(model, start, layout="plain", *, by_probability, kl_weight):
    laid = batch(layout)
    anchor = None
    if kl_weight:
        with torch.no_grad():
            anchor = Anchor(hidden_at(start, laid), using(start))
    scores = score_sft(model, laid, anchor, by_probability=by_probability)
    weighting = "probability" if by_probability else "none"
    return pair_loss(scores, None, config(kl_weight=kl_weight, token_weighting=weighting))


def by_hand(model, start, *, by_probability, kl_weight):
    """sum_t w_t (-log pi(y_t)) and sum_t KL(rho || pi) over a response's tokens, both over its length; mean of rows."""
    losses = []
    for prompt, response in ROWS:
        tokens = torch.tensor([[*prompt, *response]])
        places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        own = model(input_ids=tokens).logits[0, places].log_softmax(-1)
        with torch.no_grad():
            before = start(input_ids=tokens).logits[0, places].log_softmax(-1)
        logps = own[torch.arange(len(response)), torch.tensor(response)]
        weights = logps.exp().detach() if by_probability else 1.0
        divergence = (before.exp() * (before - own)).sum(-1)
        losses.append(-(weights * logps).mean() + kl_weight * divergence.mean())
    return torch.stack(losses)


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize(("by_probability", "kl_weight"), [(False, 0.1), (True, 0.0), (True, 0.05), (False, 3.0)])
def test_loss_and_gradient_are_those_of_the_formula(layout, by_probability, kl_weight):
    model, start = tiny_llama(seed=1), tiny_llama(seed=2).eval()
    model.eval()
    use_shared_attention(model)
    use_shared_attention(start)
    options = {"by_probability": by_probability, "kl_weight": kl_weight}
    found = loss_of(model, start, layout, **options)
    found.loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    expected = by_hand(model, start, **options)
    expected.mean().backward()
    assert found.losses == pytest.approx(expected.tolist(), rel=1e-4)
    for own, weight in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(own, weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 200])
def test_chunks_change_neither_loss_nor_gradient(chunk, monkeypatch):
    start, gradients = tiny_llama(seed=2).eval(), []
    for size in (1 << 23, chunk):
        monkeypatch.setattr(token_distributions, "CHUNK_LOGITS", size)
        model = tiny_llama(seed=1).eval()
        loss_of(model, start, by_probability=True, kl_weight=0.1).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_at_the_start_the_anchor_is_zero_and_pulls_nowhere():
    model = tiny_llama(seed=1).eval()
    found = loss_of(model, tiny_llama(seed=1).eval(), by_probability=False, kl_weight=5.0)
    assert found.metrics["kl_loss"] == 0.0
    assert found.metrics["loss"] == pytest.approx(found.metrics["nll_loss"])


def test_kl_has_the_right_second_order():
    torch.manual_seed(0)
    start = torch.randn(2, 5, dtype=torch.float64)
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: token_kl(start, x), (logits,))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "dpo", "kl_weight": 0.1}, "belongs to objective=sft"),
        ({"objective": "orpo", "token_weighting": "probability"}, "belongs to objective=sft"),
        ({"objective": "sft", "reference": "initial"}, "reference=initial"),
    ],
)
def test_anchor_and_weights_belong_to_sft(options, said):
    with pytest.raises(ConfigurationError, match=said):
        SAPOConfig("out", use_cpu=True, report_to="none", **options)


def test_the_start_is_the_reference_of_anchored_sft():
    assert config(kl_weight=0.1).reference == "initial"
    assert config().reference == "none"
