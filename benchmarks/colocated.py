"""Tokens a second of vLLM in this process against `TransformersGenerator`, on a CPU, one thread, float32.

Runs alternate, each figure is a median, there is no end token. Both write what the published sampling draws. Needs an
environment that holds vLLM and sapo:

    VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 python benchmarks/colocated.py
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
import time

import torch
from generation import build_model
from transformers import AutoModelForCausalLM

from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.generation.vllm.colocated import ColocatedVLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder; unset: the 8.9M-parameter Llama of the other benchmarks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new", type=int, nargs="+", default=[32, 128], help="new tokens of each row")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in each context")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval() if arguments.model else build_model()
    plain = TransformersGenerator(lambda: contextlib.nullcontext(model), Sampling(), eos_ids=(), pad_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = ColocatedVLLM(
            folder,
            Sampling(),
            eos_ids=(),
            max_model_len=arguments.prompt + max(arguments.new),
            dtype=torch.float32,
            gpu_memory_utilization=0.2,
        )
    loads = []
    for version in range(arguments.repeats + 1):
        start = time.process_time()
        engine.load_tensors(model.named_parameters(), str(version))
        loads.append(time.process_time() - start)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, context {arguments.prompt}, median of {arguments.repeats}")
    print(f"load_tensors: {statistics.median(loads[1:]) * 1e3:.1f} ms of CPU time")
    print(f"{'batch':>5} {'new':>4} | {'tokens a CPU second':<27} | tokens a second")
    print(" " * 10 + f" | {'transformers':>12} {'vLLM':>7} {'ratio':>6}" * 2)
    for batch in arguments.batches:
        for new in arguments.new:
            rng = random.Random(batch)
            contexts = [
                [rng.randrange(3, model.config.vocab_size) for _ in range(arguments.prompt)] for _ in range(batch)
            ]
            request = contexts, [new] * batch, list(range(batch))
            spent: dict[str, list[tuple[float, float]]] = {"transformers": [], "vllm": []}
            for _ in range(arguments.repeats + 1):
                for name, generator in (("transformers", plain), ("vllm", engine)):
                    start = time.process_time(), time.perf_counter()
                    generator.generate(*request)
                    spent[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
            rates = [
                [batch * new / statistics.median(run[clock] for run in spent[name][1:]) for name in spent]
                for clock in (0, 1)
            ]
            cells = [f"{ours:12.0f} {engines:7.0f} {engines / ours:6.2f}" for ours, engines in rates]
            print(f"{batch:5} {new:4} | {cells[0]} | {cells[1]}", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
