"""Laws of `sapo.weights.opponent`: what follows the policy, how fast, and that the policy is left as it was."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sapo.errors import ConfigurationError
from sapo.weights.opponent import (
    AdapterCopy,
    BaseModel,
    ModelCopy,
    make_opponent,
    make_reference,
    needs_float32_master,
    policy_tensors,
    squared_distance,
)
from sapo.weights.rounding import rounded
from tests.tiny import tiny_llama

IDS = torch.tensor([[3, 9, 4, 7, 20]])


class OneWeight(torch.nn.Module):
    def __init__(self, values, dtype=torch.float64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def weights(module):
    return dict(module.named_parameters())


def lora(model=None, **options):
    model = model or tiny_llama()
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(model, config).eval()


@torch.no_grad()
def stir(model, seed=1):
    """Move the policy's trainable weights, as a step of the optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    for weight in policy_tensors(model).values():
        weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.clone()


def different(one, other):
    return (one - other).abs().max().item() > 1e-3


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.992])
def test_the_distance_to_a_policy_at_rest_shrinks_by_the_decay_each_step(decay):
    policy = OneWeight([1.0, -2.0, 0.5])
    opponent = ModelCopy(policy, decay=decay)
    policy.weight.data.add_(torch.tensor([4.0, -1.0, 0.25], dtype=torch.float64))
    start = (opponent.model.weight - policy.weight).detach().clone()
    for n in range(1, 30):
        opponent.follow(weights(policy), decay)
        distance = (opponent.model.weight - policy.weight).detach()
        torch.testing.assert_close(distance, start * decay**n, rtol=1e-9, atol=1e-12)


def test_decay_1_stays_and_decay_0_copies():
    policy = OneWeight([1.0, -2.0])
    opponent = ModelCopy(policy)
    policy.weight.data.fill_(7.0)
    opponent.follow(weights(policy), 1.0)
    assert opponent.model.weight.tolist() == [1.0, -2.0]
    opponent.follow(weights(policy), 0.0)
    assert opponent.model.weight.tolist() == [7.0, 7.0]


def test_a_float32_master_follows_where_bfloat16_alone_stalls():
    decay, steps = 0.999, 5000
    policy = OneWeight([1.0] * 8, torch.bfloat16)
    with_master, without = ModelCopy(policy, decay=decay), ModelCopy(policy, decay=1.0)
    policy.weight.data.fill_(1.0625)
    for _ in range(steps):
        with_master.follow(weights(policy), decay)
        without.follow(weights(policy), decay)
    assert (without.model.weight == 1.0).all()
    expected = 1.0625 - 0.0625 * decay**steps
    assert with_master.tensors()["weight"].dtype == torch.float32
    torch.testing.assert_close(with_master.tensors()["weight"], torch.full((8,), expected), rtol=0, atol=1e-4)
    assert with_master.model.weight.dtype == torch.bfloat16
    assert torch.equal(with_master.model.weight, rounded(with_master.tensors()["weight"], torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_master_is_needed_in_half_precision_by_an_average_that_is_no_copy(dtype):
    assert needs_float32_master(dtype, 0.992)
    assert needs_float32_master(dtype, 0.5)
    assert not needs_float32_master(dtype, 0.0)
    assert not needs_float32_master(dtype, 1.0)
    assert not needs_float32_master(torch.float32, 0.992)


def test_a_model_copy_is_frozen_in_evaluation_mode_and_apart_from_the_policy():
    policy = tiny_llama()
    copy = make_opponent(policy, decay=0.9)
    assert isinstance(copy, ModelCopy)
    assert policy.training
    assert all(weight.requires_grad for weight in policy.parameters())
    with copy.using() as model:
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())
        before = logits(model)
        stir(policy)
        assert torch.equal(logits(model), before)


def test_tied_weights_are_followed_once():
    policy = tiny_llama(tie_word_embeddings=True)
    copy = ModelCopy(policy, decay=0.5)
    start = copy.model.lm_head.weight.detach().clone()
    stir(policy)
    copy.follow(policy_tensors(policy), 0.5)
    assert copy.model.lm_head.weight is copy.model.model.embed_tokens.weight
    torch.testing.assert_close(copy.model.lm_head.weight, (start + policy.lm_head.weight.detach()) / 2)


def test_taking_over_weights_brings_the_master_back_too():
    policy = OneWeight([1.0, 2.0], torch.bfloat16)
    one, other = ModelCopy(policy, decay=0.99), ModelCopy(policy, decay=0.99)
    policy.weight.data.fill_(5.0)
    one.follow(weights(policy), 0.99)
    other.copy_from({name: weight.clone() for name, weight in one.tensors().items()})
    assert torch.equal(other.tensors()["weight"], one.tensors()["weight"])
    assert torch.equal(other.model.weight, one.model.weight)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(2)}, "2 names differ"),
        ({"weight": torch.zeros(3)}, "weight is .3., expected .2."),
    ],
)
def test_weights_of_another_model_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        ModelCopy(OneWeight([1.0, 2.0])).copy_from(tensors)


def test_squared_distance_is_that_of_the_difference_and_of_the_policy():
    policy = OneWeight([3.0, 4.0])
    assert squared_distance({"weight": torch.tensor([3.0, 4.0])}, weights(policy)).tolist() == [0, 25]
    assert squared_distance({"weight": torch.tensor([0.0, 0.0])}, weights(policy)).tolist() == [25, 25]
    assert squared_distance({"weight": torch.tensor([3.0, 3.0])}, weights(policy)).tolist() == [1, 25]


# LoRA: one base model, one adapter a role.


def adapter_state(policy):
    return policy.active_adapter, {name: weight.requires_grad for name, weight in policy.named_parameters()}


def test_only_the_policy_adapter_is_trainable_beside_its_copies():
    policy = lora()
    opponent, reference = make_opponent(policy, decay=0.9), AdapterCopy(policy, "reference")
    assert isinstance(opponent, AdapterCopy)
    trainable = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trainable
    assert all("lora_" in name and ".default." in name for name in trainable)
    names = policy_tensors(policy).keys()
    assert names == trainable == opponent.tensors().keys() == reference.tensors().keys()
    assert policy.active_adapter == "default"


def test_a_new_adapter_equals_the_policy_now_and_not_later():
    policy = lora()
    stir(policy)
    opponent = make_opponent(policy, decay=0.9)
    before = logits(policy)
    stir(policy, seed=2)
    with opponent.using() as model:
        torch.testing.assert_close(logits(model), before)
    assert different(logits(policy), before)


@pytest.mark.parametrize("role", ["opponent", "base"])
def test_using_other_weights_restores_adapter_and_gradients_even_after_an_error(role):
    policy = lora()
    copies = {"opponent": make_opponent(policy, decay=0.9), "base": BaseModel(policy)}
    stir(policy)
    own, state = logits(policy), adapter_state(policy)
    with copies[role].using() as model:
        assert different(logits(model), own)
    assert adapter_state(policy) == state
    assert torch.equal(logits(policy), own)
    with pytest.raises(KeyError), copies[role].using():
        raise KeyError
    assert adapter_state(policy) == state
    assert torch.equal(logits(policy), own)


@pytest.mark.parametrize("role", ["opponent", "base"])
def test_a_policy_weight_that_the_user_froze_stays_frozen(role):
    policy = lora()
    next(iter(policy_tensors(policy).values())).requires_grad_(False)
    copy = make_opponent(policy, decay=0.9) if role == "opponent" else BaseModel(policy)
    state = adapter_state(policy)
    assert set(state[1].values()) == {True, False}
    with copy.using() as model:
        logits(model)
    assert adapter_state(policy) == state
    assert not next(iter(policy_tensors(policy).values())).requires_grad


def test_roles_may_be_nested():
    policy = lora()
    opponent, base = make_opponent(policy, decay=0.9), BaseModel(policy)
    stir(policy)
    opponent.follow(policy_tensors(policy), 0.5)
    own, state = logits(policy), adapter_state(policy)
    with opponent.using() as model:
        middle = logits(model)
        with base.using() as inner:
            assert different(logits(inner), middle)
        assert torch.equal(logits(model), middle)
    assert adapter_state(policy) == state
    assert torch.equal(logits(policy), own)


def test_gradients_flow_to_the_policy_adapter_alone_after_the_opponent_was_used():
    policy = lora()
    opponent = make_opponent(policy, decay=0.9)
    stir(policy)
    with opponent.using() as model:
        logits(model)
    policy(input_ids=IDS).logits.sum().backward()
    touched = {name for name, weight in policy.named_parameters() if weight.grad is not None}
    assert touched == {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert all(".default." in name for name in touched)


def test_an_adapter_follows_factor_by_factor():
    policy = lora()
    opponent = make_opponent(policy, decay=0.75)
    start = {name: weight.detach().clone() for name, weight in opponent.tensors().items()}
    stir(policy)
    opponent.follow(policy_tensors(policy), 0.75)
    for name, weight in policy_tensors(policy).items():
        expected = 0.75 * start[name] + 0.25 * weight.detach()
        torch.testing.assert_close(opponent.tensors()[name].detach(), expected)


def test_following_an_adapter_leaves_the_base_and_the_policy_alone():
    policy = lora()
    opponent, base = make_opponent(policy, decay=0.5), BaseModel(policy)
    stir(policy)
    own = logits(policy)
    with base.using() as model:
        before = logits(model)
    opponent.follow(policy_tensors(policy), 0.5)
    with base.using() as model:
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(policy), own)


def test_the_reference_of_a_fresh_adapter_is_the_base_model_itself():
    plain = logits(tiny_llama())
    policy = lora(tiny_llama())
    reference = make_reference(policy, may_be_base=True)
    assert isinstance(reference, BaseModel)
    assert reference.tensors() == {}
    stir(policy)
    with reference.using() as model:
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    reference.copy_from({})


def test_the_reference_of_a_trained_or_moving_one_is_an_adapter():
    assert isinstance(make_reference(lora(), may_be_base=False), AdapterCopy)
    trained = lora()
    stir(trained)
    reference = make_reference(trained, may_be_base=True)
    assert isinstance(reference, AdapterCopy)
    with reference.using() as model:
        torch.testing.assert_close(logits(model), logits(trained))
    assert isinstance(make_reference(tiny_llama(), may_be_base=True), ModelCopy)


def test_the_base_model_neither_follows_nor_is_saved():
    base = BaseModel(lora())
    assert not base.tensors()
    assert not hasattr(base, "follow")
    assert not hasattr(base, "save_pretrained")


def test_peft_methods_other_than_lora_are_refused():
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ConfigurationError, match=r"type IA3, .* needs LORA .*--adapter merge"):
        make_opponent(get_peft_model(tiny_llama(), config), decay=0.9)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_saved_adapter_is_an_ordinary_adapter_folder(tmp_path, decay):
    policy = lora()
    opponent = make_opponent(policy, decay=decay)
    make_reference(policy, may_be_base=False)
    stir(policy)
    opponent.follow(policy_tensors(policy), decay)
    opponent.save_pretrained(tmp_path / "opponent")
    files = {file.name for file in (tmp_path / "opponent").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any(file.is_dir() for file in (tmp_path / "opponent").iterdir())
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "opponent").eval()
    with opponent.using() as model:
        torch.testing.assert_close(logits(loaded), logits(model))
    assert list(loaded.peft_config) == ["default"]


def test_a_saved_model_copy_is_an_ordinary_model_folder(tmp_path):
    policy = tiny_llama()
    opponent = ModelCopy(policy, decay=0.5)
    stir(policy)
    opponent.follow(policy_tensors(policy), 0.5)
    opponent.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with opponent.using() as model:
        torch.testing.assert_close(logits(loaded), logits(model))
