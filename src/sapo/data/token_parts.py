"""Texts -> token ids through a tokenizer in Rust, each part of a text that stands alone once.

A tokenizer looks for its special tokens first, and tokenizes the text on either side of one alone. So texts are cut
before them: a prompt and the same prompt with its reply take one pass, and earlier turns are tokenized once for all
later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from sapo.data.rendering import TEMPLATE_FAULTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT = "\0"


class TextTokens:
    """Tokenizes texts without special tokens around them, as the tokenizer itself does.

    Args:
        tokenizer: one with a backend in Rust, neither truncating nor padding. Tokens that are added to it later are
            not seen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self._marks = _marks(tokenizer, list(self._backend.get_added_tokens_decoder().values()))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        cut = [self._parts(text) for text in texts]
        parts = list(dict.fromkeys(chain.from_iterable(cut)))
        # As transformers does, without the offsets, which cost a quarter of the time.
        encoded = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        found = {part: one.ids for part, one in zip(parts, encoded, strict=True)}
        return [list(chain.from_iterable(map(found.__getitem__, parts))) for parts in cut]

    def _parts(self, text: str) -> list[str]:
        if _CUT in text:
            return [text]
        for mark in self._marks:
            text = text.replace(mark, _CUT + mark)
        return text.split(_CUT)


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
