"""What a device gives: the share of its matrix rate that training reaches, decoding against its bandwidth, Flex against
sdpa, trl's fused head against gathered logits.

    python benchmarks/gpu.py                 a Llama of 1.2 billion weights on a GPU, a tiny one on a CPU
    python benchmarks/gpu.py --size tiny     the tiny one anywhere

Matrix rate and bandwidth are measured first (`sapo.estimate.devices.measure`), operations of a pass are counted by
`sapo.estimate.passes`, seconds are wall time on a GPU and processor time on a CPU, the median of `--rounds`
after a first one. What cannot be measured where it runs is said, not left out.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import ModelConfig

from sapo import Pair, SAPOConfig, Segment
from sapo.config import HAS_ACTIVATION_CHECKPOINTING, HAS_FUSED_LM_HEAD
from sapo.estimate.devices import Device, measure
from sapo.estimate.passes import Lengths, trace_passes
from sapo.estimate.tracing import Trace
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.preference.batches import collate_pairs
from sapo.preference.scoring import prepare_shared_layout, summed_logps
from sapo.weights.footprint import Strategy, build_run_models

SIZES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
}  # fmt: skip
LENGTHS = {"1B": Lengths(1024, 256, 256, 512), "tiny": Lengths(96, 32, 32, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="1B" if on_gpu else "tiny")
    parser.add_argument("--pairs", type=int, default=8 if on_gpu else 2, help="pairs in a pass")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64] if on_gpu else [1, 4], help="rows decoded")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = measure()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rate = device.half_rate if on_gpu else device.float_rate
    print(
        f"{device.name}: {rate / 1e12:.3g} TFLOP/s in {str(dtype)[6:]}, {device.bandwidth / 1e9:.3g} GB/s, "
        f"{device.launch * 1e6:.3g} us to start an operation; all measured."
    )
    config = LlamaConfig(**SIZES[options.size], max_position_embeddings=4096, pad_token_id=0, eos_token_id=1)
    training(config, options, device, rate, dtype)
    decoding(config, options, device, dtype)


def training(config: Any, options: Any, device: Device, rate: float, dtype: torch.dtype) -> None:
    """Forward and backward passes by attention, head and checkpointing."""
    flops = counted(config, options, dtype).flops
    print(f"\ntraining, {options.pairs} pairs of {LENGTHS[options.size]}, {flops / 1e12:.3g} TFLOP not recomputed")
    variants: dict[str, dict[str, Any]] = {
        "sdpa, gathered logits": {},
        "sdpa, plain layout": {"layout": "plain"},
        "sdpa, fused head": {"fused": True},
        "FlexAttention, gathered logits": {"attention": "flex_attention"},
        "sdpa, checkpointing": {"checkpointing": True},
    }
    base = None
    for name, variant in variants.items():
        if not torch.cuda.is_available() and (variant.get("fused") or variant.get("attention")):
            print(f"  {name:34} not measured: needs a CUDA device")
            continue
        if variant.get("fused") and not HAS_FUSED_LM_HEAD:
            print(f"  {name:34} not measured: needs trl 1.16")
            continue
        seconds, memory = one_pass(config, options, dtype, **variant)
        base = base or seconds
        # Recomputation and doubled prompts are not useful work: all are measured against the same operations.
        print(
            f"  {name:34} {seconds:8.4f} s, {base / seconds:5.2f} times the first, {flops / seconds / rate:6.1%} of "
            f"the matrix rate, {memory}"
        )


def counted(config: Any, options: Any, dtype: torch.dtype) -> Trace:
    args = SAPOConfig(
        output_dir="unused", use_cpu=True, report_to="none", gradient_checkpointing=False,
        per_device_train_batch_size=options.pairs,
    )  # fmt: skip
    roles = build_run_models(config, ModelConfig(dtype=str(dtype)[6:]), args, Strategy())
    given = {"pairs": options.pairs, "rows": 0, "fused_lm_head": False, "on_gpu": True}
    return trace_passes(roles, LENGTHS[options.size], **given).training


def one_pass(
    config: Any,
    options: Any,
    dtype: torch.dtype,
    *,
    layout: Any = "shared",
    attention: str = "sdpa",
    fused: bool = False,
    checkpointing: bool = False,
) -> tuple[float, str]:
    """Seconds of a forward and backward pass, and its peak of memory above the model."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    # In no device context afterwards: Inductor finds no kernel of FlexAttention within one.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention).train()
    place = next(model.parameters()).device
    if layout == "shared":
        reason = prepare_shared_layout(model)
        if reason is not None:
            return float("nan"), reason
    if fused:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
    if checkpointing:
        if HAS_ACTIVATION_CHECKPOINTING:
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    rng, lengths = random.Random(0), LENGTHS[options.size]

    def pair() -> Pair:
        def words(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(2, config.vocab_size) for _ in range(count))

        chosen = words(lengths.response)
        stop = lengths.before + lengths.segment
        rejected = chosen[: lengths.before] + words(lengths.segment) + chosen[stop:]
        segment = Segment(lengths.before, stop)
        return Pair(0, 0, words(lengths.prompt), chosen, rejected, segment, segment)

    batch = collate_pairs([pair() for _ in range(options.pairs)], pad_token_id=0, layout=layout, score_shared=False)
    batch = batch.to(place)

    def run() -> None:
        sums, _ = summed_logps(model, batch, fused_lm_head=fused)
        sums.sum().backward()
        model.zero_grad()

    run()
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
    seconds = median_seconds(run, options.rounds)
    if place.type != "cuda":
        return seconds, "memory not measured: see benchmarks/estimate.py"
    return seconds, f"{(torch.cuda.max_memory_allocated() - loaded) / 1e9:.2f} GB above the model"


def decoding(config: Any, options: Any, device: Device, dtype: torch.dtype) -> None:
    """Tokens a second of the decode loop against what reading weights, keys and values once a token allows, and of
    transformers' `generate`."""
    lengths = LENGTHS[options.size]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    weights = sum(weight.numel() for weight in model.parameters()) - config.vocab_size * config.hidden_size
    head = config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize
    generator = TransformersGenerator(lambda: contextlib.nullcontext(model), Sampling(), eos_ids=(), pad_token_id=0)
    print(f"\ndecoding {lengths.segment} tokens after {lengths.context}")
    for rows in options.rows:
        contexts = [[2 + place % 1000 for place in range(lengths.context)]] * rows

        def write(new: int, contexts: Any = contexts) -> Callable[[], None]:
            return lambda: generator.generate(contexts, [new] * len(contexts), list(range(len(contexts))))

        whole, first = (median_seconds(write(new), options.rounds) for new in (lengths.segment, 1))
        tokens = rows * (lengths.segment - 1) / (whole - first)
        read = weights * dtype.itemsize + rows * each * (lengths.context + lengths.segment // 2)
        limit = rows * device.bandwidth / read
        theirs = rows * (lengths.segment - 1) / generate_seconds(model, contexts, lengths.segment, options.rounds)
        print(
            f"  {rows:4} rows {tokens:12.0f} tokens/s, {tokens / limit:6.1%} of the {limit:.0f} of the bandwidth; "
            f"`generate` {theirs:.0f} tokens/s"
        )


def generate_seconds(model: Any, contexts: list[list[int]], new: int, rounds: int) -> float:
    """Seconds of all tokens but the first by transformers' `generate`, sampled as by the decode loop."""
    ids = torch.tensor(contexts, device=model.device)
    given = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95, "pad_token_id": 0, "eos_token_id": None}

    def write(count: int) -> Callable[[], object]:
        return lambda: model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, **given
        )

    return median_seconds(write(new), rounds) - median_seconds(write(1), rounds)


def median_seconds(what: Callable[[], object], rounds: int) -> float:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds = []
    for _ in range(rounds + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = clock()
        what()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
