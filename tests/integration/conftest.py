import random

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sapo import SAPOConfig, SAPOTrainer

torch.set_num_threads(1)
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="session")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_model(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=63,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_rows(count=24, seed=0, paired=False):
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    rows = []
    for _ in range(count):
        row = {"prompt": text(2, 6), "chosen": " " + text(4, 14)}
        if paired:
            row["rejected"] = " " + text(4, 14)
        rows.append(row)
    return rows


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    def make(folder="run", *, lora=False, rows=None, eval_rows=None, model=None, trainer=SAPOTrainer, **options):
        settings = {
            "output_dir": str(tmp_path / folder),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "segment_length": 4,
            "max_length": 32,
            "reference_sync_steps": 2,
            "chosen_probe_size": 4,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "report_to": "none",
        } | options
        adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear") if lora else None
        return trainer(
            model or make_model(),
            SAPOConfig(**settings),
            rows or make_rows(),
            eval_rows,
            processing_class=tokenizer,
            peft_config=adapter,
        )

    return make
