"""CPU time of the decode loop against `model.generate`, same sampling, one thread.

Runs alternate (A B A B ...) and each figure is a median of `time.process_time`, so that other work on the
machine disturbs both alike. There is no end token: every row takes its full length, so the gain from dropping
finished rows is not part of it. Run with

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python benchmarks/generation.py
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling

PAD = 0


def build_model() -> LlamaForCausalLM:
    """The 8.9M-parameter Llama that the project's performance figures refer to."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each row")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model = build_model()
    sampling = Sampling()
    generator = TransformersGenerator(lambda: contextlib.nullcontext(model), sampling, eos_ids=(), pad_token_id=PAD)

    def ours(prompts: torch.Tensor) -> None:
        rows = len(prompts)
        generator.generate(prompts.tolist(), [arguments.new] * rows, list(range(rows)))

    def theirs(prompts: torch.Tensor) -> None:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            max_new_tokens=arguments.new,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )

    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, prompt {arguments.prompt}, "
        f"{arguments.new} new tokens, CPU seconds, median of {arguments.repeats}"
    )
    print(f"{'batch':>6} {'generate':>9} {'ours':>9} {'ratio':>6}")
    for batch in arguments.batches:
        prompts = torch.randint(1, 8192, (batch, arguments.prompt), generator=torch.Generator().manual_seed(batch))
        seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
        for repeat in range(arguments.repeats + 1):
            for name, run in (("theirs", theirs), ("ours", ours)):
                start = time.process_time()
                run(prompts)
                if repeat:  # the first round warms up
                    seconds[name].append(time.process_time() - start)
        a, b = (statistics.median(seconds[name]) for name in ("theirs", "ours"))
        print(f"{batch:>6} {a:>9.3f} {b:>9.3f} {a / b:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
