"""Laws of `sapo.preference.objectives`: symmetry, signs, finite gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.preference.objectives import (
    IGNORE,
    chosen_nll,
    dpo_loss,
    log_odds,
    orpo_loss,
    sequence_logps,
    token_logps,
)

laws = settings(derandomize=True, deadline=None)
logps = st.floats(-400, 0)
quadruples = st.tuples(logps, logps, logps, logps)
betas = st.sampled_from([0.01, 0.1, 0.5, 2.0])
SIGMOID_HINGE = ["sigmoid", "hinge"]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def dpo(quadruple, **options):
    return dpo_loss(*(double(value) for value in quadruple), **options)


@pytest.mark.parametrize(("loss_type", "at_zero"), [("sigmoid", math.log(2)), ("hinge", 1.0)])
@laws
@given(logps, logps, betas)
def test_a_policy_equal_to_the_reference_has_no_margin(loss_type, at_zero, chosen, rejected, beta):
    ours = dpo((chosen, rejected, chosen, rejected), beta=beta, loss_type=loss_type)
    assert ours.losses.item() == pytest.approx(at_zero)
    assert ours.chosen_rewards.item() == ours.rejected_rewards.item() == 0


@laws
@given(quadruples, betas)
def test_exchanging_chosen_and_rejected_changes_the_loss_by_the_margin(values, beta):
    chosen, rejected, chosen_reference, rejected_reference = values
    one = dpo(values, beta=beta)
    other = dpo((rejected, chosen, rejected_reference, chosen_reference), beta=beta)
    margin = one.chosen_rewards - one.rejected_rewards
    # -log s(m) and -log s(-m) differ by m.
    torch.testing.assert_close(other.losses - one.losses, margin, rtol=1e-9, atol=1e-9)
    assert other.chosen_rewards.item() == one.rejected_rewards.item()


@pytest.mark.parametrize("loss_type", SIGMOID_HINGE)
@laws
@given(quadruples, betas, st.floats(-50, 50))
def test_only_the_margin_counts(loss_type, values, beta, shift):
    shifted = (values[0] + shift, values[1] + shift, values[2], values[3])
    one, other = (dpo(v, beta=beta, loss_type=loss_type).losses for v in (values, shifted))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss_type", SIGMOID_HINGE)
@laws
@given(quadruples, betas)
def test_gradients_of_chosen_and_rejected_are_opposite_and_raise_the_chosen(loss_type, values, beta):
    chosen, rejected = (double(value).requires_grad_() for value in values[:2])
    reference = (double(value) for value in values[2:])
    dpo_loss(chosen, rejected, *reference, beta=beta, loss_type=loss_type).losses.sum().backward()
    assert chosen.grad.item() == -rejected.grad.item()
    assert -beta <= chosen.grad.item() <= 0


def test_rewards_carry_no_gradient():
    policy = double(-1.0, -2.0).requires_grad_()
    ours = dpo_loss(policy, policy, double(0, 0), double(0, 0), beta=0.1)
    assert not ours.chosen_rewards.requires_grad
    assert not ours.rejected_rewards.requires_grad
    ours = orpo_loss(policy, policy, beta=0.1)
    assert not ours.chosen_rewards.requires_grad
    assert not ours.rejected_rewards.requires_grad


@pytest.mark.parametrize("names", [[], ["chosen_lengths"], ["rejected_lengths"]])
def test_ipo_needs_the_lengths_of_both(names):
    given_lengths = {name: double(2) for name in names}
    with pytest.raises(ValueError, match="needs chosen_lengths and rejected_lengths"):
        dpo((-1, -2, -1, -2), beta=0.1, loss_type="ipo", **given_lengths)


@laws
@given(quadruples, betas, st.integers(1, 50), st.integers(1, 50))
def test_ipo_is_the_squared_distance_of_the_margin_per_token_from_one_over_two_beta(values, beta, n, m):
    lengths = {"chosen_lengths": torch.tensor([n]), "rejected_lengths": torch.tensor([m])}
    ours = dpo(values, beta=beta, loss_type="ipo", **lengths)
    margin = (values[0] - values[2]) / n - (values[1] - values[3]) / m
    assert ours.losses.item() == pytest.approx((margin - 1 / (2 * beta)) ** 2, rel=1e-9, abs=1e-9)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="must be sigmoid, hinge, ipo or nce"):
        dpo((-1, -2, -1, -2), beta=0.1, loss_type="kto")


@pytest.mark.parametrize("loss_type", SIGMOID_HINGE)
@laws
@given(quadruples, betas, st.floats(0.1, 50))
def test_dpop_penalises_a_fall_of_the_chosen_response_and_nothing_else(loss_type, values, beta, weight):
    plain = dpo(values, beta=beta, loss_type=loss_type)
    guarded = dpo(values, beta=beta, loss_type=loss_type, dpop_weight=weight)
    fall = max(0.0, values[2] - values[0])
    if fall == 0:
        assert guarded.losses.item() == plain.losses.item()
    # As if the rejected response had gained what the chosen one lost, `weight` times.
    shifted = (values[0], values[1] + weight * fall, values[2], values[3])
    expected = dpo(shifted, beta=beta, loss_type=loss_type).losses
    torch.testing.assert_close(guarded.losses, expected, rtol=1e-9, atol=1e-9)
    assert guarded.losses.item() >= plain.losses.item()
    assert guarded.chosen_rewards.item() == plain.chosen_rewards.item()


nonpositive = st.floats(max_value=0.0, min_value=-(2.0**100), width=32)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(nonpositive, nonpositive, betas)
def test_orpo_is_finite_with_a_finite_gradient_for_any_log_probability(chosen, rejected, beta):
    options = {"dtype": torch.float32, "requires_grad": True}
    chosen, rejected = torch.tensor([chosen], **options), torch.tensor([rejected], **options)
    loss = orpo_loss(chosen, rejected, beta=beta).losses.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert loss >= 0
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()


@pytest.mark.parametrize(
    "value", [0.0, -0.0, -1e-45, -1e-38, -1e-13, -1e-12, -1e-7, -6e-8, -1e-4, -17.0, -88.0, -104.0, -1e30]
)
def test_log_odds_and_its_slope_are_finite_at_both_ends_in_float32(value):
    x = torch.tensor([value], dtype=torch.float32, requires_grad=True)
    log_odds(x).sum().backward()
    assert torch.isfinite(log_odds(x)).all()
    assert torch.isfinite(x.grad).all()
    assert (x.grad >= 1).all()


@laws
@given(st.floats(-30, -1e-6))
def test_log_odds_is_the_logit_of_the_probability(x):
    p = math.exp(x)
    assert log_odds(double(x)).item() == pytest.approx(x - math.log(-math.expm1(x)), rel=1e-12)
    assert torch.sigmoid(log_odds(double(x))).item() == pytest.approx(p, rel=1e-9)


@laws
@given(st.floats(-30, -1e-6), betas)
def test_orpo_of_equal_responses_is_beta_log_two(x, beta):
    assert orpo_loss(double(x), double(x), beta=beta).losses.item() == pytest.approx(beta * math.log(2))


@laws
@given(st.lists(st.tuples(logps, st.integers(1, 100)), min_size=1, max_size=6))
def test_chosen_nll_is_per_token_and_pair_by_pair(rows):
    values, lengths = zip(*rows, strict=True)
    together = chosen_nll(double(*values), torch.tensor(lengths))
    assert together.tolist() == pytest.approx([-value / length for value, length in rows])
    assert (together >= 0).all()


def test_chosen_nll_of_an_unscored_response_is_zero():
    assert chosen_nll(double(0.0), torch.tensor([0])).item() == 0


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_token_logps_are_those_of_log_softmax_and_zero_where_ignored():
    logits, targets = random_logits(2, 5, 7), torch.tensor([[0, 6, IGNORE, 3, 2], [IGNORE, 1, 1, 4, IGNORE]])
    ours = token_logps(logits, targets)
    scored = targets != IGNORE
    expected = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(ours[scored], expected[scored])
    assert (ours[~scored] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_probabilities_of_half_precision_logits_are_in_float32(dtype):
    logits, targets = random_logits(2, 3, 50).to(dtype), torch.tensor([[1, 2, 3], [4, 5, 6]])
    ours = token_logps(logits, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, token_logps(logits.float(), targets))


def test_sequence_logps_ignore_the_first_position_and_what_ignored_positions_predict():
    logits = random_logits(1, 4, 5)
    labels = torch.tensor([[3, IGNORE, 2, IGNORE]])
    changed = logits.clone()
    changed[:, [0, 2, 3]] = 100 * random_logits(1, 3, 5, seed=1)
    assert sequence_logps(logits, labels).item() == sequence_logps(changed, labels).item()
    expected = logits.log_softmax(-1)[0, 1, 2].item()
    assert sequence_logps(logits, labels).item() == pytest.approx(expected)
    assert sequence_logps(logits, labels, average=True).item() == pytest.approx(expected)


def test_the_mean_over_an_unscored_sequence_is_zero():
    labels = torch.full((1, 4), IGNORE)
    assert sequence_logps(random_logits(1, 4, 5), labels, average=True).item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_token_logps_is_that_of_log_softmax(dtype):
    logits = random_logits(2, 5, 7).to(dtype)
    targets = torch.tensor([[1, 2, IGNORE, 6, 0], [IGNORE, IGNORE, 3, 3, 5]])
    weights = torch.linspace(-1, 2, 10).reshape(2, 5)

    def gradient(function):
        leaf = logits.clone().requires_grad_()
        (function(leaf) * weights).sum().backward()
        return leaf.grad

    def plain(leaf):
        scored = targets != IGNORE
        picked = leaf.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return picked * scored

    ours = gradient(lambda leaf: token_logps(leaf, targets))
    assert ours.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours, gradient(plain), rtol=tolerance, atol=tolerance)
    assert (ours[0, 2] == 0).all()


def nce(r_w, r_l, *, beta=1.0, shift=0.0, weight=1.0):
    zero = torch.zeros_like(r_w)
    return dpo_loss(
        r_w, r_l, zero, zero, beta=beta, loss_type="nce", nce_shift=shift, nce_negative_weight=weight
    ).losses


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0, 7.0])
def test_nce_is_space(mu):
    torch.manual_seed(0)
    r_w, r_l = torch.randn(2, 200, dtype=torch.float64) * 5

    def s(z, m):
        return 1 / (1 + m * torch.exp(-z))

    expected = -torch.log(s(r_w, mu)) - mu * torch.log(s(-r_l, 1 / mu))
    assert torch.allclose(nce(r_w, r_l, shift=-math.log(mu), weight=mu), expected, rtol=1e-13, atol=1e-14)


def test_nce_is_gsil_in_its_bernoulli_form():
    torch.manual_seed(0)
    r_w, r_l = torch.randn(2, 200, dtype=torch.float64) * 50
    expected = torch.log(1 + torch.exp(-(0.01 * r_w + 2))) + torch.log(1 + torch.exp(0.01 * r_l + 2))
    assert torch.allclose(nce(r_w, r_l, beta=0.01, shift=2.0), expected, rtol=1e-13, atol=1e-14)


def test_nce_with_unit_scale_is_nca_without_its_pair_term():
    torch.manual_seed(0)
    r_w, r_l = torch.randn(2, 200, dtype=torch.float64)
    expected = -torch.log(torch.sigmoid(r_w)) - torch.log(torch.sigmoid(-r_l))
    assert torch.allclose(nce(r_w, r_l), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("ratio", [-0.7, 0.0, 0.3])
def test_on_an_identical_pair_nce_pulls_the_ratio_back_to_zero_and_dpo_does_nothing(ratio):
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(nce(r, r).sum(), r)
    assert float(gradient) == pytest.approx(2 / (1 + math.exp(-ratio)) - 1)
    zero = torch.zeros_like(r)
    (gradient,) = torch.autograd.grad(dpo_loss(r, r, zero, zero, beta=1.0).losses.sum(), r)
    assert float(gradient) == 0


def test_label_smoothing_mixes_the_loss_of_the_swapped_pair():
    r_w, r_l, zero = torch.tensor([1.5]), torch.tensor([-0.5]), torch.zeros(1)
    found = dpo_loss(r_w, r_l, zero, zero, beta=0.3, label_smoothing=0.2).losses
    straight, swapped = (dpo_loss(*pair, zero, zero, beta=0.3).losses for pair in ((r_w, r_l), (r_l, r_w)))
    assert torch.allclose(found, 0.8 * straight + 0.2 * swapped)
