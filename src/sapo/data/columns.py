"""Every column of a row is accounted for: used, a repetition of a used column, listed as unused, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sapo.data.messages import Conversation, PlainText, from_json_text, names
from sapo.errors import DatasetError

SYSTEM = ("system", "system_prompt", "system_message", "sys_prompt", "system_instruction")
HISTORY = ("history", "chat_history", "conversation_history")
_PROMPT_COLUMNS = frozenset(
    {
        *SYSTEM,
        *HISTORY,
        *("system_instructions", "developer", "developer_prompt", "dialogue_history", "dialog_history"),
        *("prompt", "prompts", "question", "query", "instruction", "instructions", "input", "inputs"),
        *("context", "contexts", "passage", "passages", "background", "article", "document", "documents"),
        *("choices", "options", "tools", "functions", "available_tools", "tool_definitions", "chat_template_kwargs"),
        *("messages", "conversation", "conversations", "dialog", "dialogue"),
    }
)
_MEDIA = re.compile(r"(?:image|picture|video|audio)s?(?:_(?:path|url|uri|file|bytes|base64|data)s?)?")

_WORDS = 5
"""From this many words on, text in an unused column looks like part of the conversation."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
"""A word; a character of the scripts that put no spaces between words."""

_CHANCE = 16
"""From this many characters on, a text is not contained in another one by chance."""


def belongs_to_prompt(name: str) -> bool:
    """Whether a column of this name, in any spelling, is part of a prompt wherever it occurs."""
    plain = plain_name(name)
    return plain in _PROMPT_COLUMNS or _MEDIA.fullmatch(plain) is not None


def plain_name(name: str) -> str:
    """The name of a column in lower case, its words joined by underscores."""
    return re.sub(r"[-_ .]+|(?<=[a-z0-9])(?=[A-Z])", "_", name.strip()).lower()


@dataclass
class ColumnUse:
    """What was not trained on, over all rows of a dataset.

    Attributes:
        unused: number of rows in which each non-empty column was not read.
        texts: those of them that look like text of the conversation.
    """

    unused: dict[str, int] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    _last: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, *, text: bool = False, where: str = "") -> None:
        """Count a row in which a column, or part of one, is not used; once the row that `where` names."""
        if where and self._last.get(name) == where:
            return
        self._last[name] = where
        self.unused[name] = self.unused.get(name, 0) + 1
        if text:
            self.texts.add(name)

    def add(self, other: ColumnUse) -> None:
        """Count the rows of another part of the dataset."""
        for name, count in other.unused.items():
            self.unused[name] = self.unused.get(name, 0) + count
        self.texts |= other.texts

    def lines(self) -> list[str]:
        """Summary of the unused columns, one line each."""
        names = sorted(name or "(no name)" for name in self.unused)
        lines = [f"columns not used: {', '.join(names)}"] if names else []
        if self.texts:
            lines.append(
                f"warning: {', '.join(sorted(self.texts))} looks like text of the conversation and is not trained on"
            )
        return lines


class Fields:
    """The columns of one row; records which were read.

    Args:
        row: values by column.
        where: names the row in errors.
        note: called with what a person should know of the row.

    Attributes:
        used: columns that became part of the example.
    """

    def __init__(self, row: Mapping[str, Any], where: str, note: Callable[[str], None] = lambda what: None) -> None:
        self.row = row
        self.where = where
        self.note = note
        self.used: set[str] = set()

    def peek(self, name: str) -> Any:
        """A value, without marking its column as used."""
        return self.row.get(name)

    def get(self, name: str) -> Any:
        """A value that becomes part of the example; marks its column as used."""
        self.used.add(name)
        return self.row.get(name)

    def account(
        self, row_format: str, parsed: Conversation | PlainText, use: ColumnUse | None, known: set[str]
    ) -> None:
        """Check the columns that were not read.

        Args:
            row_format: the format of the row.
            parsed: the parsed row.
            use: counts unused columns; None to count nothing.
            known: columns that the format omits on purpose; they are listed without a warning.

        Raises:
            DatasetError: an unused column belongs to the prompt and its text is missing from the prompt.
        """
        left = {name: value for name, value in self.row.items() if name not in self.used and holds(value)}
        if not left:
            return
        said: list[str] | None = None
        lost = []
        for name, value in left.items():
            belongs = belongs_to_prompt(name)
            text = False
            if belongs or (use is not None and name not in known and name not in use.texts):
                said = _said(parsed) if said is None else said
                text = not _repeats(value, said)
                if text and belongs:
                    lost.append(name)
            if use is not None:
                use.note(name, text=text and name not in known and talks(value))
        if lost:
            media = any(_MEDIA.fullmatch(plain_name(name)) for name in lost)
            way_out = (
                "Only text can be trained on: remove these rows."
                if media
                else "Put their text into the prompt, or remove these columns."
            )
            raise DatasetError(
                f"{self.where}: the columns {names(lost)} belong to the prompt, but the format {row_format} does "
                f"not use them. {way_out}"
            )


def holds(value: object) -> bool:
    """Whether a value contains more than nulls, blanks and empty lists."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(holds, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds, value))
    return value is not None


def _said(parsed: Conversation | PlainText) -> list[str]:
    if isinstance(parsed, PlainText):
        return [parsed.prompt.strip(), parsed.completion.strip(), parsed.prompt + parsed.completion]
    return [str(message["content"]).strip() for message in parsed.messages]


def _repeats(value: object, said: list[str]) -> bool:
    """Whether the example already contains all texts of a column; short texts must match completely."""
    found = [text.strip() for text in texts_in(from_json_text(value))]
    return bool(found) and all(
        text in said or (len(text) >= _CHANCE and any(text in other for other in said)) for text in found
    )


def texts_in(value: object) -> Iterator[str]:
    """All texts inside a value; of messages, only the contents."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        keys = next((keys for keys in (("content",), ("value",)) if keys[0] in value), tuple(value))
        for key in keys:
            yield from texts_in(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_in(item)


def talks(value: object) -> bool:
    """Whether a value contains text that looks like part of a conversation."""
    return any(len(_WORD.findall(text)) >= _WORDS for text in texts_in(from_json_text(value)))
