"""How processor time and peak memory grow: of a step with batch, response, buffer and processes, of a start with rows.

    python benchmarks/growth.py [--svg docs/growth.svg]

Each point is a run of the real trainer in a fork of its own (for several processes, one fork each, joined by gloo): the
median processor time of five steps after a first one, one thread, and the peak of the resident set above what it was
before the model was built. Hidden 128, 3 layers, vocabulary 8192; where nothing else is said prompt 64, response 128,
segment 32, batch 4 a process, 1,000 pairs in the buffer. A start reads rows of 40 + 120 words from JSON lines and
renders and tokenizes them, in one process and without its cache. The exponent is that of the last two points.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measuring import forget_peak, in_forks, peak_resident, resident
from step import SIZES, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from sapo import Pair, SAPOConfig, SAPOTrainer, Segment
from sapo.data.chat_template import FOLDER
from sapo.data.examples import DataOptions
from sapo.data.loading import load_rows
from sapo.data.prepare import prepare_dataset
from sapo.preference.pairs import shared_ids

PROMPT, SEGMENT, STEPS, WORDS = 64, 32, 6, 4096
USUAL = {"batch": 4, "response": 128, "buffer": 1000, "processes": 1}
GROWTH = {
    "batch": [2, 4, 8, 16],
    "response": [64, 128, 256, 512, 2048, 8192],
    "buffer": [100, 1000, 10_000, 100_000, 1_000_000],
    "processes": [1, 2, 4],
    "rows": [10, 100, 1000, 10_000, 100_000],
}
LABELS = {
    "batch": "pairs a process", "response": "response, tokens", "buffer": "pairs held", "processes": "processes",
    "rows": "rows at the start",
}  # fmt: skip


class Clock(TrainerCallback):
    """Processor seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


class _Vocabulary:
    """As much of a `step.Setting` as its tokenizer reads."""

    size = "8k"


def run(point: dict[str, int], number: int, port: int) -> tuple[float, float]:
    """Processor seconds of a step, and megabytes at the peak, of one process."""
    if point["processes"] > 1:
        os.environ |= {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(point["processes"]),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    rng = random.Random(number)

    def words(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, WORDS) for _ in range(count))

    def text(count: int) -> str:
        return " ".join(f"w{word}" for word in words(count))

    rows = [
        {"prompt": text(PROMPT), "completion": " " + text(point["response"] - 1)}
        for _ in range(point["batch"] * STEPS * point["processes"])
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = SAPOConfig(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=point["batch"], segment_length=SEGMENT,
            max_length=max(1024, 2 * point["response"]), replay_buffer_size=point["buffer"], chosen_probe_size=0,
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, report_to="none",
            save_strategy="no", logging_strategy="no", ddp_backend="gloo" if point["processes"] > 1 else None,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        before = resident()
        forget_peak()
        config = LlamaConfig(
            vocab_size=int(SIZES["8k"]["vocab_size"]), hidden_size=128, intermediate_size=344, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=32768, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = SAPOTrainer(
            LlamaForCausalLM(config), args, data, processing_class=tokenizer(_Vocabulary()), callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        fill(trainer.source.buffer, point["buffer"], point["response"])
        trainer.train()
    return statistics.median(clock.seconds[1:]), (peak_resident() - before) / 1e6


def fill(buffer: Any, count: int, response: int) -> None:
    """Store pairs of random tokens, no two alike, as the trainer does."""
    rng = np.random.default_rng(0)
    for start in range(0, count, 1000):
        size = min(1000, count - start)
        for prompt, chosen, new in zip(
            rng.integers(3, WORDS, (size, PROMPT)).tolist(),
            rng.integers(3, WORDS, (size, response)).tolist(),
            rng.integers(3, WORDS, (size, SEGMENT)).tolist(),
            strict=True,
        ):
            ids = [shared_ids(one) for one in (prompt, chosen, new + chosen[SEGMENT:])]
            buffer.add(Pair(0, 0, *ids, Segment(0, SEGMENT), Segment(0, SEGMENT)), 0)


def start(rows: int) -> tuple[float, float]:
    """Processor seconds and megabytes until the rows of a file are prepared."""
    rng = random.Random(0)
    made = tokenizer(_Vocabulary())
    made.chat_template = (FOLDER / "zephyr.jinja").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        with file.open("w", encoding="utf-8") as lines:
            for _ in range(rows):
                said = [" ".join(f"w{rng.randrange(3, WORDS)}" for _ in range(count)) for count in (40, 120)]
                talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
                lines.write(json.dumps({"messages": talk}) + "\n")
        before = resident()
        forget_peak()
        began = time.process_time()
        prepare_dataset(load_rows(file), made, DataOptions(1024, 512), eos_ids=[made.eos_token_id])
        return time.process_time() - began, (peak_resident() - before) / 1e6


def exponent(points: list[tuple[int, float, float]], column: int) -> float:
    """Of the power law through the last two points."""
    (x, *first), (y, *last) = points[-2:]
    return math.log(last[column - 1] / first[column - 1]) / math.log(y / x)


def measure(point: dict[str, int]) -> tuple[float, float]:
    """The worst process of a point."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = in_forks(lambda number: run(point, number, port), point["processes"])
    return max(seconds for seconds, _ in found), max(memory for _, memory in found)


def plot(found: dict[str, list[tuple[int, float, float]]]) -> str:
    """One column a growth, processor seconds above and megabytes below, from 0 on."""
    width, height, left, top = 190, 130, 46, 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(found) * (width + 50) + 24}" '
        f'height="{2 * (height + 56)}" font-family="sans-serif" font-size="11">',
        "<style>text{fill:#333}.a{stroke:#999;fill:none}.s{stroke:#0b62a4;fill:none;stroke-width:2}.d{fill:#0b62a4}"
        "@media(prefers-color-scheme:dark){text{fill:#ccc}}</style>",
    ]
    for column, (name, points) in enumerate(found.items()):
        for row, unit in enumerate(("CPU s", "MB")):
            x0, y0 = column * (width + 50) + left, row * (height + 56) + top
            values = [point[row + 1] for point in points]
            largest = max(values) * 1.1
            spots = [
                (x0 + width * place, y0 + height * (1 - value / largest))
                for place, value in zip(_places([point[0] for point in points]), values, strict=True)
            ]
            parts.append(f'<path class="a" d="M{x0} {y0}V{y0 + height}H{x0 + width}"/>')
            power = f"{unit}, exponent {exponent(points, row + 1):.2f}" if len(points) > 1 else unit
            parts.append(f'<text x="{x0}" y="{y0 - 8}">{power}</text>')
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(f'<polyline class="s" points="{line}"/>')
            for (x, y), point, value in zip(spots, points, values, strict=True):
                parts.append(f'<circle class="d" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
                parts.append(f'<text x="{x:.1f}" y="{y - 6:.1f}" text-anchor="middle">{_figure(value)}</text>')
                parts.append(f'<text x="{x:.1f}" y="{y0 + height + 13}" text-anchor="middle">{point[0]:,}</text>')
            label = LABELS[name]
            parts.append(f'<text x="{x0 + width / 2}" y="{y0 + height + 27}" text-anchor="middle">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _places(sizes: list[int]) -> list[float]:
    """From 0 to 1; by the logarithm where sizes span more than a factor of 100."""
    scaled = [math.log(size) if sizes[-1] > 100 * sizes[0] else float(size) for size in sizes]
    return [(size - scaled[0]) / max(1e-9, scaled[-1] - scaled[0]) for size in scaled]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROWTH, default=list(GROWTH))
    parser.add_argument("--svg", type=Path, default=None, help="file for the plot")
    parser.add_argument("--results", type=Path, default=None, help="JSON file to add the figures to; all are plotted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    found: dict[str, list[tuple[int, float, float]]] = {}
    if options.results is not None and options.results.is_file():
        found = json.loads(options.results.read_text(encoding="utf-8"))
    for name in options.only:
        found[name] = []
        for value in GROWTH[name]:
            if name == "rows":
                ((seconds, memory),) = in_forks(lambda number, rows=value: start(rows))
            else:
                seconds, memory = measure({**USUAL, name: value})
            found[name].append((value, seconds, memory))
            print(f"{LABELS[name]:20}{value:10,}{seconds:10.3f} CPU s{memory:10.0f} MB", flush=True)
        both = [exponent(found[name], column) for column in (1, 2)]
        print(f"{LABELS[name]:20}exponents: time {both[0]:.2f}, memory {both[1]:.2f}", flush=True)
        if options.results is not None:
            options.results.write_text(json.dumps(found), encoding="utf-8")
    if options.svg is not None:
        found = {name: found[name] for name in GROWTH if name in found}
        options.svg.write_text(plot(found), encoding="utf-8")


if __name__ == "__main__":
    main()
