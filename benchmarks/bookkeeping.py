"""Share of a training step that segments, buffer and layout take, with a full buffer of 20,000 pairs.

    python benchmarks/bookkeeping.py

CPU time of one thread; the step is a real one of `SAPOTrainer` on a Llama of 8.9 million parameters (hidden 256,
6 layers, vocabulary 8192), prompt 128, response 256, segment 64, batch 8.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sapo import Pair, SAPOConfig, SAPOTrainer, Segment
from sapo.preference.batches import collate_pairs
from sapo.preference.segments import choose_segment, splice

BATCH, PROMPT, RESPONSE, SEGMENT, PAIRS, ROUNDS = 8, 128, 256, 64, 100_000, 5


def main() -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    words = {f"t{i}": i for i in range(8192)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t1")

    def text(length: int) -> str:
        return " ".join(f"t{rng.randrange(2, 8192)}" for _ in range(length))

    rows = [{"prompt": text(PROMPT), "completion": " " + text(RESPONSE - 1)} for _ in range(BATCH)]
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = SAPOConfig(
            output_dir=folder, max_steps=ROUNDS, per_device_train_batch_size=BATCH, segment_length=SEGMENT,
            max_length=PROMPT + RESPONSE, replay_buffer_size=PAIRS, chosen_probe_size=0, use_cpu=True,
            gradient_checkpointing=False, disable_tqdm=True, report_to="none", save_strategy="no",
            logging_strategy="no", num_train_epochs=1,
        )  # fmt: skip
        trainer = SAPOTrainer(LlamaForCausalLM(config), args, rows, processing_class=tokenizer)
        pair = Pair(
            0, 0, tuple(range(2, 2 + PROMPT)), tuple(range(2, 2 + RESPONSE)), tuple(range(2, 2 + RESPONSE)),
            Segment(0, SEGMENT), Segment(0, SEGMENT),
        )  # fmt: skip
        buffer = trainer.source.buffer
        for _ in range(PAIRS):
            buffer.add(pair, 0)
        steps: list[float] = []
        inner = trainer.training_step

        def timed(*given: object, **named: object) -> torch.Tensor:
            started = time.process_time()
            loss = inner(*given, **named)
            steps.append(time.process_time() - started)
            return loss

        trainer.training_step = timed
        trainer.train()
    book: list[float] = []
    for _ in range(50):
        started = time.process_time()
        for _ in range(BATCH):
            segment = choose_segment(RESPONSE, SEGMENT, rng)
            splice(pair.chosen_ids, segment, pair.chosen_ids[:SEGMENT])
            buffer.add(pair, 0)
        drawn = buffer.draw(BATCH, rng)
        buffer.mean_age(1)
        buffer.mean_draws()
        collate_pairs(drawn, pad_token_id=0, layout="shared", score_shared=False)
        book.append(time.process_time() - started)
    step, part = statistics.median(steps), statistics.median(book)
    print(f"step {step:.3f} s, bookkeeping {part * 1e3:.2f} ms: {part / step:.2%} of a step ({PAIRS:,} pairs held)")


if __name__ == "__main__":
    main()
