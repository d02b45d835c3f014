"""Models, tokenizers and rows small enough for tests."""

import json
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sapo.config import HAS_ACTIVATION_CHECKPOINTING

WORDS = [f"w{i}" for i in range(60)]
BYTE_SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

QUANTIZED = {
    name: {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": nested,
    }
    for name, nested in (("4-bit", False), ("nested", True))
}
"""Options of `BitsAndBytesConfig`."""
SIZE_IN_4_BITS = {"hidden_size": 64, "intermediate_size": 64}
"""Of a `tiny_llama` whose layers hold whole blocks of 4-bit weights."""


def tiny_tokenizer():
    """One token a word of `WORDS`."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def byte_tokenizer(template=None, *, special=BYTE_SPECIAL_TOKENS, merges=(), bos=False, closing=False, eos="</s>"):
    """One token a byte, besides `merges` and `special`; `bos` and `closing` add tokens around plain text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    if bos or closing:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if closing else ''}"
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(seed=0, dtype=torch.float32, **overrides):
    """A Llama of two layers with the vocabulary of `tiny_tokenizer`, in training mode."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 3 + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    } | overrides
    return LlamaForCausalLM(LlamaConfig(**config)).to(dtype)


def save_tiny(folder, seed=0, *, tokenizer=None, **overrides):
    """Write `tiny_llama` with its tokenizer; returns the folder."""
    tiny_llama(seed, **overrides).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def write_rows(file, rows=None):
    """Write rows, by default `tiny_rows`, as JSON lines; returns the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in (tiny_rows() if rows is None else rows)))
    return file


def tiny_rows(count=24, seed=0, paired=False):
    """Rows of random `WORDS`."""
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


def enable_checkpointing(model, *, use_reentrant=False):
    """Recompute activations in the backward pass, under the name that this version of transformers has for it."""
    options = {"use_reentrant": use_reentrant}
    if HAS_ACTIVATION_CHECKPOINTING:
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
