"""CPU time of the decode loop against `model.generate` and against the linear products alone, one thread.

Three questions, on a Llama of 135M parameters with random weights (vocabulary 49,152, 30 layers, 9 heads on 3):

- what a token step costs beside the linear products that it consists of, one after another and nothing else;
- tokens a second of a pool of rows against `generate` at batch 8, same sampling;
- whether the text is that of `generate` (greedy, float32).

Runs alternate (A B A B ...) and each figure is a median of `time.process_time`, so that other work on the machine
disturbs both alike. There is no EOS token: every row takes its full length, so the gain from dropping finished rows
is not part of it. Run with

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python benchmarks/generation.py
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling

PAD = 0
SHAPES = {
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "9M": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}


def build_model(shape: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of random weights, which never ends a text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=PAD
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval().to(dtype)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def ours(model: nn.Module, contexts: list[list[int]], new: int, sampling: Sampling) -> list[list[int]]:
    generator = TransformersGenerator(lambda: contextlib.nullcontext(model), sampling, eos_ids=(), pad_token_id=PAD)
    return generator.generate(contexts, [new] * len(contexts), list(range(len(contexts))))


def theirs(model: LlamaForCausalLM, contexts: list[list[int]], new: int, sampling: Sampling) -> list[list[int]]:
    width = max(map(len, contexts))
    ids = torch.tensor([[PAD] * (width - len(context)) + context for context in contexts])
    attended = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    drawing = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    options = {"do_sample": False} if sampling.greedy else {"do_sample": True, **drawing}
    return model.generate(ids, attention_mask=attended, max_new_tokens=new, **options)[:, width:].tolist()


@torch.no_grad()
def linear_products(model: nn.Module, rows: int) -> None:
    """What a token step multiplies, as it lies in memory by default."""
    inputs: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if module.in_features not in inputs:
                inputs[module.in_features] = torch.randn(rows, 1, module.in_features, dtype=module.weight.dtype)
            module(inputs[module.in_features])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--prompt", type=int, default=128, help="most tokens of a prompt; the shortest has 40 less")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model, sampling, new = build_model(arguments.shape, getattr(torch, arguments.dtype)), Sampling(), arguments.new
    vocabulary, rng = model.config.vocab_size, random.Random(0)

    def contexts(rows: int) -> list[list[int]]:
        lengths = [arguments.prompt - 7 * row % 40 for row in range(rows)]
        return [[rng.randrange(1, vocabulary) for _ in range(length)] for length in lengths]

    greedy = Sampling(temperature=0)
    some = contexts(8)
    same = sum(a == b for a, b in zip(ours(model, some, 64, greedy), theirs(model, some, 64, greedy), strict=True))
    print(
        f"{model.num_parameters():,} parameters, prompt {arguments.prompt}, {new} new tokens, {arguments.dtype}, 1 core"
    )
    print(f"greedy texts of 64 tokens equal to those of generate: {same} of 8")
    print("CPU seconds; a step is (all new tokens less the first) / (new - 1), linear: its linear products alone")
    print(
        f"{'batch':>6} {'step':>7} {'linear':>7} {'ratio':>6} {'generate':>9} {'ours':>7} {'ratio':>6} {'tokens/s':>9}"
    )
    base = 0.0
    for batch in arguments.batches:
        measured = measure(model, contexts(batch), new, sampling, arguments.repeats)
        step, linear, other, whole = (statistics.median(column) for column in zip(*measured, strict=True))
        ratio = statistics.median(a / b for a, b, _, _ in measured)
        base = base or batch * new / other
        print(
            f"{batch:>6} {step:>7.4f} {linear:>7.4f} {ratio:>6.2f} {other:>9.2f} {whole:>7.2f} {other / whole:>6.2f} "
            f"{batch * new / whole:>9.1f} ({batch * new / whole / base:.1f} times generate at batch "
            f"{arguments.batches[0]})",
            flush=True,
        )


def measure(
    model: LlamaForCausalLM, contexts: list[list[int]], new: int, sampling: Sampling, repeats: int
) -> list[tuple[float, float, float, float]]:
    """Seconds of a step, of its linear products, of `generate` and of the decode loop, in each round but the first."""
    rounds = []
    for _ in range(repeats + 1):
        first = seconds(lambda: ours(model, contexts, 1, sampling))
        whole = seconds(lambda: ours(model, contexts, new, sampling))
        linear = statistics.median(seconds(lambda: linear_products(model, len(contexts))) for _ in range(5))
        other = seconds(lambda: theirs(model, contexts, new, sampling)) if len(contexts) <= 16 else float("nan")
        rounds.append(((whole - first) / (new - 1), linear, other, whole))
    return rounds[1:]


if __name__ == "__main__":
    main()
