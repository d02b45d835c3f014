"""A vLLM server on a CPU against the transformers backend: tokens a second, and where the time of a training step goes.

First text alone: both backends write the same requests with the published sampling and no end token, in turn, each
figure a median. Then real runs of `SAPOTrainer`, dense and LoRA, whose text comes from this process or from the server,
which writes pending batches or not. The variants take turns for a few rounds, the first steps of each run are left out.

The server is started here, by an interpreter that has vLLM, the way `sapo serve` does. Trainer and server have one core
each if the machine has two that nobody else uses; otherwise they take time from each other:

    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=1 python benchmarks/engine.py --vllm_python .venv-vllm/bin/python
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import httpx2
import psutil
import torch
import transformers
from step import Setting, adapter, build_model, common, texts, tokenizer

from sapo import SAPOConfig, SAPOTrainer
from sapo.commands.arguments import parse
from sapo.commands.serve import servers_for
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.generation.vllm.servers import VLLMServers
from sapo.training.engine_queue import EngineQueue

SETTING = Setting(size="8k", batch=4, prompt=64, response=64, jitter=0, segment=32, steps=64, shared=0)
LENGTH = 256

VARIANTS: dict[str, dict[str, Any]] = {
    "transformers": {"generation_backend": "transformers"},
    "server": {},
    "server, max_staleness 1": {"max_staleness": 1},
    "server, max_staleness 2": {"max_staleness": 2},
    "server, sync_opponent_steps 4, max_staleness 4": {"sync_opponent_steps": 4, "max_staleness": 4},
}


@contextmanager
def served(folder: Path, python: str, url: str, *, lora: bool) -> Iterator[psutil.Process]:
    """A server of the model in `folder`, as `sapo serve` would start it; it writes its log there."""
    flags = [
        "--model_name_or_path", str(folder), "--dataset_name", "none", "--output_dir", str(folder / "run"),
        "--generation_backend", "vllm_server", "--vllm_server_url", url, "--max_length", str(LENGTH), "--use_cpu",
        "--dtype", "float32",
    ]  # fmt: skip
    if lora:
        flags += ["--use_peft", "--lora_r", "8"]
    (server,) = servers_for(parse(flags, "benchmark"), python, extra=["--enforce-eager"])
    with server.log.open("ab") as log:
        process = subprocess.Popen(
            server.command, env={**os.environ, **server.environment}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"vLLM ended: {server.log.read_text()[-2000:]}")
            try:
                if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(0.5)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def cpu_seconds(server: psutil.Process) -> float:
    """CPU seconds that this process, the server and its children have taken so far."""
    times = [each.cpu_times() for each in (server, *server.children(recursive=True))]
    return time.process_time() + sum(taken.user + taken.system for taken in times)


# ---- Text alone ----


def compare_text(
    server: psutil.Process, url: str, folder: Path, batches: Sequence[int], news: Sequence[int], repeats: int
) -> None:
    model = build_model(SETTING).eval()
    plain = TransformersGenerator(lambda: nullcontext(model), Sampling(), eos_ids=(), pad_token_id=0)
    engine = VLLMServers([url], Sampling(), eos_ids=(), vocabulary_size=model.config.vocab_size)
    model.save_pretrained(folder / "text")
    engine.load(folder / "text", "text")
    print(f"{model.num_parameters():,} parameters, context {SETTING.prompt}, tokens a second, median of {repeats}")
    print(f"{'batch':>5} {'new':>4} | {'by the clock':<29} | of CPU time, both processes")
    print(" " * 10 + f" | {'transformers':>12} {'server':>8} {'ratio':>7}" * 2)
    for batch in batches:
        for new in news:
            rng = random.Random(batch)
            contexts = [
                [rng.randrange(3, model.config.vocab_size) for _ in range(SETTING.prompt)] for _ in range(batch)
            ]
            request = contexts, [new] * batch, list(range(batch))
            spent: dict[str, list[tuple[float, float]]] = {"transformers": [], "server": []}
            for _ in range(repeats + 1):
                for name, generator in (("transformers", plain), ("server", engine)):
                    start = time.perf_counter(), cpu_seconds(server)
                    generator.generate(*request)
                    spent[name].append((time.perf_counter() - start[0], cpu_seconds(server) - start[1]))
            rates = [
                [batch * new / statistics.median(run[clock] for run in spent[name][1:]) for name in spent]
                for clock in (0, 1)
            ]
            cells = [f"{ours:12.0f} {engines:8.0f} {engines / ours:7.2f}" for ours, engines in rates]
            print(f"{batch:5} {new:4} | {cells[0]} | {cells[1]}", flush=True)
    engine.close()


# ---- Training ----


class Clock(transformers.TrainerCallback):
    """CPU seconds of trainer and server after each step."""

    def __init__(self, server: psutil.Process) -> None:
        self.server = server
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(cpu_seconds(self.server))


def train(
    server: psutil.Process, url: str, steps: int, skip: int, *, lora: bool, **options: Any
) -> dict[str, list[float]]:
    """Time of each step after the first `skip`, and of each hand-over of weights, in seconds."""
    found: dict[str, list[float]] = {"step": [], "cpu": [], "wait": [], "busy": [], "write": [], "load": []}
    clock = Clock(server)
    settings: dict[str, Any] = {"generation_backend": "vllm_server"} | options
    if settings["generation_backend"] == "vllm_server":
        settings["vllm_server_url"] = [url]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        given = common(folder) | {"logging_strategy": "steps", "logging_steps": 1} | settings
        trainer = SAPOTrainer(
            build_model(SETTING),
            SAPOConfig(
                **given,
                max_steps=steps,
                per_device_train_batch_size=SETTING.batch,
                segment_length=SETTING.segment,
                max_length=LENGTH,
                chosen_probe_size=0,
                report_pairs=0,
                log_pairs_steps=0,
            ),
            datasets.Dataset.from_list(texts(SETTING, paired=False)),
            processing_class=tokenizer(SETTING),
            peft_config=adapter() if lora else None,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if isinstance(trainer.source, EngineQueue):
            note_loads(trainer.source._tasks.engine, found["load"])
        trainer.train()
    found["cpu"] = [after - before for before, after in itertools.pairwise(clock.seconds[skip - 1 :])]
    for row in trainer.state.log_history:
        if row["step"] <= skip or "time/step" not in row:
            continue
        found["step"].append(row["time/step"])
        found["wait"].append(row.get("time/engine_wait", row["time/generate"]))
        found["busy"].append(row.get("time/engine_busy", 0.0))
        found["write"] += [row["time/engine_weights"]] if "time/engine_weights" in row else []
    return found


def note_loads(engine: Any, seconds: list[float]) -> None:
    load = engine.load

    def timed(*given: Any) -> None:
        started = time.perf_counter()
        load(*given)
        seconds.append(time.perf_counter() - started)

    engine.load = timed


def compare_training(server: psutil.Process, url: str, rounds: int, steps: int, *, lora: bool) -> None:
    skip = steps // 4
    found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, options in VARIANTS.items():
            found[name].append(train(server, url, steps, skip, lora=lora, **options))
    print(f"{'LoRA' if lora else 'dense'}: batch {SETTING.batch}, {rounds} rounds of {steps - skip} steps, seconds")
    print(f"{'':48} {'a step':>7} {'CPU time':>8} {'waiting':>8} {'engine busy':>12} {'writing':>8} {'loading':>8}")
    for name, runs in found.items():
        together = {key: [value for run in runs for value in run[key]] for key in runs[0]}
        seconds = sum(together["step"])
        weights = [
            f"{statistics.median(together[key]):8.3f}" if together[key] else " " * 8 for key in ("write", "load")
        ]
        print(
            f"{name:48} {statistics.median(together['step']):7.3f} "
            f"{statistics.fmean(together['cpu']):8.3f} {sum(together['wait']) / seconds:8.0%} "
            f"{sum(together['busy']) / seconds:12.0%} {' '.join(weights)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm_python", required=True, help="an interpreter that has vLLM")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new", type=int, nargs="+", default=[32, 128], help="new tokens of each row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16, help="of each training run; a quarter is left out")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    url = f"http://127.0.0.1:{arguments.port}"
    for lora in (False, True):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            build_model(SETTING).save_pretrained(folder)
            tokenizer(SETTING).save_pretrained(folder)
            server = stack.enter_context(served(folder, arguments.vllm_python, url, lora=lora))
            if not lora:
                compare_text(server, url, folder, arguments.batches, arguments.new, arguments.repeats)
            compare_training(server, url, arguments.rounds, arguments.steps, lora=lora)


if __name__ == "__main__":
    main()
