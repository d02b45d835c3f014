"""Tokens of texts in parts are those of the texts in full, with every kind of tokenizer."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sapo.data.examples import DataOptions
from sapo.data.prepare import prepare_dataset
from sapo.data.token_parts import TextTokens
from sapo.errors import DatasetError, TokenizerError
from tests.prepared import CHATML
from tests.tiny import BYTE_SPECIAL_TOKENS, byte_tokenizer, tiny_tokenizer
from tests.unit.test_data_templates import LLAMA

MARKED = CHATML.replace(
    "+ m['content'] + '<|im_end|>\\n' }}",
    "}}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
)
GEMMA = (
    "<s>{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Merges across spaces and line breaks show a cut at the wrong place.
MERGES = [("a", "b"), ("Ġ", "a"), ("a", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "a"), ("1", "2"), ("n", "t"), ("ĠĠ", "a")]


def with_words(splitter, normalizer=None, *, added=(), template=CHATML):
    tokenizer = byte_tokenizer(template, merges=MERGES)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = splitter
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return tokenizer


def gpt2():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece(scheme):
    """As Llama 2 and Gemma have it: the first text of all may begin otherwise than what follows a special token."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz12.\n", "▁a", "a▁", "▁▁", "ab"]
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(["<unk>", *letters])}, [("▁", "a"), ("a", "▁")], unk_token="<unk>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(list(BYTE_SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = GEMMA
    return tokenizer


ATOMS = (
    "a", "b", "ab", "nt", "word", "user", " ", "  ", "\n", "\n\n", "\t", "\r\n", "1", "12", "'s", "'", "...", "é",
    "<x>", "e\u0301", "\u0301", "日本", "🙂", "\u00a0", "\u3000", "\x1c", "\x85", "\0", "<", "|>", "_", " a", "x y",
    *BYTE_SPECIAL_TOKENS,
)  # fmt: skip
MADE = {
    "bytes": (lambda: byte_tokenizer(CHATML, merges=MERGES), 3),
    "gpt2": (lambda: with_words(gpt2()), 3),
    "gpt2, no template": (lambda: with_words(gpt2(), template=None), 1),
    "digits": (lambda: with_words(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), gpt2()])), 3),
    "pattern": (lambda: with_words(split(r"\w+ ?|\W"), normalizers.NFC()), 3),
    "prefix": (lambda: with_words(pre_tokenizers.ByteLevel(add_prefix_space=True)), 3),
    "NFKC": (lambda: with_words(gpt2(), normalizers.NFKC()), 3),
    "token with a space": (lambda: with_words(gpt2(), added=["x y"]), 3),
    "greedy token": (lambda: with_words(gpt2(), added=[AddedToken("<x>", rstrip=True)]), 3),
    "word token": (lambda: with_words(gpt2(), added=[AddedToken("ab", single_word=True)]), 0),
    "overlapping token": (lambda: with_words(gpt2(), added=[AddedToken("a<", normalized=False)]), 0),
    "longer token": (lambda: with_words(gpt2(), added=[AddedToken("<|im_start|>user", normalized=False)]), 2),
    "metaspace first": (lambda: sentencepiece("first"), 4),
    "metaspace always": (lambda: sentencepiece("always"), 4),
    "words": (tiny_tokenizer, 1),
}
REAL = [name for name in os.environ.get("SAPO_TEST_REAL_MODEL", "").split(os.pathsep) if name]


@pytest.mark.parametrize("name", [*MADE, *REAL])
def test_tokens_of_texts_in_parts_are_those_of_the_texts_in_full(name):
    tokenizer = MADE[name][0]() if name in MADE else AutoTokenizer.from_pretrained(Path(name))
    in_parts = TextTokens(tokenizer)
    if name in MADE:
        assert len(in_parts._marks) == MADE[name][1]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.lists(st.sampled_from(ATOMS), max_size=12).map("".join), max_size=12))
    def check(texts):
        found = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        assert in_parts(texts) == [one.ids for one in found]

    check()


def test_a_prompt_that_its_reply_follows_is_tokenized_once(monkeypatch):
    in_parts, asked = TextTokens(with_words(gpt2())), []
    encode = in_parts._backend

    class Watched:
        def encode_batch_fast(self, parts, **options):
            asked.extend(parts)
            return encode.encode_batch_fast(parts, **options)

    monkeypatch.setattr(in_parts, "_backend", Watched())
    prompt = "<|im_start|>user ab<|im_end|>"
    in_parts([prompt, prompt + "<|im_start|>assistant b<|im_end|>", prompt])
    assert sorted(asked) == ["", "<|im_end|>", "<|im_start|>assistant b", "<|im_start|>user ab"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=8).map("".join), min_size=4, max_size=4),
    st.sampled_from(["last", "random", "all"]),
    st.sampled_from([CHATML, MARKED, LLAMA, GEMMA, None]),
)
def test_prepared_rows_are_those_of_the_tokenizers_own_call(texts, turns, template):
    tokenizer = with_words(gpt2(), template=template)
    roles = ("user", "assistant") * 2
    talk = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    rows = [{"messages": talk}, {"messages": talk[:2]}] if template else [{"prompt": texts[0], "completion": texts[1]}]
    options = DataOptions(4096, 2048, assistant_turns=turns)

    def prepared():
        try:
            found, report = prepare_dataset(rows * 3, tokenizer, options, eos_ids=[tokenizer.eos_token_id])
        except (DatasetError, TokenizerError) as error:
            return str(error)
        return found.to_list(), report.lines(), report.details()

    in_parts = prepared()
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    assert in_parts == prepared()
