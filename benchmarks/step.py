"""Time and peak memory of a training step, side by side.

`self-play`: our trainer against a step written the published way: `generate` for each batch, float32 logits of all
positions of all 2B sequences for policy and reference, a moving average parameter by parameter, three models.
`paired`: our trainer on preference pairs against trl's DPOTrainer on the same pairs; `paired-lora` with an adapter.
`sft`: our trainer with `objective: sft` against trl's SFTTrainer on the same rows.
`lora`: our trainer with a LoRA adapter for policy, opponent and reference against trl's SFTTrainer with one adapter.

Variants run in turn in one process (A B C A B C ...). On a processor: one thread; a figure is the median of
`time.process_time` over rounds of a few optimizer steps; memory is the peak of the resident set above what it was with
all models loaded, each variant in a process of its own. On a GPU: all weights are loaded in bfloat16 and all variants
compute in it; a figure is the median of wall seconds, after a first round that does not count; memory is PyTorch's peak
above what was allocated before the first step, and with it. Run with

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python benchmarks/step.py self-play
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from sapo import SAPOConfig, SAPOTrainer

ON_GPU = torch.cuda.is_available()
PAD, END = 0, 1
BETA, DECAY, RATE = 0.1, 0.5, 1e-5

SIZES: dict[str, dict[str, Any]] = {
    "8k": {"vocab_size": 8192, "num_hidden_layers": 6},
    "32k": {"vocab_size": 32768, "num_hidden_layers": 4},
    "135m": {
        "vocab_size": 49152,
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128256,
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""Shapes of a Llama; "135m" is that of SmolLM2-135M, "1b" of Llama 3.2 1B, "8b" of Llama 3 8B."""


@dataclass(frozen=True)
class Setting:
    size: str
    batch: int
    prompt: int
    response: int
    jitter: int
    segment: int
    steps: int
    shared: int


def build_model(setting: Setting, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        **(shape | SIZES[setting.size]),
    )
    if not ON_GPU:
        return LlamaForCausalLM(config).to(dtype)
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def tokenizer(setting: Setting) -> PreTrainedTokenizerFast:
    size = int(SIZES[setting.size]["vocab_size"])
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(3, size))]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(setting: Setting, *, paired: bool) -> list[dict[str, str]]:
    """Rows of random words; `paired` ones have two responses with a common beginning of `shared` words."""
    rng = random.Random(0)
    size = int(SIZES[setting.size]["vocab_size"])

    def words(count: int) -> list[str]:
        return [f"w{rng.randrange(3, size)}" for _ in range(count - rng.randint(0, setting.jitter))]

    rows = []
    for _ in range(setting.batch * setting.steps):
        prompt, chosen = words(setting.prompt), words(setting.response - 1)
        row = {"prompt": " ".join(prompt), "chosen": " " + " ".join(chosen)}
        if paired:
            row["rejected"] = " " + " ".join(chosen[: setting.shared] + words(setting.response - 1 - setting.shared))
        rows.append(row)
    return rows


def seconds() -> float:
    """Of this process's processor time; on a GPU wall time, when it has done all that it was given."""
    if not ON_GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def loaded_bytes() -> int:
    """In memory now; on a GPU the peak begins anew."""
    if not ON_GPU:
        return psutil.Process().memory_info().rss
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


class Clock(TrainerCallback):
    """Seconds from the first step's begin to the last one's end."""

    started = 0.0
    seconds = 0.0
    loaded = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.loaded = loaded_bytes()
            self.started = seconds()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = seconds() - self.started


def adapter() -> LoraConfig:
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def ours(
    setting: Setting,
    *,
    paired: bool = False,
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[float, int]:
    """Seconds a step of the real trainer, and bytes with its models loaded."""
    clock = Clock()
    settings: dict[str, Any] = {
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.batch,
        "segment_length": setting.segment,
        "max_length": 4096,
        "steps_per_generation": setting.steps,
        "pairs_per_forward": 1,
        "pair_source": "paired" if paired else "self_play",
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = SAPOTrainer(
            build_model(setting, dtype),
            SAPOConfig(**common(folder), beta=BETA, ema_decay=DECAY, chosen_probe_size=0, **(settings | options)),
            datasets.Dataset.from_list(texts(setting, paired=paired)),
            processing_class=tokenizer(setting),
            peft_config=adapter() if lora else None,
            callbacks=[clock],
        )
        # In a few steps from an empty buffer more pairs are drawn twice than in a long run: no gain from that here.
        trainer.remove_callback(PrinterCallback)
        trainer.source.reference_logps = lambda pairs, score: score(list(pairs))  # type: ignore[method-assign]
        trainer.train()
    return clock.seconds / setting.steps, clock.loaded


def common(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "learning_rate": RATE,
        "gradient_checkpointing": False,
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
    }


def theirs(setting: Setting, *, lora: bool = False) -> tuple[float, int]:
    """The same of trl's DPOTrainer."""
    import trl

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            build_model(setting),
            ref_model=None if lora else build_model(setting),
            peft_config=adapter() if lora else None,
            args=trl.DPOConfig(
                **common(folder),
                beta=BETA,
                max_steps=setting.steps,
                per_device_train_batch_size=setting.batch,
                max_length=4096,
            ),
            train_dataset=datasets.Dataset.from_list(texts(setting, paired=True)),
            processing_class=tokenizer(setting),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds / setting.steps, clock.loaded


def supervised(setting: Setting, *, lora: bool = True) -> tuple[float, int]:
    """The same of trl's SFTTrainer, with a LoRA adapter or all weights."""
    import trl

    clock = Clock()
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in texts(setting, paired=False)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            build_model(setting),
            args=trl.SFTConfig(
                **common(folder),
                max_steps=setting.steps,
                per_device_train_batch_size=setting.batch,
                max_length=4096,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(setting),
            peft_config=adapter() if lora else None,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds / setting.steps, clock.loaded


def published(setting: Setting) -> tuple[float, int]:
    """A step written the published way, plainly."""
    policy = build_model(setting)
    reference, opponent = (build_model(setting).eval().requires_grad_(False) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE)
    encode = tokenizer(setting)
    rows = [
        (encode(row["prompt"])["input_ids"], [*encode(row["chosen"])["input_ids"], END])
        for row in texts(setting, paired=False)
    ]
    rng = random.Random(0)
    loaded, started = loaded_bytes(), seconds()
    for step in range(setting.steps):
        batch = rows[step * setting.batch : (step + 1) * setting.batch]
        with torch.no_grad():
            for average, weight in zip(opponent.parameters(), policy.parameters(), strict=True):
                average.data = DECAY * average.data + (1 - DECAY) * weight.data
        starts = [rng.randint(0, max(0, len(response) - 3 - setting.segment)) for _, response in batch]
        contexts = [[*p, *r[:start]] for (p, r), start in zip(batch, starts, strict=True)]
        width = max(map(len, contexts))
        ids = on_device([[PAD] * (width - len(context)) + context for context in contexts])
        mask = on_device([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
        output = opponent.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=setting.segment,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            top_p=0.95,
            pad_token_id=PAD,
        )
        rejected = []
        for (_, response), start, written in zip(batch, starts, output[:, width:].tolist(), strict=True):
            new = written[: written.index(END) + 1] if END in written else written
            rejected.append(response[:start] + new + ([] if END in written else response[start + setting.segment :]))
        sequences = [(p, r) for p, r in batch] + [(p, r) for (p, _), r in zip(batch, rejected, strict=True)]
        width = max(len(p) + len(r) for p, r in sequences)
        ids = on_device([[*p, *r] + [PAD] * (width - len(p) - len(r)) for p, r in sequences])
        mask = on_device([[1] * len(p + r) + [0] * (width - len(p + r)) for p, r in sequences])
        labels = on_device([[-100] * len(p) + r + [-100] * (width - len(p + r)) for p, r in sequences])

        def logps(model: Any, ids: Any = ids, mask: Any = mask, labels: Any = labels) -> Any:
            logits = model(ids, attention_mask=mask).logits.to(torch.float32)[:, :-1]
            targets, scored = labels[:, 1:].clone(), labels[:, 1:] != -100
            targets[~scored] = 0
            return (logits.log_softmax(-1).gather(2, targets[..., None])[..., 0] * scored).sum(-1)

        with torch.no_grad():
            kept = logps(reference)
        ratio = logps(policy) - kept
        loss = -torch.nn.functional.logsigmoid(BETA * (ratio[: setting.batch] - ratio[setting.batch :])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return (seconds() - started) / setting.steps, loaded


def on_device(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, device="cuda" if ON_GPU else "cpu")


SELF_PLAY: dict[str, Callable[[Setting], tuple[float, int]]] = {
    "published way": published,
    "ours": ours,
    "ours, pairs in one pass": lambda s: ours(s, pairs_per_forward=None),
    "ours, plain layout": lambda s: ours(s, layout="plain"),
    "ours, no pooling": lambda s: ours(s, steps_per_generation=1),
    "ours, fused head": lambda s: ours(s, fused_lm_head=True),
    "ours, live reference": lambda s: ours(s, reference="opponent"),
    "ours, bfloat16 weights": lambda s: ours(s, dtype=torch.bfloat16),
}
PAIRED: dict[str, Callable[[Setting], tuple[float, int]]] = {
    "trl DPOTrainer": theirs,
    "ours": lambda s: ours(s, paired=True),
    "ours, pairs in one pass": lambda s: ours(s, paired=True, pairs_per_forward=None),
    "ours, plain layout": lambda s: ours(s, paired=True, layout="plain"),
}
LORA: dict[str, Callable[[Setting], tuple[float, int]]] = {
    "trl SFTTrainer": supervised,
    "ours": lambda s: ours(s, lora=True),
    "ours, pairs in one pass": lambda s: ours(s, lora=True, pairs_per_forward=None),
}
PAIRED_LORA: dict[str, Callable[[Setting], tuple[float, int]]] = {
    "trl DPOTrainer": lambda s: theirs(s, lora=True),
    "ours": lambda s: ours(s, paired=True, lora=True),
    "ours, pairs in one pass": lambda s: ours(s, paired=True, lora=True, pairs_per_forward=None),
}
SFT: dict[str, Callable[[Setting], tuple[float, int]]] = {
    "trl SFTTrainer": lambda s: supervised(s, lora=False),
    "ours": lambda s: ours(s, objective="sft"),
    "ours, rows in one pass": lambda s: ours(s, objective="sft", pairs_per_forward=None),
}
WHAT = {"self-play": SELF_PLAY, "paired": PAIRED, "lora": LORA, "paired-lora": PAIRED_LORA, "sft": SFT}


def peak_resident() -> int:
    """Bytes. Not `ru_maxrss`: a child starts with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def peak_above_models(arguments: list[str], variant: str) -> float:
    """Peak memory in MB above the loaded models, measured in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--measure_memory_of", variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=sorted(WHAT))
    parser.add_argument("--size", choices=sorted(SIZES), default="8k")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=None, help="tokens; 128, or 768 for paired")
    parser.add_argument("--response", type=int, default=256, help="tokens")
    parser.add_argument("--jitter", type=int, default=0, help="prompts and responses are shorter by up to this many")
    parser.add_argument("--segment", type=int, default=64, help="tokens")
    parser.add_argument("--shared", type=int, default=0, help="paired: words that both responses begin with")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a round, and a pool of generation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=None)
    parser.add_argument("--measure_memory_of", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    variants = WHAT[options.what]
    setting = Setting(
        options.size,
        options.batch,
        options.prompt or (768 if options.what.startswith("paired") else 128),
        options.response,
        options.jitter,
        options.segment,
        options.steps,
        options.shared,
    )
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    if options.measure_memory_of:
        spent, loaded = variants[options.measure_memory_of](setting)
        print(f"{spent:.2f} s a step, MB at the peak above the models:", (peak_resident() - loaded) / 1e6)
        return
    chosen = {name: variants[name] for name in options.variants or variants}
    found: dict[str, list[float]] = {name: [] for name in chosen}
    memory, everything = {}, {}
    for number in range(options.rounds + ON_GPU):
        for name, variant in chosen.items():
            spent, loaded = variant(setting)
            if ON_GPU:
                memory[name] = (torch.cuda.max_memory_allocated() - loaded) / 1e6
                everything[name] = f", {torch.cuda.max_memory_allocated() / 1e6:.0f} MB in all"
                gc.collect()
                torch.cuda.empty_cache()
            if number or not ON_GPU:
                found[name].append(spent)
    baseline = next(iter(chosen))
    medians = {name: statistics.median(values) for name, values in found.items()}
    if not ON_GPU:
        memory = {name: peak_above_models(sys.argv[1:], name) for name in chosen}
    print(setting, f"on {torch.cuda.get_device_name()}" if ON_GPU else "")
    print(f"{'':26}{'s a step':>14}{'spread':>16}{'speed':>8}{'peak MB':>10}{'share':>8}")
    for name, values in found.items():
        print(
            f"{name:26}{medians[name]:14.3f}{f'{min(values):.3f} to {max(values):.3f}':>16}"
            f"{medians[baseline] / medians[name]:8.2f}{memory[name]:10.0f}{memory[name] / memory[baseline]:8.2f}"
            f"{everything.get(name, '')}"
        )


if __name__ == "__main__":
    main()
