"""Laws of embedding gradients that are added in place: they are those of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sapo.preference.embedding_gradients import embedding_gradients_in_place

PAD = 3


def gradients(model: nn.Module, *, in_place: bool, passes: int = 2) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for number in range(passes):
        ids = torch.tensor([[5, 6, 5, PAD, 7 + number]])
        if in_place:
            with embedding_gradients_in_place(model):
                loss = model(input_ids=ids).logits.logsumexp(-1).sum()
        else:
            loss = model(input_ids=ids).logits.logsumexp(-1).sum()
        loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_autograd(tied):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, pad_token_id=PAD, tie_word_embeddings=tied, **shape)
    model = LlamaForCausalLM(config)
    expected, found = gradients(model, in_place=False), gradients(model, in_place=True)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    # The pad token is in the row, and its embedding is not trained.
    assert tied or not found["model.embed_tokens.weight"][PAD].any()


def test_a_gradient_that_hooks_wait_for_is_left_to_autograd():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=False, **shape))
    arrived = []
    model.model.embed_tokens.weight.register_post_accumulate_grad_hook(arrived.append)
    gradients(model, in_place=True)
    assert len(arrived) == 2
