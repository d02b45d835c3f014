"""What we take from accelerate and peft that they do not promise."""

import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, get_peft_model
from torch import nn

from sapo.generation.forward import unwrapped
from sapo.weights.adapter_switch import AdapterSwitch
from tests.tiny import tiny_llama


def test_gradient_synchronization_can_be_put_off_by_hand():
    assert list(inspect.signature(GradientState._set_sync_gradients).parameters) == ["self", "sync_gradients"]
    state = Accelerator(cpu=True).gradient_state
    before = state.sync_gradients
    try:
        for due in (False, True):
            state._set_sync_gradients(due)
            assert state.sync_gradients is due
            assert GradientState().sync_gradients is due
    finally:
        state._set_sync_gradients(before)


@pytest.mark.filterwarnings("default:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_wrapped_model_is_found_and_a_bare_one_is_itself():
    model = tiny_llama()
    for wrapped in (model, nn.DataParallel(model), torch.compile(model)):
        assert unwrapped(wrapped) is extract_model_from_parallel(wrapped, keep_torch_compile=False) is model


# peft 0.19 takes every output head for a tied one.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize("extra", [{}, {"trainable_token_indices": [3, 4]}, {"modules_to_save": ["lm_head"]}])
def test_the_switch_computes_as_after_set_adapter_and_disable_adapter(extra):
    ids = torch.tensor([[1, 2, 3, 4]])
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **extra)
    model = get_peft_model(tiny_llama(), config).eval()
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "other" in name:
                weight.add_(0.01)
    switch = AdapterSwitch(model)

    def logits():
        return model(ids).logits.detach()

    def trained():
        return [weight.requires_grad for weight in model.parameters()]

    own, before = logits(), trained()
    for adapter in ("other", None):
        with switch.to(adapter):
            switched = logits()
        assert torch.equal(logits(), own)
        assert trained() == before
        assert not torch.equal(switched, own)
        if adapter is None:
            with model.disable_adapter():
                assert torch.equal(switched, logits())
        else:
            model.set_adapter(adapter)
            assert torch.equal(switched, logits())
            model.set_adapter("default")


def test_switching_adapters_moves_requires_grad():
    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("other", config)

    def trained():
        return {name.split(".")[-2] for name, weight in model.named_parameters() if weight.requires_grad}

    assert (model.active_adapter, trained()) == ("default", {"default"})
    model.set_adapter("other")
    # So a shadow adapter, when it is added, must put `requires_grad` back, and does (sapo.weights.opponent).
    assert (model.active_adapter, trained()) == ("other", {"other"})


def test_an_adapter_that_is_off_leaves_the_base_model():
    base = tiny_llama().eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = base(ids).logits
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
        assert not torch.equal(model(ids).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
