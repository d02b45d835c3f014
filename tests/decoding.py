"""Tiny models of many architectures, generators for them, and requests."""

from __future__ import annotations

import contextlib
import functools
import random

import pytest
import torch
import transformers
from transformers import GenerationConfig

from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling

PAD, END, OTHER_END, VOCABULARY = 0, 1, 2, 64
GREEDY = Sampling(temperature=0)


common = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # wide enough that tiny models do not repeat one token
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "attention_dropout": 0.1,  # active in training mode only
}
sliding_then_full = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 6}),
    "mistral_window_as_long_as_the_text": (transformers.MistralConfig, {"sliding_window": 40}),
    "gemma3": (transformers.Gemma3TextConfig, sliding_then_full),
    "gpt2": (transformers.GPT2Config, {"activation_function": "gelu", "attn_pdrop": 0.1, "embd_pdrop": 0.1}),
    "eager": (transformers.LlamaConfig, {"attn_implementation": "eager"}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "output_router_logits": True}),
    "lfm2_recurrent": (transformers.Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
}
EVERY_ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.cache
def built(name):
    config_class, options = ARCHITECTURES[name]
    options = dict(options)
    implementation = options.pop("attn_implementation", "sdpa")
    torch.manual_seed(3)
    config = config_class(**(common | options))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def generator_for(model, sampling=None, *, eos_ids=(), batch_size=None):
    return TransformersGenerator(
        lambda: contextlib.nullcontext(model),
        sampling or Sampling(),
        eos_ids=eos_ids,
        pad_token_id=PAD,
        batch_size=batch_size,
    )


def request(rows=9, seed=0, longest=14):
    """Ragged contexts of any tokens (pad and end tokens among them), budgets 0 to 18, seeds."""
    rng = random.Random(seed)
    contexts = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))] for _ in range(rows)]
    budgets = [0, 1, *(rng.randint(2, 18) for _ in range(rows - 2))]
    return contexts, budgets, [rng.getrandbits(63) for _ in range(rows)]


def greedy_text(model, context, budget, eos_ids=()):
    """What `generate` writes after one context, without any padding."""
    if budget == 0:
        return []
    ids = torch.tensor([list(context)])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=budget, eos_token_id=list(eos_ids) or None, pad_token_id=PAD
    )
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(context) :].tolist()


class Spy:
    """Notes the shape of what goes into a model."""

    def __init__(self, model):
        self.shapes = []
        self.caches = []
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        self.caches.append(kwargs["past_key_values"])
