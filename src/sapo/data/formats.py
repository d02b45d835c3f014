"""Rows of any supported shape -> one conversation, or one piece of plain text, with the reply to train on.

Pure Python on dictionaries: no tokenizer, no files. A malformed row is a `DatasetError` that names the
row; a well-formed row without anything to train on (an empty reply) becomes a `Dropped`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeAlias

from sapo.data import preferences
from sapo.data.columns import ColumnUse, Fields
from sapo.data.files import Unreadable
from sapo.data.marks import honoured, untrained_mark
from sapo.data.messages import (
    Conversation,
    Dropped,
    PlainText,
    from_stored,
    names,
    parse_messages,
)
from sapo.data.prompts import BASES, REPLIES, conversation, flat, with_system
from sapo.data.transcripts import last_reply
from sapo.errors import DatasetError

Row: TypeAlias = Mapping[str, Any]
Format: TypeAlias = str
"""Row format of a dataset: `messages`, `conversations`, `chosen`, `prompt/completion`, `alpaca` and others."""

ACCEPTED = (
    "messages; prompt + completion (or response); prompt, question, instruction or conversations + chosen "
    "(+ rejected); conversations (ShareGPT); instruction (+ input) + output (Alpaca); question + answer; real + "
    "generated (SPIN); instruction + completions (UltraFeedback); text (with role markers)"
)

_TALKS = ("messages", "conversations", "conversation", "dialogue", "dialog")
_PAIRS = {"chosen": ("chosen", "rejected"), "real/generated": ("real", "generated")}
_PAIRS["preferred_output"] = ("preferred_output", "non_preferred_output")
_NAMED = {"instruction/output": "alpaca"}
_SEARCHED = 100


def format_of(rows: Iterable[Row], *, paired: bool, source: str) -> tuple[Format, list[Row]]:
    """The format of the first row that has one, and the rows read until then.

    Args:
        rows: read no further than needed; the first may lack a value, or be `Unreadable`.
        paired: see `detect_format`.
        source: name of the dataset in messages.

    Raises:
        DatasetError: what is wrong with the first row, if none of the first 100 has a format; or there are no rows.
    """
    head: list[Row] = []
    problem: DatasetError | None = None
    for row in islice(rows, _SEARCHED):
        head.append(row)
        try:
            if isinstance(row, Unreadable):
                raise row.error
            if not isinstance(row, Mapping):
                raise DatasetError(
                    f"row {len(head)} of {source}: is of type {type(row).__name__}, and a row is a dict of columns by "
                    "name. Pass a datasets.Dataset or a list of dicts."
                )
            return detect_format(row, paired=paired, source=source), head
        except DatasetError as error:
            problem = problem or error
    raise problem or DatasetError(f"{source}: has no rows. Use another dataset or split.")


def detect_format(row: Row, *, paired: bool, source: str) -> Format:
    """Detect the format of a dataset from the columns of one row; a column with None counts as absent.

    Preference datasets often have `messages` as well as `chosen`, with the same conversation; `messages` is used unless
    `paired`.

    Raises:
        DatasetError: no format fits, or `paired` and the row lacks chosen or rejected.
    """
    columns = {name for name, value in without_nan(row).items() if value is not None}
    base = next((name for name in BASES if name in columns), None)
    if paired:
        for name, sides in _PAIRS.items():
            if columns.issuperset(sides):
                return name
        if base and "completions" in columns:
            return "completions"
        raise DatasetError(
            f"{source}: has the columns {names(columns)}, but training on pairs requires chosen and rejected "
            "(and prompt, unless both repeat it). Use paired rows, or let the model generate the rejected side."
        )
    if "messages" in columns and not ("chosen" in columns and preferences.is_prompt(row["messages"])):
        return "messages"
    for name, (chosen, _) in _PAIRS.items():
        if chosen in columns and (chosen != "real" or not isinstance(row["real"], str) or "generated" in columns):
            return name
    if columns.issuperset(("prompt", "completion")):
        return "prompt/completion"
    for name in _TALKS:
        if name in columns:
            return name
    if base and "completions" in columns:
        return "completions"
    for base in BASES:
        for reply in REPLIES:
            if {base, reply} <= columns:
                return _NAMED.get(f"{base}/{reply}", f"{base}/{reply}")
    if "text" in columns:
        return "text"
    listed = next((name for name, value in row.items() if _is_rows(value)), None)
    hint = "" if listed is None else f' If {listed!r} lists the rows, rename it to "data".'
    for column in sorted(columns):
        for meant in difflib.get_close_matches(column, {"messages", "chosen", *BASES, *REPLIES}, n=1, cutoff=0.8):
            hint += f' Is "{column}" meant to be "{meant}"?' if meant not in columns else ""
    raise DatasetError(
        f"{source}: unknown format: the first row has the columns {names(columns)}. "
        f"Accepted are {ACCEPTED}; rename the columns to one of these.{hint}"
    )


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def parse_row(
    row: Row,
    row_format: Format,
    *,
    paired: bool,
    chat: bool,
    where: str,
    use: ColumnUse | None = None,
    note: Callable[[str], None] = lambda what: None,
) -> Conversation | PlainText | Dropped:
    """Parse one row.

    Args:
        row: columns and values.
        row_format: from `detect_format`.
        paired: read the rejected reply too.
        chat: convert question and answer to a conversation (the tokenizer has a chat template).
        where: names the row in errors, such as "row 17 of train.jsonl".
        use: counts unused columns.
        note: called with what a person should know of a row that is kept.

    Raises:
        DatasetError: the row has another format, its messages are malformed, or a column that belongs to the prompt
            would be ignored.
    """
    row = without_nan(row)
    needed = _needed(row_format, paired=paired)
    missing = [name for name in needed if row.get(name) is None]
    if missing:
        return _incomplete(row, missing, row_format, paired=paired, where=where)
    mark = untrained_mark(row)
    if mark is not None:
        return Dropped(mark)
    fields = Fields(row, where, note)
    fields.used |= honoured(row)
    parsed = _parse(fields, row_format, paired=paired, chat=chat, use=use)
    if not isinstance(parsed, Dropped):
        if row_format in _PAIRS or "chosen" in row:
            preferences.compare_scores(fields)
        known = {"rejected", "generated", "non_preferred_output"}
        fields.account(row_format, parsed, use, known)
    return parsed


def without_nan(row: Row) -> Row:
    """The row with None for NaN, which pandas writes for missing text."""
    if any(value != value for value in row.values() if isinstance(value, float)):
        return {name: None if isinstance(value, float) and value != value else value for name, value in row.items()}
    return row


def _needed(row_format: Format, *, paired: bool) -> tuple[str, ...]:
    if row_format in _PAIRS:
        return _PAIRS[row_format] if paired else _PAIRS[row_format][:1]
    if row_format == "completions":
        return ("completions",)
    return ("instruction", "output") if row_format == "alpaca" else tuple(row_format.split("/"))


def _incomplete(row: Row, missing: list[str], row_format: Format, *, paired: bool, where: str) -> Dropped:
    """A row with a null column, as in a database export: dropped like one with empty text.

    A row without the column, or with another format's columns, is an error.
    """
    other = ""
    try:
        other = detect_format(row, paired=paired, source=where)
    except DatasetError:
        if all(name in row for name in missing):
            return Dropped(f"no {names(missing)}")
    present = {name for name, value in row.items() if value is not None}
    raise DatasetError(
        f"{where}: lacks {names(missing)}, which other rows have; it has {names(present)}"
        f"{f', the format {other}' if other else ''}. A dataset has one format, here {row_format}: complete the row or "
        "remove it."
    )


def _parse(
    fields: Fields, row_format: Format, *, paired: bool, chat: bool, use: ColumnUse | None
) -> Conversation | PlainText | Dropped:
    if row_format in _TALKS:
        messages = parse_messages(fields.get(row_format), row_format, fields.where)
        return conversation(with_system(messages, fields), fields, row_format)
    if row_format in _PAIRS:
        return preferences.pair(fields, *_PAIRS[row_format], paired=paired, chat=chat)
    if row_format == "completions":
        return preferences.rated(fields, paired=paired, chat=chat, use=use)
    if row_format == "text":
        return _transcript(fields)
    base, reply = _needed(row_format, paired=paired)
    if all(isinstance(from_stored(fields.peek(name)), str) for name in (base, reply)):
        return flat(fields, base, fields.get(reply), None, chat=chat, plain=row_format == "prompt/completion")
    if base != "prompt":
        # A prompt is text or messages; a question is text.
        for name in (base, reply):
            preferences.text_of(fields, name)
    return preferences.prompt_and_reply(fields, base, reply, fields.get(reply), None)


def _transcript(fields: Fields) -> PlainText | Dropped:
    text = preferences.text_of(fields, "text")
    start = last_reply(text)
    if start is None:
        raise DatasetError(
            f'{fields.where}: "text" contains no role marker (such as <|im_start|>assistant, [/INST] or "Assistant:"), '
            "so the start of the reply is unknown. Use the columns prompt and completion, or messages."
        )
    if not text[start:].strip():
        return Dropped("empty reply")
    return PlainText(text[:start], text[start:])
