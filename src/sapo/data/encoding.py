"""Conversations and plain text -> token ids: prompt and response of each turn.

The published code puts every message through the template alone, so that the assistant's header lands in the
response. Here the response is exactly what follows the prompt that generation will start from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from sapo.data.examples import DataReport, Turn
from sapo.data.formats import Conversation, Message, PlainText
from sapo.errors import DatasetError, TokenizerError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Draft:
    """One turn as text, before it is tokenized.

    Attributes:
        row: row of the source dataset, from 0.
        index: which assistant message of the row, from 0.
        prompt: the text before the reply.
        wholes: prompt and reply together; then, if paired, prompt and rejected reply.
        plain: no chat template wrote it, so the tokenizer's start token is still to come.
    """

    row: int
    index: int
    prompt: str
    wholes: tuple[str, ...]
    plain: bool


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None) -> frozenset[int]:
    """All tokens that end a reply: the tokenizer's, the generation configuration's, and the chat template's.

    Args:
        tokenizer: the model's tokenizer.
        generation_eos: `eos_token_id` of the model's generation configuration.

    Raises:
        TokenizerError: there is none.
    """
    ids = {generation_eos} if isinstance(generation_eos, int) else set(generation_eos or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        ids.update(_template_end(tokenizer))
    if not ids:
        raise TokenizerError(
            "no end token: neither the tokenizer, nor the generation configuration, nor a chat template has "
            "one, so no reply would ever end. Set tokenizer.eos_token."
        )
    return frozenset(ids)


def _template_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    marker = "zebra quartz"
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
    try:
        _, found, tail = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(marker)
    except _TEMPLATE_FAULTS:
        return []  # a template for talk of another shape: the rows themselves will tell
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    for token in ids:
        # Skipped before the test: some vocabularies hold line breaks as added tokens.
        if tokenizer.decode([token]).strip():
            special = token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder
            return [token] if special else []
    return []


class Encoder:
    """Renders and tokenizes turns, and counts what it meets in `report`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int], report: DataReport) -> None:
        if tokenizer.eos_token_id is None:
            raise TokenizerError("the tokenizer has no end token to close a response with. Set tokenizer.eos_token.")
        self.chat = bool(tokenizer.chat_template)
        self._tokenizer = tokenizer
        self._ends = frozenset({*eos_ids, tokenizer.eos_token_id})
        self._report = report
        self._blank: dict[int, bool] = {}
        self._start = self._start_ids()

    def plain(self, text: PlainText, row: int, where: str) -> Draft:
        """A row without roles, as one draft.

        Raises:
            DatasetError: it holds what is no text.
        """
        replies = [text.completion, *([] if text.rejected is None else [text.rejected])]
        wholes = tuple(_sound(text.prompt + reply, where) for reply in replies)
        return Draft(row, 0, text.prompt, wholes, plain=True)

    def render(
        self, talk: Conversation, row: int, chosen_turns: Literal["last", "random", "all"], where: str
    ) -> list[Draft]:
        """The turns of a conversation to learn from, through the chat template.

        Raises:
            TokenizerError: there is no chat template.
            DatasetError: the template refuses the conversation.
        """
        if not self.chat:
            raise TokenizerError(
                f"{where}: holds messages, but the tokenizer has no chat template. Set "
                "tokenizer.chat_template, copy one with trl.clone_chat_template(model, tokenizer, "
                '"Qwen/Qwen3-0.6B"), or give rows of plain prompt and completion.'
            )
        places = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
        turns = [(index, place) for index, place in enumerate(places) if place >= max(talk.first, 1)]
        if chosen_turns == "last" or talk.rejected is not None:
            turns = turns[-1:]
        drafts = []
        for index, place in turns:
            before = talk.messages[:place]
            replies = [talk.messages[place], *([] if talk.rejected is None else [talk.rejected])]
            prompt = self._template(before, talk, where, opening=True)
            wholes = tuple(self._template((*before, reply), talk, where) for reply in replies)
            drafts.append(Draft(row, index, prompt, wholes, plain=False))
        return drafts

    def turns(self, drafts: Sequence[Draft]) -> Iterator[tuple[int, Turn]]:
        """Tokenize drafts, giving the row number and the turn of each.

        Raises:
            TokenizerError: the chat template renders a prompt differently once the reply follows.
        """
        texts = [text for draft in drafts for text in (draft.prompt, *draft.wholes)]
        encoded = iter(self._encode(texts))
        for draft in drafts:
            prompt = next(encoded)
            replies = [self._reply(draft, text, prompt, next(encoded)) for text in draft.wholes]
            start = self._start if draft.plain else []
            rejected = replies[1] if len(replies) > 1 else None
            yield draft.row, Turn(draft.index, (*start, *prompt), replies[0], rejected)

    def _reply(self, draft: Draft, text: str, prompt: list[int], whole: list[int]) -> tuple[int, ...]:
        if whole[: len(prompt)] == prompt:
            return self._ended(whole[len(prompt) :])
        if not text.startswith(draft.prompt):
            raise self._rewritten(draft.row, prompt, whole)
        # Generation continues the prompt's own tokens, so a token that spans both could never be generated.
        self._report.boundary_merges += 1
        return self._ended(self._encode([text[len(draft.prompt) :]])[0])

    def _ended(self, reply: list[int]) -> tuple[int, ...]:
        """Cut after the end token of the turn, or append one if there is none.

        Templates add white space after the end token, and some a second one that closes the document. Both
        come after the point where generation stops.
        """
        end = None
        for place in range(len(reply) - 1, -1, -1):
            if reply[place] in self._ends:
                end = place
            elif not self._is_blank(reply[place]):
                break
        if end is not None:
            return tuple(reply[: end + 1])
        return (*reply, self._tokenizer.eos_token_id) if reply else ()

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]

    def _template(self, messages: Sequence[Message], talk: Conversation, where: str, *, opening: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=talk.tools, add_generation_prompt=opening, tokenize=False
            )
        except _TEMPLATE_FAULTS as error:
            reason = brief(error).rstrip(".")
            raise DatasetError(
                f"{where}: the chat template refuses it ({reason}). Mend the row, or use another template."
            ) from error
        return _sound(text, where)

    def _rewritten(self, row: int, prompt: list[int], whole: list[int]) -> TokenizerError:
        pairs = enumerate(zip(prompt, whole, strict=False))
        place = next((i for i, (mine, theirs) in pairs if mine != theirs), min(len(prompt), len(whole)))
        before, after = (
            repr(self._tokenizer.decode(ids[place : place + 3])) if place < len(ids) else "nothing"
            for ids in (prompt, whole)
        )
        return TokenizerError(
            f"row {row + 1} of {self._report.source}: the chat template renders the prompt differently "
            f"once the reply follows: at token {place + 1} it has {before} before and {after} after. Use a "
            "template that leaves the history unchanged, such as trl's get_training_chat_template gives."
        )

    def _start_ids(self) -> list[int]:
        """What the tokenizer puts before plain text, such as a start token, but not what it puts after."""
        bare = self._encode(["a"])[0]
        full = self._tokenizer("a")["input_ids"]
        places = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
        return list(full[: next(places, 0)])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # lengths are looked after here, not by the tokenizer's own limit
        )["input_ids"]
        return encoded


def _sound(text: str, where: str) -> str:
    """The text, if a tokenizer can read it: JSON may hold halves of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DatasetError(f"{where}: holds {half}, half of a character. Write the text anew.") from error
    return text
