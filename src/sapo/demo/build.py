"""Train the demo's checkpoint from scratch: `python -m sapo.demo.build`.

Pretraining on correct answers, then on answers of mixed quality, then a brief SFT on the clean training rows: a model
that can do the tasks but has bad habits, like a real SFT checkpoint. Fixed seeds; about a minute on one core.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sapo.demo.score import score
from sapo.demo.tasks import TRAIN_ROWS, Row, build_tokenizer, corrupt, heldout_rows, make_rows, prompt_of
from sapo.preference.batches import collate_responses
from sapo.preference.scoring import summed_logps

MODEL_FOLDER = Path(__file__).parent / "model"

Response = tuple[list[int], list[int], int]


def build(folder: Path = MODEL_FOLDER, *, seed: int = 0, rows: Sequence[Row] = TRAIN_ROWS) -> None:
    """Train tokenizer and model and write them to `folder`, which is replaced when they are complete.

    Args:
        folder: output folder of the model.
        seed: 0 gives the shipped model; others differ in initial weights, pretraining rows and order.
        rows: rows of the brief SFT; empty for the model before it.
    """
    tokenizer = build_tokenizer()
    clean = make_rows(15_000, seed=1 + 100 * seed, exclude={prompt_of(row) for row in TRAIN_ROWS})
    seen = {prompt_of(row) for row in [*TRAIN_ROWS, *clean]}
    rng = random.Random(5 + 100 * seed)
    mixed = [corrupt(row, rng) for row in make_rows(8_000, seed=2 + 100 * seed, exclude=seen)]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    fit(model, _encode(clean, tokenizer), steps=1500, learning_rate=5e-3, seed=1 + 100 * seed)
    fit(model, _encode(mixed, tokenizer), steps=750, learning_rate=1e-3, seed=2 + 100 * seed)
    if rows:
        fit(model, _encode(rows, tokenizer), steps=8, learning_rate=1e-3, seed=3 + 100 * seed, warmup=1)
    report = score(model, tokenizer, heldout_rows(1000))
    sys.stdout.write(f"exact match {report.accuracy:.3f} on 1,000 held-out rows: {report.by_task}\n")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def fit(
    model: nn.Module,
    responses: Sequence[Response],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    warmup: int = 50,
) -> None:
    """Maximise the likelihood of the responses: AdamW, linear warm-up and decay, 32 per step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    order = _shuffled(len(responses), random.Random(seed))
    for step in range(steps):
        factor = min(1.0, (step + 1) / warmup) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        batch = collate_responses([responses[next(order)] for _ in range(32)], pad_token_id=0)
        logps, lengths = summed_logps(model, batch)
        loss = -logps.sum() / lengths.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _shuffled(count: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(range(count), count)


def _encode(rows: Sequence[Row], tokenizer: object) -> list[Response]:
    encoded = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            row["messages"][:-1], add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)  # type: ignore[attr-defined]
        encoded.append((prompt, whole[len(prompt) :], len(whole) - len(prompt)))
    return encoded


if __name__ == "__main__":
    # One thread is fastest for so small a model, and the weights must not depend on the number of cores.
    torch.set_num_threads(1)
    build()
