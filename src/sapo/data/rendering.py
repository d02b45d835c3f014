"""One turn of a conversation -> the text of the prompt, and of prompt plus reply.

A template may print less than a row contains (it lacks a role, or tools) or more (the header of the next turn). The
first must not lead to training on an incomplete prompt, the second not to training on text that is not in the reply.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sapo.data.clock import dated_template
from sapo.data.columns import ColumnUse, belongs_to_prompt, holds, talks, texts_in
from sapo.data.marks import honoured
from sapo.data.messages import Conversation, Message
from sapo.errors import DatasetError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Exceptions that a chat template raises."""

_MARKER = "zebra quartz"
_ROLE = re.compile(r"assistant|model|\bbot\b|chatbot|\bgpt\b|\bai\b", re.IGNORECASE)
_KNOWN = frozenset({"role", "content", "tool_calls"})
_CHANGED = "messages.content (changed by the chat template)"
_REASONING = "messages.content (its reasoning)"
_CHANCE = 16
"""A text with fewer characters may be contained in another by chance."""


class Unprinted(Exception):  # noqa: N818
    """A message that the template does not print."""


class Renderer:
    """Applies a tokenizer's chat template.

    Args:
        tokenizer: one with a chat template, or nothing is rendered.
        ends: EOS tokens.
        columns: counts message fields that are not printed.
        date: the date for templates that print one; None for today.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], columns: ColumnUse, date: datetime.date
    ) -> None:
        self._tokenizer = tokenizer
        self._columns = columns
        self._date = date
        self._templates: dict[bool, str] = {}
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._ends = [str(tokenizer.convert_ids_to_tokens(end)) for end in ends if end in special]
        self._header, self._tail = self._probe() if tokenizer.chat_template else ("", None)

    def turn(self, talk: Conversation, index: int, where: str) -> tuple[str, tuple[str, ...]]:
        """The prompt of one reply, and prompt plus reply (for a pair, also prompt plus rejected reply).

        Args:
            talk: the conversation.
            index: message index of the reply.
            where: names the row in errors.

        Raises:
            Unprinted: the template does not print the reply, or a message before it.
            DatasetError: the template refuses the conversation, or ignores its tools or documents.
        """
        before = talk.messages[:index]
        prompt = self._render(before, talk, where, opening=True)
        self._check_prompt(before, prompt, talk, where)
        header, full_texts = self._header, []
        replies = [talk.messages[index], *([] if talk.rejected is None else [talk.rejected])]
        for reply in replies:
            whole = self._render((*before, reply), talk, where)
            self._check_reply(before, reply, prompt, whole, talk, where)
            if not whole.startswith(prompt + header):
                header = ""
            full_texts.append(self._without_tail(before, reply, whole, talk, where))
        return prompt + header, tuple(full_texts)

    def _probe(self) -> tuple[str, str | None]:
        """What the template prints around a reply: a header that its generation prompt lacks, and the tail."""
        asked = [{"role": "user", "content": "Hello"}]
        talk = Conversation((*asked, {"role": "assistant", "content": _MARKER}))
        try:
            closed = self._apply(talk.messages, talk, opening=False)
            opened = self._apply(asked, talk, opening=True)
            bare = self._apply(asked, talk, opening=False)
        except TEMPLATE_FAULTS:
            return "", None  # The template refuses this probe; rendering the rows will report errors.
        head, found, tail = closed.rpartition(_MARKER)
        header = head[len(opened) :] if head.startswith(opened) else ""
        # A header missing from the generation prompt is part of the prompt; a thinking or channel tag is the reply's.
        if not header.strip() or not (opened == bare or _ROLE.search(header)):
            header = ""
        return header, tail if found else None

    def _check_prompt(self, before: Sequence[Message], prompt: str, talk: Conversation, where: str) -> None:
        marked = self._marked(before, talk)
        for number, message in enumerate(before):
            role, content = message["role"], message["content"].strip()
            name = "an earlier reply" if role == "assistant" else f"its {role} message"
            seen = _mark(number) in marked if len(content) < _CHANCE else _prints(content, prompt)
            if content and not seen:
                blank = [*before[:number], {**message, "content": ""}, *before[number + 1 :]]
                if self._same(blank, talk, prompt, opening=True) and _answer(content):
                    raise Unprinted(f"the chat template does not print {name}")
            if message.get("tool_calls") and not _tells(message["tool_calls"], prompt):
                silent = {key: value for key, value in message.items() if key != "tool_calls"}
                if self._same([*before[:number], silent, *before[number + 1 :]], talk, prompt, opening=True):
                    raise Unprinted("the chat template does not print the tool calls of an earlier reply")
        for column, items in (("tools", talk.tools), ("documents", talk.documents)):
            if items and not _tells(items, prompt):
                bare = Conversation(
                    talk.messages,
                    tools=None if column == "tools" else talk.tools,
                    documents=None if column == "documents" else talk.documents,
                    template_options=talk.template_options,
                )
                if self._same(before, bare, prompt, opening=True):
                    raise DatasetError(
                        f'{where}: the chat template does not print its "{column}". Use a template that does, or '
                        "remove the column."
                    )
        for name, value in talk.template_options.items():
            if name not in self._template(tools=bool(talk.tools)):
                if talks(value):
                    raise DatasetError(
                        f"{where}: chat_template_kwargs has text under {name!r}, which the chat template does not "
                        "print. Put it into a message, or remove it."
                    )
                self._columns.note(f"chat_template_kwargs.{name}", where=where)

    def _marked(self, before: Sequence[Message], talk: Conversation) -> str:
        """What the template prints if short messages are long ones, which are not there by chance; perhaps nothing.

        One rendering for all of them: one for each would take the square of the time in a long conversation.
        """
        short = [0 < len(message["content"].strip()) < _CHANCE for message in before]
        if not any(short):
            return ""
        longer = [
            {**message, "content": _mark(number)} if short[number] else message for number, message in enumerate(before)
        ]
        try:
            return self._apply(longer, talk, opening=True)
        except TEMPLATE_FAULTS:
            return ""

    def _check_reply(
        self, before: Sequence[Message], reply: Message, prompt: str, whole: str, talk: Conversation, where: str
    ) -> None:
        body = whole[len(prompt) :] if whole.startswith(prompt) else whole
        content, calls = reply["content"].strip(), reply.get("tool_calls")
        if content and (len(content) < _CHANCE or not _prints(content, body)):
            if self._same((*before, {**reply, "content": ""}), talk, whole):
                raise Unprinted("the chat template does not print the reply")
        elif "</think>" in content and not all(part.strip() in body for part in re.split("</?think>", content)):
            self._columns.note(_REASONING, text=True, where=where)
        if calls and not _tells(calls, body):
            silent = {key: value for key, value in reply.items() if key != "tool_calls"}
            if self._same((*before, silent), talk, whole):
                raise Unprinted("the chat template does not print its tool calls")
        for message in (*before, reply):
            self._check_fields(message, whole, where, earlier=message["role"] == "assistant" and message is not reply)

    def _check_fields(self, message: Message, whole: str, where: str, *, earlier: bool) -> None:
        """List the fields of a message that are not printed."""
        if not _prints(message["content"].strip(), whole) and _answer(message["content"]):
            self._columns.note(_CHANGED, text=True, where=where)
        for key in message.keys() - _KNOWN - honoured(message):
            value = message[key]
            if not holds(value) or ((texts := list(texts_in(value))) and all(text.strip() in whole for text in texts)):
                continue
            if belongs_to_prompt(key):
                raise DatasetError(
                    f'{where}: a message has "{key}", which the chat template does not print. Put it into the content, '
                    "or remove it."
                )
            # Templates omit the reasoning of earlier replies on purpose.
            self._columns.note(f"messages.{key}", text=not earlier and talks(value), where=where)

    def _without_tail(
        self, before: Sequence[Message], reply: Message, whole: str, talk: Conversation, where: str
    ) -> str:
        """Prompt plus reply without what the template prints after the turn, such as the next header."""
        tail = self._tail
        if (tail is None or not whole.endswith(tail)) and not reply.get("tool_calls"):
            marked = self._render((*before, {**reply, "content": _MARKER}), talk, where)
            tail = marked.rpartition(_MARKER)[2]
        if not tail or not whole.endswith(tail):
            return whole
        positions = [(tail.find(end), len(end)) for end in self._ends if end in tail]
        if positions:
            start, size = min(positions)
            kept = tail[: start + size]
        else:
            kept = "" if tail.strip() else tail
        return whole[: len(whole) - len(tail)] + kept

    def _same(self, messages: Sequence[Message], talk: Conversation, text: str, *, opening: bool = False) -> bool:
        """Whether other messages render to the same text, so that their difference is not printed."""
        try:
            return self._apply(messages, talk, opening=opening) == text
        except TEMPLATE_FAULTS:
            return False

    def _render(self, messages: Sequence[Message], talk: Conversation, where: str, *, opening: bool = False) -> str:
        try:
            text = self._apply(messages, talk, opening=opening)
        except TEMPLATE_FAULTS as error:
            reason = brief(error).rstrip(".")
            raise DatasetError(
                f"{where}: the chat template raised an error ({reason}). Fix the row, or use another template."
            ) from error
        return valid_unicode(text, where)

    def _apply(self, messages: Sequence[Message], talk: Conversation, *, opening: bool) -> str:
        def render(given: list[Message]) -> str:
            text: str = self._tokenizer.apply_chat_template(
                given,
                tools=talk.tools,
                documents=talk.documents,
                chat_template=self._template(tools=bool(talk.tools)),
                add_generation_prompt=opening,
                tokenize=False,
                **talk.template_options,
            )
            return text

        try:
            return render(list(messages))
        except TypeError:
            if not any(message.get("tool_calls") for message in messages):
                raise
            # Some templates concatenate the arguments of a call with other text.
            return render([_with_text_arguments(message) for message in messages])

    def _template(self, *, tools: bool) -> str:
        if tools not in self._templates:
            given = self._tokenizer.get_chat_template(None, [{}] if tools else None)
            self._templates[tools] = dated_template(given, self._date)
        return self._templates[tools]


def _mark(number: int) -> str:
    return f"{_MARKER} {number} {_MARKER}"


def _answer(content: str) -> str:
    """A reply without its reasoning, which templates may leave out."""
    return content.rpartition("</think>")[2].strip()


def _prints(content: str, text: str) -> bool:
    """Whether a rendered text contains a message, but for white space and its reasoning."""
    answer = _answer(content) or content
    return content in text or answer in text or " ".join(answer.split()) in " ".join(text.split())


def _tells(items: Sequence[Any], text: str) -> bool:
    """Whether a text shows, and not by chance, that tools, calls or documents are printed."""
    found = []
    for item in items:
        inner = item.get("function", item) if isinstance(item, dict) else {}
        inner = inner if isinstance(inner, dict) else {}
        found += [inner[key].strip() for key in ("name", "text", "content") if isinstance(inner.get(key), str)]
    return any(len(one) >= _CHANCE and one in text for one in found)


def _with_text_arguments(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and not isinstance(function.get("arguments", ""), str):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": text}}
        made.append(call)
    return {**message, "tool_calls": made}


def valid_unicode(text: str, where: str) -> str:
    """The text, if it can be encoded as UTF-8: JSON may contain unpaired surrogates.

    Raises:
        DatasetError: it contains one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DatasetError(f"{where}: contains an unpaired surrogate ({half}). Re-encode the text as UTF-8.") from error
    return text
