"""Rows of any supported shape -> one conversation, or one piece of plain text, with the reply to learn from.

Pure Python on dictionaries: no tokenizer, no files. A fault in the structure of a row is a `DatasetError`
that names the row; a well-formed row that teaches nothing (an empty reply) becomes a `Dropped`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sapo.errors import DatasetError, brief

Message: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[str, Any]
Format = Literal["messages", "chosen", "prompt/completion", "conversations", "alpaca", "question/answer"]

ACCEPTED = (
    "messages; prompt + completion; prompt + chosen (+ rejected); conversations (ShareGPT); "
    "instruction (+ input) + output (Alpaca); question + answer"
)
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
SHAREGPT_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

# Columns each format needs, in order of preference where a dataset satisfies several (preference datasets
# often carry "messages" beside "chosen"; both then hold the same conversation).
_NEEDED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "chosen": ("chosen",),
    "prompt/completion": ("prompt", "completion"),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "question/answer": ("question", "answer"),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the assistant's reply.

    Attributes:
        messages: `{"role", "content", ...}`, roles as in `ROLES`.
        first: replies before this message belong to a prompt that the row states, and are not learnt from.
        rejected: the assistant message that a paired row puts in place of the last one.
        tools: what the row offers in its `tools` column, handed to the chat template.
    """

    messages: tuple[Message, ...]
    first: int = 0
    rejected: Message | None = None
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text without roles: no chat template is applied."""

    prompt: str
    completion: str
    rejected: str | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that cannot be learnt from, and why, in words that a report can count."""

    reason: str


def detect_format(row: Row, *, paired: bool, source: str) -> Format:
    """Tell the format of a dataset from the columns of its first row (one that holds None counts as absent).

    Raises:
        DatasetError: no format fits, or `paired` and the row lacks chosen or rejected.
    """
    columns = {name for name, value in row.items() if value is not None}
    if paired:
        if {"chosen", "rejected"} <= columns:
            return "chosen"
        raise DatasetError(
            f"{source}: has the columns {_names(columns)}, but learning from pairs needs chosen and rejected "
            "(and prompt, unless both repeat it). Give paired rows, or let the model write the rejected side."
        )
    for name, needed in _NEEDED.items():
        if columns.issuperset(needed):
            return name
    raise DatasetError(
        f"{source}: unknown format: the first row has the columns {_names(columns)}. "
        f"Accepted are {ACCEPTED}; rename the columns to one of these."
    )


def parse_row(row: Row, layout: Format, *, paired: bool, chat: bool, where: str) -> Conversation | PlainText | Dropped:
    """Turn one row into what is to be rendered.

    Args:
        row: columns and values.
        layout: from `detect_format`.
        paired: keep the rejected side.
        chat: whether Alpaca and question/answer rows become conversations (there is a chat template).
        where: names the row in messages, such as "row 17 of train.jsonl".

    Raises:
        DatasetError: the row lacks a column, or its messages are malformed.
    """
    needed = (*_NEEDED[layout], "rejected") if paired else _NEEDED[layout]
    missing = [name for name in needed if row.get(name) is None]
    if missing:
        present = {name for name, value in row.items() if value is not None}
        raise DatasetError(
            f"{where}: lacks {_names(missing)}, which the first row has; it holds {_names(present)}. "
            "One dataset has one format: complete the row or remove it."
        )
    if layout == "messages":
        return _conversation(_messages(row["messages"], "messages", where), row, "messages", where)
    if layout == "conversations":
        messages = _messages(row["conversations"], "conversations", where)
        system = row.get("system")
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return _conversation(messages, row, "conversations", where)
    if layout == "alpaca":
        return _instruction(row, chat=chat, where=where)
    if layout == "question/answer":
        question, answer = (_text(row[name], name, where) for name in ("question", "answer"))
        return _single_turn(question, question + "\n", answer, chat=chat)
    if layout == "chosen":
        return _chosen(row, paired=paired, where=where)
    return _prompt_and_reply(row, "completion", row["completion"], None, where)


def _instruction(row: Row, *, chat: bool, where: str) -> Conversation | PlainText | Dropped:
    extra = row.get("input")
    parts = [_text(row["instruction"], "instruction", where)]
    if extra is not None and _text(extra, "input", where).strip():
        parts.append(extra)
    text = "\n\n".join(parts)
    return _single_turn(text, text + "\n\n", _text(row["output"], "output", where), chat=chat)


def _single_turn(user: str, plain_prompt: str, reply: str, *, chat: bool) -> Conversation | PlainText | Dropped:
    if not user.strip():
        return Dropped("empty prompt")
    if not reply.strip():
        return Dropped("empty reply")
    if not chat:
        return PlainText(plain_prompt, reply)
    return Conversation(({"role": "user", "content": user}, {"role": "assistant", "content": reply}))


def _chosen(row: Row, *, paired: bool, where: str) -> Conversation | PlainText | Dropped:
    """Preference rows: the prompt is a column of its own, or what chosen and rejected begin with."""
    chosen, rejected = row["chosen"], row.get("rejected")
    if row.get("prompt") is not None:
        return _prompt_and_reply(row, "chosen", chosen, rejected if paired else None, where)
    if isinstance(chosen, str):
        if not isinstance(rejected, str):
            raise DatasetError(
                f"{where}: chosen is text, and neither a prompt nor a rejected text tells where the prompt "
                "ends. Add a prompt column."
            )
        cut = _shared_text(chosen, rejected)
        pair = rejected[cut:] if paired else None
        return _plain(chosen[:cut], chosen[cut:], pair)
    messages = _messages(chosen, "chosen", where)
    other = _messages(rejected, "rejected", where) if paired else None
    return _paired(messages, other, row, 0, "chosen", where)


def _prompt_and_reply(
    row: Row, column: str, reply: object, rejected: object, where: str
) -> Conversation | PlainText | Dropped:
    """A prompt column beside a reply column, each text or messages."""
    prompt = row["prompt"]
    if isinstance(prompt, str) and isinstance(reply, str):
        pair = None if rejected is None else _text(rejected, "rejected", where)
        return _plain(prompt, reply, pair)
    if isinstance(prompt, str):
        messages = _messages(reply, column, where)
        opening = [{"role": "user", "content": prompt}]
        # A reply that opens with another role is the whole conversation, and `prompt` repeats part of it.
        whole = messages[0]["role"] != "assistant"
    else:
        opening = _messages(prompt, "prompt", where)
        if isinstance(reply, str):
            reply = [{"role": "assistant", "content": reply}]
        messages = _messages(reply, column, where)
        whole = _starts_with(messages, opening)
    if not whole:
        messages = [*opening, *messages]
    other = None if rejected is None else _rejected_side(rejected, opening, messages, where)
    first = 0 if isinstance(prompt, str) else len(opening)
    return _paired(messages, other, row, first, column, where)


def _rejected_side(rejected: object, opening: list[Message], messages: list[Message], where: str) -> list[Message]:
    """The whole rejected conversation, whether given whole, after the prompt, or as a reply alone."""
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    other = _messages(rejected, "rejected", where)
    if other[0]["role"] != "assistant" or _starts_with(other, opening):
        return other
    return [*messages[:-1], *other] if len(other) == 1 else [*opening, *other]


def _paired(
    messages: list[Message], other: list[Message] | None, row: Row, first: int, column: str, where: str
) -> Conversation | Dropped:
    conversation = _conversation(messages, row, column, where, first=first)
    if other is None or isinstance(conversation, Dropped):
        return conversation
    if other[-1]["role"] != "assistant":
        raise _wrong_end("rejected", other[-1]["role"], where)
    if len(other) != len(messages) or not _starts_with(other, messages[:-1]):
        return Dropped("chosen and rejected differ before the last reply")
    if _says_nothing(other[-1]):
        return Dropped("empty rejected reply")
    return Conversation(conversation.messages, first, other[-1], conversation.tools)


def _conversation(
    messages: list[Message], row: Row, column: str, where: str, *, first: int = 0
) -> Conversation | Dropped:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DatasetError(f'{where}: "{column}" has no assistant message, so there is no reply to learn from.')
    if roles[-1] != "assistant":
        raise _wrong_end(column, roles[-1], where)
    for message in messages:
        # An empty system text or tool result is ordinary; an empty question or answer is damage.
        if message["role"] == "user" and _says_nothing(message):
            return Dropped("empty user message")
        if message["role"] == "assistant" and _says_nothing(message):
            return Dropped("empty reply")
    return Conversation(tuple(messages), first, None, _tools(row.get("tools"), where))


def _plain(prompt: str, completion: str, rejected: str | None) -> PlainText | Dropped:
    if not completion.strip():
        return Dropped("empty reply")
    if rejected is not None and not rejected.strip():
        return Dropped("empty rejected reply")
    return PlainText(prompt, completion, rejected)


def _messages(value: object, column: str, where: str) -> list[Message]:
    """Check one list of messages; ShareGPT keys and roles are translated."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DatasetError(f'{where}: "{column}" is {_kind(value)}; it must be a list of messages.')
    if not value:
        raise DatasetError(f'{where}: "{column}" is an empty list; it must hold at least one message.')
    return [_message(item, f'message {number} of "{column}"', where) for number, item in enumerate(value, 1)]


def _message(item: object, name: str, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DatasetError(f"{where}: {name} is {_kind(item)}; it must be an object with role and content.")
    fields = {key: value for key, value in item.items() if value is not None}
    if "role" not in fields and "from" in fields:
        fields["role"] = fields.pop("from")
        if "value" in fields:
            fields["content"] = fields.pop("value")
    role = fields.get("role")
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        found = "no role" if role is None else f"the unknown role {brief(json.dumps(role, default=str), 60)}"
        raise DatasetError(
            f"{where}: {name} has {found}; known are {_names(ROLES)}, and ShareGPT's {_names(SHAREGPT_ROLES)}."
        )
    content = fields.get("content", "" if fields.get("tool_calls") else None)
    if not isinstance(content, str):
        raise DatasetError(f"{where}: {name} has {_kind(content)} as content; it must be text.")
    return {**fields, "role": role, "content": content}


def _tools(value: object, where: str) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise DatasetError(f'{where}: "tools" is text but not valid JSON ({error.msg}).') from error
    if value is not None and not isinstance(value, list):
        raise DatasetError(f'{where}: "tools" is {_kind(value)}; it must be a list, or JSON text of one.')
    return value or None


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DatasetError(f'{where}: "{column}" is {_kind(value)}; it must be text.')
    return value


def _says_nothing(message: Message) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


def _starts_with(messages: Sequence[Message], opening: Sequence[Message]) -> bool:
    # Metadata beside role and content (scores, ids) often differs between the two sides of a pair.
    return len(messages) > len(opening) and all(
        (mine["role"], mine["content"], mine.get("tool_calls"))
        == (theirs["role"], theirs["content"], theirs.get("tool_calls"))
        for mine, theirs in zip(messages, opening, strict=False)
    )


def _shared_text(chosen: str, rejected: str) -> int:
    """Length of the prompt that two texts share, moved back to a white space so as not to tear a word."""
    cut = 0
    for mine, theirs in zip(chosen, rejected, strict=False):
        if mine != theirs:
            break
        cut += 1
    while cut and not (cut < len(chosen) and chosen[cut].isspace()):
        cut -= 1
    return cut


def _wrong_end(column: str, role: str, where: str) -> DatasetError:
    return DatasetError(f'{where}: "{column}" ends with role "{role}"; the last message must be the assistant\'s.')


def _names(names: Collection[str]) -> str:
    return brief(", ".join(sorted(names)) or "nothing")


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence):
        return "a list"
    return f"the {type(value).__name__} {value!r}" if isinstance(value, (bool, int, float)) else "not text"
