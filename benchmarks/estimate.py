"""The estimate of memory and seconds against real training, on this machine.

    python benchmarks/estimate.py

Each setting trains for a few steps in two forks of its own. In the first memory is measured: the peak of the resident
set above what it was before the model was built, after a first small run has loaded everything else; large blocks are
given back to the system as soon as they are freed, so that the peak is of what is in use. In the second seconds are,
with the allocator as it is by default: the median of a step's processor time, one thread; the estimate's come from a
profile of the same machine.

On a GPU: settings of its own, wall seconds, PyTorch's peak, one process.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import tempfile
from typing import Any

import datasets
import torch
import transformers
from measuring import forget_peak, in_forks, peak_resident, resident
from peft import LoraConfig
from step import ON_GPU, loaded_bytes
from step import seconds as now
from step import tokenizer as word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
from trl import ModelConfig

from sapo import SAPOConfig, SAPOTrainer
from sapo.estimate.devices import measure
from sapo.estimate.estimate import estimate
from sapo.estimate.passes import Lengths
from sapo.weights.footprint import Strategy, build_run_models

PROMPT, RESPONSE, SEGMENT, BATCH, STEPS = (512, 768, 256, 8, 3) if ON_GPU else (128, 256, 64, 4, 3)

ON_CPU: dict[str, dict[str, Any]] = {
    "DPO, three models": {},
    "DPO, reference opponent": {"reference": "opponent"},
    "DPO, one pair a pass": {"pairs_per_forward": 1},
    "DPO, checkpointing": {"gradient_checkpointing": True},
    "DPO, checkpointing, one pair a pass": {"gradient_checkpointing": True, "pairs_per_forward": 1},
    "DPO, plain layout": {"layout": "plain"},
    "DPO, RMSprop": {"optim": "rmsprop"},
    "ORPO": {"objective": "orpo"},
    "ORPO, vocabulary 32768": {"objective": "orpo", "size": "32k"},
    "DPO, 40 million weights": {"size": "40M", "pairs_per_forward": 2},
    "LoRA": {"lora": True},
    "LoRA, checkpointing": {"lora": True, "gradient_checkpointing": True},
    "LoRA, reference initial, one pair a pass": {"lora": True, "reference": "initial", "pairs_per_forward": 1},
    "135 million weights": {"size": "135M", "pairs_per_forward": 1},
    "135 million weights, LoRA": {"size": "135M", "lora": True, "reference": "initial", "pairs_per_forward": 1},
    "bfloat16 weights": {"dtype": "bfloat16", "ema_decay": 0.9},
}
SETTINGS = {
    "135 million weights": {"size": "135M"},
    "135 million weights, LoRA": {"size": "135M", "lora": True, "reference": "initial"},
    "1.2 billion weights, DPO": {"size": "1B"},
    "1.2 billion weights, ORPO": {"size": "1B", "objective": "orpo"},
    "1.2 billion weights, checkpointing": {"size": "1B", "gradient_checkpointing": True},
    "1.2 billion weights, plain layout": {"size": "1B", "layout": "plain"},
    "1.2 billion weights, LoRA": {"size": "1B", "lora": True, "reference": "initial"},
    "8 billion weights, LoRA": {"size": "8B", "lora": True, "reference": "initial", "pairs_per_forward": 2},
    "8 billion weights, LoRA, checkpointing": {
        "size": "8B", "lora": True, "reference": "initial", "gradient_checkpointing": True,
    },
} if ON_GPU else ON_CPU  # fmt: skip
SIZES = {
    "8k": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6},
    "32k": {"vocab_size": 32768, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4},
    "40M": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 10},
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "warm": {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
}  # fmt: skip


PARTS = ("generation", "reference", "policy")


class Watch(TrainerCallback):
    """Seconds of each step: all of it, and by part; the policy's part is what is left, the optimizer's among it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.within = False

    def timed(self, part: str, inner: Any) -> Any:
        """`inner`, whose seconds count as `part`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                return inner(*args, **kwargs)
            finally:
                # The report generates and scores too, between steps.
                if self.within:
                    self.steps[-1][part] += now() - began

        return run

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(dict.fromkeys(PARTS, 0.0) | {"all": now()})
        self.within = True

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        step, self.within = self.steps[-1], False
        step["all"] = now() - step["all"]
        step["policy"] = step["all"] - step["generation"] - step["reference"]

    def median(self) -> dict[str, float]:
        """Of all steps but the first."""
        return {part: statistics.median(step[part] for step in self.steps[1:]) for part in ("all", *PARTS)}


def model_config(size: str) -> LlamaConfig:
    common = {"max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaConfig(**({"num_attention_heads": 4} | common | SIZES[size]))


def config(folder: str, options: dict[str, Any]) -> SAPOConfig:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "segment_length": SEGMENT,
        "max_length": PROMPT + RESPONSE,
        "max_prompt_length": PROMPT,
        # The segment at the response's start, as the estimate of memory has it.
        "tail_margin": RESPONSE - SEGMENT,
        "chosen_probe_size": 0,
        "gradient_checkpointing": False,
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    own = {key: value for key, value in options.items() if key not in ("lora", "size", "dtype")}
    return SAPOConfig(**(settings | own))


def train(options: dict[str, Any]) -> tuple[dict[str, float], int]:
    """Median seconds of a step by part, and bytes at the peak above what was resident before the model."""
    size, watch = options.get("size", "8k"), Watch()
    vocabulary = int(SIZES[size]["vocab_size"])
    encode = word_tokenizer(_Vocabulary("32k" if vocabulary == 32768 else "8k"))
    words = [f"w{3 + place % 4000}" for place in range(PROMPT)]
    answer = [f"w{4000 + place}" for place in range(RESPONSE - 1)]
    rows = [{"prompt": " ".join(words), "completion": " " + " ".join(answer)}] * (BATCH * STEPS)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        args = config(folder, options)
        data = datasets.Dataset.from_list(rows)
        before = loaded_bytes() if ON_GPU else resident()
        if not ON_GPU:
            forget_peak()
        torch.manual_seed(0)
        with torch.device("cuda" if ON_GPU else "cpu"):
            model = LlamaForCausalLM._from_config(model_config(size), dtype=getattr(torch, dtype_of(options)))
        trainer = SAPOTrainer(
            model, args, data, processing_class=encode, peft_config=adapter if options.get("lora") else None,
            callbacks=[watch],
        )  # fmt: skip
        del model
        trainer.remove_callback(PrinterCallback)
        generator, scorer = trainer.source._generator, trainer._scorer
        generator.generate = watch.timed("generation", generator.generate)
        scorer.reference_logps = watch.timed("reference", scorer.reference_logps)
        trainer.train()
    return watch.median(), (torch.cuda.max_memory_allocated() if ON_GPU else peak_resident()) - before


def dtype_of(options: dict[str, Any]) -> str:
    """Of the weights as loaded."""
    return str(options.get("dtype", "bfloat16" if ON_GPU else "float32"))


class _Vocabulary:
    """As much of a `step.Setting` as its tokenizer reads."""

    def __init__(self, size: str) -> None:
        self.size = size


def estimated(options: dict[str, Any]) -> tuple[dict[str, float], int]:
    """As `train`."""
    lora = {"use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear"} if options.get("lora") else {}
    model_args = ModelConfig(dtype=dtype_of(options), **lora)
    with tempfile.TemporaryDirectory() as folder:
        args = config(folder, options)
        roles = build_run_models(model_config(options.get("size", "8k")), model_args, args, Strategy())
        found = estimate(roles, measure(), Lengths(PROMPT, 0, SEGMENT, RESPONSE - SEGMENT))
    seconds = {part: found.seconds.get(part, 0.0) for part in PARTS[:2]} | {"all": sum(found.seconds.values())}
    seconds["policy"] = seconds["all"] - seconds["generation"] - seconds["reference"]
    return seconds, found.memory.most


def measured(options: dict[str, Any]) -> tuple[dict[str, float], int]:
    """Of two forks: seconds of one, bytes of the other; on a GPU both of this process."""

    def both(number: int) -> tuple[dict[str, float], int]:
        warm = {key: value for key, value in options.items() if key in ("objective", "lora", "reference")}
        train({**warm, "size": "warm"})
        return train(options)

    if ON_GPU:
        found = both(0)
        gc.collect()
        torch.cuda.empty_cache()
        return found
    return in_forks(both, give_back=False)[0][0], in_forks(both)[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    print("estimate / measured = ratio")
    for name in options.settings:
        (seconds, size), (real_seconds, real_size) = estimated(SETTINGS[name]), measured(SETTINGS[name])
        line = f"{name:42} {size / 1e6:7.0f} / {real_size / 1e6:7.0f} MB = {size / real_size:.2f}"
        for part, real in real_seconds.items():
            ratio = f" = {seconds[part] / real:.2f}" if real else ""
            line += f" | {part} {seconds[part]:.3f} / {real:.3f} s{ratio}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
