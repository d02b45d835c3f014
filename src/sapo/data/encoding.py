"""Conversations and plain text -> token ids: prompt and response of each turn.

The published code puts every message through the template alone, so that the assistant's header lands in the
response. Here the response is exactly what follows the prompt that generation will start from.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sapo.data.examples import DataReport, Turn
from sapo.data.messages import Conversation, PlainText
from sapo.data.rendering import TEMPLATE_FAULTS, Renderer, Unprinted, sound
from sapo.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def template_tail(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template prints after the text of a last reply; raises what the template does."""
    marker = "zebra quartz"
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
    _, found, tail = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(marker)
    return str(tail) if found else ""


def _template_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        tail = template_tail(tokenizer)
    except TEMPLATE_FAULTS:
        return []  # a template for talk of another shape: the rows themselves will tell
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        # Skipped before the test: some vocabularies hold line breaks as added tokens.
        if tokenizer.decode([token]).strip():
            special = token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder
            return [token] if special else []
    return []


class Encoder:
    """Renders and tokenizes turns, and counts what it meets in `report`.

    Args:
        tokenizer: the model's.
        eos_ids: see `eos_token_ids`.
        report: of the dataset.
        date: what a chat template prints that prints the date; None for today's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Collection[int],
        report: DataReport,
        date: datetime.date | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise TokenizerError("the tokenizer has no EOS token to close a response with. Set tokenizer.eos_token.")
        self.chat = bool(tokenizer.chat_template)
        self._tokenizer = tokenizer
        self._ends = frozenset({*eos_ids, tokenizer.eos_token_id})
        self._report = report
        self._blank: dict[int, bool] = {}
        self._start = self._start_ids()
        self._renderer = Renderer(tokenizer, self._ends, report.columns, date or datetime.date.today())

    def plain(self, text: PlainText, row: int, where: str) -> Draft:
        """A row without roles, as one draft.

        Raises:
            DatasetError: it holds what is no text.
        """
        replies = [text.completion, *([] if text.rejected is None else [text.rejected])]
        wholes = tuple(sound(text.prompt + reply, where) for reply in replies)
        return Draft(row, 0, text.prompt, wholes, plain=True)

    def render(
        self, talk: Conversation, row: int, chosen_turns: Literal["last", "random", "all"], where: str
    ) -> list[Draft]:
        """The turns of a conversation to train on, through the chat template; counts those that are left out.

        Raises:
            TokenizerError: there is no chat template.
            DatasetError: the template refuses the conversation, or does not print a part of its prompt.
        """
        if not self.chat:
            raise TokenizerError(
                f"{where}: holds messages, but the tokenizer has no chat template. Give one with "
                "--chat_template_path chatml (or zephyr, a Jinja file, a folder, a Hub id), or give rows of plain "
                "prompt and completion."
            )
        drafts = []
        for index, place in self._chosen(talk, row, chosen_turns):
            try:
                prompt, wholes = self._renderer.turn(talk, place, where)
            except Unprinted as reason:
                self._report.drop(str(reason), row)
            else:
                drafts.append(Draft(row, index, prompt, wholes, plain=False))
        return drafts

    def _chosen(self, talk: Conversation, row: int, chosen_turns: str) -> list[tuple[int, int]]:
        """The replies to train on: which reply each is, and which message."""
        places = [place for place, message in enumerate(talk.messages) if message["role"] == "assistant"]
        turns = [(index, place) for index, place in enumerate(places) if place >= max(talk.first, 1)]
        if not turns:
            self._report.drop("reply without a prompt", row)
        last = chosen_turns == "last" or talk.rejected is not None
        chosen = []
        for index, place in reversed(turns):
            if place in talk.untrained:
                self._report.drop(f"reply {talk.untrained[place]}", row)
            else:
                chosen.append((index, place))
            # The rejected reply of a pair answers what the last one answers.
            if last and (chosen or talk.rejected is not None):
                break
        return chosen[::-1]

    def turns(self, drafts: Sequence[Draft]) -> Iterator[tuple[int, Turn]]:
        """Tokenize drafts, giving the row number and the turn of each.

        Raises:
            TokenizerError: the chat template renders a prompt differently once the reply follows.
        """
        texts = [text for draft in drafts for text in (draft.prompt, *draft.wholes)]
        encoded = iter(self._encode(texts))
        for draft in drafts:
            prompt = next(encoded)
            wholes = [next(encoded) for _ in draft.wholes]
            try:
                replies = [
                    self._reply(draft, text, prompt, whole) for text, whole in zip(draft.wholes, wholes, strict=True)
                ]
            except TokenizerError as error:
                self._report.refuse(error, draft.row)
                continue
            # Text that a template has rendered brings its start token along.
            start = self._start if draft.plain and prompt[: len(self._start)] != self._start else []
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
