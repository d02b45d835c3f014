"""One message, and lists of messages, in any published spelling -> role, content and tool calls."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sapo.data.json_text import InvalidJson, load_json
from sapo.errors import DatasetError, brief

Message: TypeAlias = dict[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
ROLE_SPELLINGS = {
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "instruction": "user",
    "question": "user",
    "input": "user",
    "response": "assistant",
    "answer": "assistant",
    "output": "assistant",
    "gpt": "assistant",
    "gpt4": "assistant",
    "gpt-4": "assistant",
    "chatgpt": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Role names of ShareGPT and others, in lower case, and the role that each stands for."""

_KEYS = {"role", "from"}
_CALL_KEYS = {"name", "function"}
_CALLS = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the assistant's reply.

    Attributes:
        messages: `{"role", "content", ...}`, roles as in `ROLES`.
        first: replies before this message index belong to the row's prompt and are not trained on.
        rejected: the rejected assistant message of a paired row, in place of the last one.
        tools: the row's `tools` column, passed to the chat template.
        documents: likewise, its `documents` column.
        template_options: likewise, its `chat_template_kwargs` column.
        untrained: message indices of replies that the row excludes from training, with the reason.
    """

    messages: tuple[Message, ...]
    first: int = 0
    rejected: Message | None = None
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    untrained: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text without roles: no chat template is applied.

    Attributes:
        prompt: what the response continues.
        completion: the response.
        rejected: the rejected response, in paired data only.
    """

    prompt: str
    completion: str
    rejected: str | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that cannot be trained on, with a reason that a report can count."""

    reason: str


def parse_messages(value: object, column: str, where: str) -> list[Message]:
    """Check a list of messages, one message, or JSON text of either; other spellings of keys and roles are translated.

    Raises:
        DatasetError: it is something else, or an item is not a message.
    """
    value = _rows_of(from_json_text(value))
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        text = "" if column in ("messages", "conversation", "conversations") else "text or "
        raise DatasetError(f'{where}: "{column}" is {kind(value)}{_fault(value)}; it must be {text}a list of messages.')
    if not value:
        raise DatasetError(f'{where}: "{column}" is an empty list; it must contain at least one message.')
    items = [part for item in value for part in _turn(from_json_text(item))]
    return [_message(item, f'message {number} of "{column}"', where) for number, item in enumerate(items, 1)]


def _rows_of(value: object) -> object:
    """A list of messages for an object with a list per field, as a `Sequence` of `datasets` gives it."""
    if not isinstance(value, Mapping) or not value.keys() & _KEYS:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) for column in columns) or len({*map(len, columns)}) != 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]


def _turn(item: object) -> list[object]:
    """A message; or those of an object with input, output and perhaps system, as in Capybara and for XTuner."""
    if not isinstance(item, Mapping) or item.keys() & _KEYS or not item.keys() >= {"input", "output"}:
        return [item]
    rest = {key: value for key, value in item.items() if key not in ("system", "input", "output")}
    system = [{"role": "system", "content": item["system"]}] if item.get("system") else []
    asked = {"role": "user", "content": item["input"]}
    return [*system, asked, {**rest, "role": "assistant", "content": item["output"]}]


def from_json_text(value: object) -> object:
    """A list or an object that was stored as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = load_json(value)
        except InvalidJson:
            return value
        return found if isinstance(found, (list, dict)) else value
    return value


def _fault(value: object) -> str:
    """Why text that looks like JSON is none, for an error."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return ""
    try:
        load_json(value)
    except InvalidJson as error:
        return f" and not valid JSON ({error.reason})"
    return ""


def from_stored(value: object) -> object:
    """Messages that were stored as JSON text; other text stays text, even if it is JSON, as some replies are."""
    found = _rows_of(from_json_text(value))
    items = [found] if isinstance(found, Mapping) else found
    if isinstance(items, list) and items and all(isinstance(item, Mapping) and item.keys() & _KEYS for item in items):
        return found
    return value if isinstance(value, str) else found


def without_nulls(value: Any) -> Any:
    """The value without the nulls that Arrow adds for fields that only other rows have."""
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def known_role(given: object) -> str | None:
    """The role that a spelling stands for; None if unknown."""
    spelling = given.strip().lower() if isinstance(given, str) else ""
    return spelling if spelling in ROLES else ROLE_SPELLINGS.get(spelling)


def _message(item: object, name: str, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DatasetError(f"{where}: {name} is {kind(item)}; it must be an object with role and content.")
    fields = {key: value for key, value in item.items() if value is not None}
    for key, known in (("from", "role"), ("value", "content")):
        if key in fields and known not in fields:
            fields[known] = fields.pop(key)
    given = fields.get("role")
    given_role = given.strip().lower() if isinstance(given, str) else ""
    role = known_role(given)
    if role is None:
        found = "no role" if given is None else f"the unknown role {brief(json.dumps(given, default=str), 60)}"
        known = f"known are {names(ROLES)}, and ShareGPT's {names(ROLE_SPELLINGS)}"
        close = difflib.get_close_matches(given_role, [*ROLES, *ROLE_SPELLINGS], n=1, cutoff=0.8)
        raise DatasetError(f"{where}: {name} has {found}; {f'nearest: {close[0]}' if close else known}.")
    if "content" not in item and "value" not in item and not fields.keys() & {"tool_calls", "function_call"}:
        raise DatasetError(f"{where}: {name} has no content; its fields are {names(fields)}.")
    content = _content(fields.get("content"), name, where)
    calls = fields.pop("tool_calls", None) or fields.pop("function_call", None)
    fields.pop("function_call", None)
    made: Message = {**without_nulls(fields), "role": role, "content": content}
    if role == "assistant":
        if not calls and given_role in _CALLS:
            stored = from_json_text(content)
            items = [stored] if isinstance(stored, Mapping) else stored
            if isinstance(items, list) and all(isinstance(i, Mapping) and i.keys() & _CALL_KEYS for i in items):
                calls, made["content"] = items, ""
        if calls:
            made["tool_calls"] = _tool_calls(calls, name, where)
    return made


def _content(content: object, name: str, where: str) -> str:
    """Text, or text parts, as one text; null is empty text."""
    if isinstance(content, str):
        stored = from_json_text(content)
        if not isinstance(stored, list) or not stored or not all(map(_is_text_part, stored)):
            return content  # other JSON text is what was said
        content = stored
    elif isinstance(content, Mapping) and _is_text_part(content):
        content = [content]
    if content is None or content != content:  # NaN
        return ""
    if not isinstance(content, Sequence):
        raise DatasetError(f"{where}: {name} has {kind(content)} as content; it must be text.")
    texts = []
    for part in content:
        fields = {"type": "text", "text": part} if isinstance(part, str) else part
        sort = fields.get("type") if isinstance(fields, Mapping) else None
        text = fields.get("text") if isinstance(fields, Mapping) and sort in (None, *_TEXT_PARTS) else None
        if not isinstance(text, str):
            found = f"a part of type {brief(json.dumps(sort, default=str), 40)}" if sort else f"{kind(part)} as a part"
            raise DatasetError(f"{where}: {name} has {found} in its content; only text can be trained on.")
        texts.append(text)
    return "".join(texts)


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)


def _tool_calls(calls: object, name: str, where: str) -> list[Any]:
    calls = from_json_text(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise DatasetError(f"{where}: {name} has {kind(calls)} as tool_calls; it must be a list of objects.")
    return [_tool_call(call, name, where) for call in calls]


def _tool_call(call: object, name: str, where: str) -> Any:
    """A call with its arguments as an object: templates would quote JSON text a second time."""
    if not isinstance(call, Mapping):
        return call
    if "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = call.get("function")
    if not isinstance(function, Mapping):
        return without_nulls(call)
    if "arguments" not in function and "parameters" in function:
        function = {("arguments" if key == "parameters" else key): value for key, value in function.items()}
    made = without_nulls({key: value for key, value in function.items() if key != "arguments"})
    if "arguments" in function:
        given = function["arguments"]
        if given is None or (isinstance(given, str) and not given.strip()):
            given = {}
        # Nulls in JSON text are intended; nulls in a struct come from Arrow.
        made["arguments"] = _arguments(given) if isinstance(given, str) else without_nulls(given)
        text = made["arguments"]
        if isinstance(text, str) and text.lstrip().startswith("{"):
            raise DatasetError(f"{where}: {name} has a tool call whose arguments are text{_fault(text)}.")
    return {**without_nulls({key: value for key, value in call.items() if key != "function"}), "function": made}


def _arguments(given: str) -> object:
    """Arguments that are JSON text, also of JSON text: some exports encode them twice."""
    try:
        inner = load_json(given) if given.lstrip().startswith('"') else given
    except InvalidJson:
        return given
    found = from_json_text(inner)
    return given if isinstance(found, str) else found


def parse_tools(value: object, column: str, where: str) -> list[Any] | None:
    """A list of tools or of documents, or JSON text of one.

    Raises:
        DatasetError: it is neither.
    """
    if isinstance(value, str):
        try:
            value = load_json(value) if value.strip() else None
        except InvalidJson as error:
            raise DatasetError(f'{where}: "{column}" is text but not valid JSON ({error.reason}).') from error
    if value is not None and not isinstance(value, list):
        raise DatasetError(f'{where}: "{column}" is {kind(value)}; it must be a list, or JSON text of one.')
    # An item may be JSON text too: columns of one type hold tools of any shape.
    return [without_nulls(from_json_text(item)) for item in value] if value else None


def is_empty(message: Message) -> bool:
    """Whether a message has neither text nor tool calls."""
    return not message["content"].strip() and not message.get("tool_calls")


def same_message(mine: Message, theirs: Message) -> bool:
    """Whether two messages have the same content, ignoring metadata such as scores and ids."""
    return (mine["role"], mine["content"], mine.get("tool_calls")) == (
        theirs["role"],
        theirs["content"],
        theirs.get("tool_calls"),
    )


def names(given: Collection[str]) -> str:
    """Sorted names, for an error; those that are empty or have blanks around them in quotes."""
    shown = (name if name and name == name.strip() else repr(name) for name in sorted(given))
    return brief(", ".join(shown) or "nothing")


def kind(value: object) -> str:
    """Description of a value's type, for an error."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence):
        return "a list"
    return f"the {type(value).__name__} {value!r}" if isinstance(value, (bool, int, float)) else "not text"
