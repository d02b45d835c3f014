"""Models that vLLM serves on a CPU in this process, and what transformers writes with them."""

import importlib.util
import random
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.generation.vllm.colocated import ColocatedVLLM
from tests.tiny import tiny_llama

NEEDS_VLLM = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not in this environment"),
    pytest.mark.filterwarnings("default"),
]
LENGTH = 320
END = 1
GREEDY = Sampling(temperature=0)


def model(seed, **overrides):
    # vLLM's attention on a CPU has no heads smaller than 32. Larger weights make some tokens much likelier than others.
    sizes = {"hidden_size": 64, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": LENGTH}
    made = tiny_llama(seed, **(sizes | overrides)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return made


def adapted(base, seed, r=4):
    made = get_peft_model(base, LoraConfig(r=r, lora_alpha=16, target_modules="all-linear"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return made.eval()


def contexts_of(count, length, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 63) for _ in range(length)] for _ in range(count)]


def by_transformers(policy, contexts, budgets, eos_ids=(END,)):
    generator = TransformersGenerator(lambda: nullcontext(policy), GREEDY, eos_ids=eos_ids, pad_token_id=0)
    return generator.generate(contexts, budgets, [0] * len(contexts))


def start(folder, sampling=GREEDY, **options):
    settings = {"max_model_len": LENGTH, "dtype": torch.float32, "gpu_memory_utilization": 0.2} | options
    return ColocatedVLLM(str(folder), sampling, eos_ids=settings.pop("eos_ids", (END,)), **settings)
