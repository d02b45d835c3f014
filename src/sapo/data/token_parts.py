"""Texts -> token ids through a tokenizer in Rust, each part of a text that stands alone once.

At two places the tokens on one side do not depend on the text on the other. Before a special token, which the tokenizer
looks for first: the text on either side of it is tokenized alone. And with byte-level BPE before a space that follows
a word, where a new word always begins. So a prompt and the same prompt with its reply take one pass, earlier turns
are tokenized once for all later ones, and words that were met before are looked up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from sapo.data.rendering import TEMPLATE_FAULTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NFC = {"type": "NFC"}
_HELD = 2**19
"""Tokens of known parts above which all are forgotten: some 30 MB."""

_JOINED = 512
_CUT = "\0"
_IRREGULAR = re.compile(r"\s ")
_AFTER_WORD = re.compile(r"(?<!\s) ")

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = frozenset(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS % digits for digits in ("", "{1,3}"))
"""Patterns of words, of Qwen and of Llama 3: no match goes on behind a space, and none looks back."""


class TextTokens:
    """Tokenizes texts without special tokens around them, as the tokenizer itself does.

    Args:
        tokenizer: one with a backend in Rust, neither truncating nor padding. Tokens that are added to it later are
            not seen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        added = list(self._backend.get_added_tokens_decoder().values())
        self._marks = _marks(tokenizer, added)
        self._words = bool(self._marks) and _words_stand_alone(self._backend, added)
        self._known: dict[str, list[int]] = {}
        self._forget()

    def _forget(self) -> None:
        self._known = {"": [], **{mark: [self._backend.token_to_id(mark)] for mark in self._marks}}
        self._held = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        if self._held > _HELD:
            self._forget()
        known = self._known
        cut = [self._parts(text, words=self._words) for text in texts]
        new = list(set().union(*cut) - known.keys())
        if self._words and len(new) * 3 <= sum(map(len, cut)):
            found = self._encode_words(new)
        else:  # Words that do not come again would only be cut and joined.
            cut = [self._parts(text, words=False) for text in texts]
            new = list(set().union(*cut) - known.keys())
            found = self._encode(new)
        for part, ids in zip(new, found, strict=True):
            known[part] = ids
            self._held += len(ids)
        return [list(chain.from_iterable(map(known.__getitem__, parts))) for parts in cut]

    def _parts(self, text: str, *, words: bool) -> list[str]:
        if _CUT in text:
            return [text]
        for mark in self._marks:
            text = text.replace(mark, f"{_CUT}{mark}{_CUT}" if words else _CUT + mark)
        if words:
            regular = _IRREGULAR.search(text) is None
            text = text.replace(" ", f"{_CUT} ") if regular else _AFTER_WORD.sub(f"{_CUT} ", text)
        return text.split(_CUT)

    def _encode_words(self, words: list[str]) -> list[list[int]]:
        """The token ids of words, many in one text: a text for each would take ten times as long."""
        groups = [words[start : start + _JOINED] for start in range(0, len(words), _JOINED)]
        found: list[list[int]] = []
        for group, ids in zip(groups, self._encode([self._marks[0].join(group) for group in groups]), strict=True):
            apart = _split(ids, self._known[self._marks[0]][0])
            # Texts that hold the character of cuts are whole, with the marks in them.
            found += apart if len(apart) == len(group) else self._encode(group)
        return found

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # As transformers does, without the offsets, which cost a quarter of the time.
        return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _split(ids: list[int], mark: int) -> list[list[int]]:
    parts, start = [], 0
    for _ in range(ids.count(mark)):
        stop = ids.index(mark, start)
        parts.append(ids[start:stop])
        start = stop + 1
    return [*parts, ids[start:]]


def _marks(tokenizer: PreTrainedTokenizerBase, added: Sequence[Any]) -> list[str]:
    """The EOS token and those of the chat template, if the tokenizer finds them whatever is beside them."""
    printed = _printed(tokenizer)
    if any(token.single_word for token in added):
        return []
    texts = [token.content for token in added]
    all_texts = "\n".join(texts)
    tails = {text[start:] for text in texts for start in range(1, len(text))}
    return [
        token.content
        for token in added
        if token.special and not (token.normalized or token.lstrip or token.rstrip)
        if (mark := token.content) in printed and mark.strip() == mark and _CUT not in mark
        # Neither part of another token, nor can one that begins earlier end within it.
        if all_texts.count(mark) == 1 and not any(mark[:size] in tails for size in range(1, len(mark)))
    ]


def _printed(tokenizer: PreTrainedTokenizerBase) -> str:
    """The EOS token, and what the chat template prints around two messages, unless it refuses them."""
    eos = str(tokenizer.eos_token or "")
    if not tokenizer.chat_template:
        return eos
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    try:
        return eos + str(tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False))
    except TEMPLATE_FAULTS:
        return eos


def _words_stand_alone(backend: Any, added: Sequence[Any]) -> bool:
    """Whether a space after anything but white space begins a new word, the same wherever it is."""
    if any(token.rstrip or token.single_word or re.search(r"\s", token.content) for token in added):
        return False
    # NFC joins nothing to a space that follows.
    if backend.pre_tokenizer is None or (backend.normalizer is not None and _state(backend.normalizer) != _NFC):
        return False
    given = _state(backend.pre_tokenizer)
    steps = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    # Digits are split from what is beside them, character by character.
    steps = [step for step in steps if step["type"] != "Digits"]
    return (
        bool(steps)
        and _splits_words(steps[0])
        and all(step["type"] == "ByteLevel" and not step["add_prefix_space"] for step in steps[1:])
    )


def _splits_words(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":  # with GPT-2's pattern
        return bool(step["use_regex"]) and not step["add_prefix_space"]
    if step["type"] != "Split":
        return False
    return step["pattern"].get("Regex") in _PATTERNS and step["behavior"] == "Isolated" and not step["invert"]


def _state(component: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(component.__getstate__())
    return found
