"""The text of prepared examples again: what pairs need to be read by other tools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sapo.data.formats import detect_format, parse_row
from sapo.data.messages import Conversation, Dropped, Message, PlainText
from sapo.data.mixture import Member


@dataclass(frozen=True, slots=True)
class PromptTexts:
    """What each row said before its replies, by row number.

    Attributes:
        rows: conversations or plain text, as they were parsed; rows that are not learnt from are absent.
        plain: whether prompts are text; with conversations they are messages.
    """

    rows: dict[int, Conversation | PlainText]
    plain: bool

    def prompt(self, row: int, turn: int) -> str | list[Message] | None:
        """The prompt of a reply, as text or messages; None where the data set is of both kinds and this is text.

        Args:
            row: number of the row in the prepared data set.
            turn: which assistant message of the row, from 0.
        """
        text = self.rows[row]
        if isinstance(text, PlainText):
            return text.prompt if self.plain else None
        places = [place for place, message in enumerate(text.messages) if message["role"] == "assistant"]
        return list(text.messages[: places[turn]])


def prompt_texts(members: Iterable[Member], *, chat: bool) -> PromptTexts:
    """Read the prompts of the rows that `prepare_mixture` prepared, numbered as there.

    Args:
        members: freshly loaded; streams are read from their beginning.
        chat: whether the tokenizer has a chat template.
    """
    rows: dict[int, Conversation | PlainText] = {}
    number = 0
    for member in members:
        layout = None
        for row in member.rows:
            content: dict[str, Any] = row
            layout = layout or detect_format(content, paired=False, source=member.name)
            parsed = parse_row(content, layout, paired=False, chat=chat, where=f"row {number + 1} of {member.name}")
            if not isinstance(parsed, Dropped):
                rows[number] = parsed
            number += 1
    return PromptTexts(rows, plain=all(isinstance(text, PlainText) for text in rows.values()))
