"""Prompts spread over several columns: system text, earlier turns, question, input -> one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapo.data.columns import HISTORY, SYSTEM, Fields
from sapo.data.marks import untrained_mark
from sapo.data.messages import (
    Conversation,
    Dropped,
    Message,
    PlainText,
    from_json_text,
    is_empty,
    kind,
    parse_messages,
    parse_tools,
    without_nulls,
)
from sapo.data.transcripts import is_rendered
from sapo.errors import DatasetError

BASES = ("prompt", "instruction", "question", "query", "input")
"""Columns that hold the question, in order of preference."""

REPLIES = ("completion", "output", "response", "answer")
"""Columns that hold the reply, in order of preference."""

AFTER_LAST = "messages after the last reply are left out"
_RESERVED = frozenset(
    {"messages", "tools", "documents", "conversation", "chat_template", "add_generation_prompt", "tokenize"}
    | {"continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding"}
    | {"truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens"}
)


def flat(
    fields: Fields, base: str, reply: str, rejected: str | None, *, chat: bool, plain: bool
) -> Conversation | PlainText | Dropped:
    """A row whose question and reply are text.

    Args:
        fields: the row; its system text, earlier turns and inputs become part of the prompt.
        base: the column of the question.
        reply: the reply.
        rejected: the rejected reply of a pair.
        chat: the tokenizer has a chat template.
        plain: use the question unchanged as the prompt if no other column adds to it.

    Raises:
        DatasetError: a column holds something else.
    """
    question = str(fields.get(base))
    parts = [question]
    for name in ("input", "context"):
        extra = fields.peek(name)
        if name == base or extra is None or extra == "":
            continue
        if not isinstance(extra, str):
            raise DatasetError(f'{fields.where}: "{name}" is {kind(extra)}; it must be text.')
        fields.used.add(name)
        if extra.strip():
            # A passage precedes the question about it; an input follows its instruction.
            parts.insert(0 if name == "context" and base in ("question", "query") else len(parts), extra)
    text = "\n\n".join(parts)
    before = _earlier(fields)
    system = system_text(fields)
    # A chat template would print the markers of a rendered prompt a second time.
    bare = (plain or is_rendered(question)) and len(parts) == 1 and not before and not system
    if not question.strip() and not bare:
        return Dropped("empty prompt")
    if not reply.strip():
        return Dropped("empty reply")
    if rejected is not None and not rejected.strip():
        return Dropped("empty rejected reply")
    if bare:
        return PlainText(text, reply, rejected)
    if chat:
        messages = [*before, {"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        made = conversation(messages, fields, base, first=len(messages) - 1)
        if rejected is None or isinstance(made, Dropped):
            return made
        other = {"role": "assistant", "content": rejected}
        return Conversation(made.messages, made.first, other, made.tools, made.documents, made.template_options)
    end = "\n" if base in ("question", "query") else "\n\n"
    earlier = "".join(message["content"] + end for message in before)
    return PlainText((system + "\n\n" if system else "") + earlier + text + ("" if plain else end), reply, rejected)


def system_text(fields: Fields) -> str:
    """The text of the system column; empty without one.

    Raises:
        DatasetError: the column does not contain text.
    """
    for name in SYSTEM:
        value = fields.peek(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DatasetError(f'{fields.where}: "{name}" is {kind(value)}; it must be text.')
        fields.used.add(name)
        if value.strip():
            return value
    return ""


def with_system(messages: list[Message], fields: Fields) -> list[Message]:
    """Messages preceded by the text of a system column.

    Raises:
        DatasetError: they have another system message.
    """
    system = system_text(fields)
    if not system:
        return messages
    own = [message["content"].strip() for message in messages if message["role"] in ("system", "developer")]
    if system.strip() in own:
        return messages
    if any(own):
        raise DatasetError(f"{fields.where}: has a system column and another system message. Keep one of them.")
    rest = [message for message in messages if message["role"] not in ("system", "developer")]
    return [{"role": "system", "content": system}, *rest]


def conversation(messages: list[Message], fields: Fields, column: str, *, first: int = 0) -> Conversation | Dropped:
    """Check messages and add the row's arguments for the chat template; what follows the last reply is left out.

    Args:
        messages: all of them.
        fields: the row.
        column: where the messages come from, for errors.
        first: replies before this message index are not trained on.

    Raises:
        DatasetError: there is no reply.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DatasetError(f'{fields.where}: "{column}" has no assistant message, so there is no reply to train on.')
    if "assistant" not in roles[first:]:
        raise wrong_end(column, roles[-1], fields.where)
    while roles[-1] != "assistant":
        roles.pop()
    if len(roles) < len(messages):
        fields.note(AFTER_LAST)
    messages = messages[: len(roles)]
    for message in messages:
        # Empty system texts and tool results are normal; an empty question or answer is a data error.
        if message["role"] == "user" and is_empty(message):
            return Dropped("empty user message")
        if message["role"] == "assistant" and is_empty(message):
            return Dropped("empty reply")
    tools = None
    for name in ("tools", "functions"):
        value = fields.peek(name)
        if value is not None:
            fields.used.add(name)
            found = parse_tools(value, name, fields.where)
            if found and tools and found != tools:
                raise DatasetError(f'{fields.where}: "tools" and "functions" differ. Keep one of them.')
            tools = tools or found
    if tools is not None:
        tools = [_tool(tool, fields.where) for tool in tools]
    documents = None
    if fields.peek("documents") is not None:
        documents = parse_tools(fields.get("documents"), "documents", fields.where)
        if documents is not None and not all(isinstance(item, dict) for item in documents):
            raise DatasetError(f'{fields.where}: "documents" must contain objects with title and text.')
    marks = {
        index: mark
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and (mark := untrained_mark(message)) is not None
    }
    return Conversation(tuple(messages), first, None, tools, documents, _options(fields), marks)


def wrong_end(column: str, role: str, where: str) -> DatasetError:
    """The error for messages that do not end with an assistant message."""
    return DatasetError(f'{where}: "{column}" ends with role "{role}"; the last message must be the assistant\'s.')


def _tool(tool: object, where: str) -> Any:
    if not isinstance(tool, Mapping):
        raise DatasetError(f'{where}: "tools" contains {kind(tool)}; each must be an object, such as a JSON schema.')
    return tool


def _options(fields: Fields) -> Mapping[str, Any]:
    value = from_json_text(fields.get("chat_template_kwargs"))
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise DatasetError(f'{fields.where}: "chat_template_kwargs" is {kind(value)}; it must be an object.')
    taken = sorted(_RESERVED & set(value))
    if taken:
        raise DatasetError(
            f'{fields.where}: "chat_template_kwargs" sets {", ".join(taken)}, which the row itself sets. Remove it.'
        )
    options: Mapping[str, Any] = without_nulls(value)
    return options


def _earlier(fields: Fields) -> list[Message]:
    """The turns of a `history` column: pairs of question and answer, or messages."""
    name = next((name for name in HISTORY if fields.peek(name)), None)
    value = from_json_text(fields.get(name)) if name is not None else None
    if not value:
        return []
    if not isinstance(value, (list, tuple)):
        raise DatasetError(f'{fields.where}: "{name}" is {kind(value)}; it must be a list of earlier turns.')
    if isinstance(value[0], Mapping):
        return parse_messages(value, str(name), fields.where)
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DatasetError(f'{fields.where}: turn {number} of "{name}" must be a pair of question and answer.')
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages
