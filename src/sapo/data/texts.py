"""The prompt texts of prepared examples, for exporting pairs to other tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from sapo.data.formats import Row, format_of, parse_row
from sapo.data.messages import Conversation, Dropped, Message, PlainText
from sapo.data.mixture import Member


@dataclass(frozen=True, slots=True)
class PromptTexts:
    """The prompt of each row, by row number.

    Attributes:
        rows: parsed conversations or plain text; dropped rows are absent.
        plain: whether prompts are text; with conversations they are messages.
    """

    rows: dict[int, Conversation | PlainText]
    plain: bool

    def prompt(self, row: int, turn: int) -> str | list[Message] | None:
        """The prompt of a reply, as text or messages; None for text in a dataset that also has conversations.

        Args:
            row: number of the row in the prepared dataset.
            turn: index among the assistant messages of the row.
        """
        text = self.rows[row]
        if isinstance(text, PlainText):
            return text.prompt if self.plain else None
        replies = [i for i, message in enumerate(text.messages) if message["role"] == "assistant"]
        return list(text.messages[: replies[turn]])


def prompt_texts(members: Iterable[Member], *, chat: bool) -> PromptTexts:
    """Read the prompts of the rows that `prepare_mixture` prepared, numbered as there.

    Args:
        members: freshly loaded; streams are read from their beginning.
        chat: whether the tokenizer has a chat template.
    """
    rows: dict[int, Conversation | PlainText] = {}
    number = 0
    for member in members:
        stream: Iterator[Row] = iter(member.rows)
        row_format, head = format_of(stream, paired=False, source=member.name)
        for row in chain(head, stream):
            parsed = parse_row(row, row_format, paired=False, chat=chat, where=f"row {number + 1} of {member.name}")
            if not isinstance(parsed, Dropped):
                rows[number] = parsed
            number += 1
    return PromptTexts(rows, plain=all(isinstance(text, PlainText) for text in rows.values()))
