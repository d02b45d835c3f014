"""Tiny base models with the traits of Llama-3 and Mistral: no chat template, no pad token, BOS by post-processor."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast


def _starting_with(backend, bos):
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def llama_tokenizer():
    """Bytes, as Llama-3's: special tokens after the vocabulary, none of them of ChatML."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    backend.add_special_tokens([bos, eos, "<|reserved_special_token_0|>"])
    _starting_with(backend, bos)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def mistral_tokenizer():
    """Characters and bytes, as sentencepiece has them: a space is "▁", and one is put before each text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(33, 127)]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    _starting_with(backend, "<s>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_model(tokenizer, *, tied=False, seed=0):
    """Two layers, grouped keys, as many embeddings as tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(**_sizes(tokenizer), tie_word_embeddings=tied)
    return LlamaForCausalLM(config)


def mistral_model(tokenizer, seed=0):
    """The same with a sliding window."""
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**_sizes(tokenizer), sliding_window=64, tie_word_embeddings=False))


def _sizes(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }


BASES = {"llama": (llama_tokenizer, llama_model), "mistral": (mistral_tokenizer, mistral_model)}


def save_base(folder, kind, **options):
    """Write a base model with its tokenizer."""
    tokenizer, model = BASES[kind]
    made = tokenizer()
    model(made, **options).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "A model, and you?"},
    {"role": "user", "content": "A person.\nTell me more."},
    {"role": "assistant", "content": "Gladly: I am small, and learn from few words."},
]
