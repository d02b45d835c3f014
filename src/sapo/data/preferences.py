"""Preference rows: a chosen and a rejected reply, with the prompt in its own column or in both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sapo.data.columns import ColumnUse, Fields, plain_name
from sapo.data.marks import untrained_mark
from sapo.data.messages import (
    Conversation,
    Dropped,
    Message,
    PlainText,
    from_json_text,
    from_stored,
    is_empty,
    kind,
    known_role,
    parse_messages,
    same_message,
)
from sapo.data.prompts import AFTER_LAST, BASES, conversation, flat, with_system, wrong_end
from sapo.data.transcripts import last_reply, shared_text
from sapo.errors import DatasetError

_PROMPTS = ("prompt", "messages", "conversations", "conversation", *BASES[1:])
_SCORES = ("overall_score", "score", "rating", "fine-grained_score")
_SCORE = frozenset({"score", "scores", "rating", "ratings", "reward", "rewards"})
_DIFFERENCE = frozenset({"margin", "difference", "diff", "delta", "gap"})
_QUALIFIERS = frozenset({"overall", "average", "avg", "mean", "total", "final", "rm", "model", "judge"})
"""Words in names of scores. One of an aspect, such as brevity, may well be lower for the better reply."""
RATED_LOWER = "warning: the chosen reply is rated lower than the rejected one"
_REPLY_KEYS = ("response", "completion", "content", "text")


def is_prompt(value: object) -> bool:
    """Whether messages end before a reply, so that they are a prompt, not a complete conversation."""
    value = from_stored(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value or not isinstance(value[-1], Mapping):
        return False
    return known_role(value[-1].get("role", value[-1].get("from"))) not in (None, "assistant")


def text_of(fields: Fields, name: str) -> str:
    """The text of a column.

    Raises:
        DatasetError: the column does not contain text.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        raise DatasetError(f'{fields.where}: "{name}" is {kind(value)}; it must be text.')
    return value


def pair(
    fields: Fields, chosen_name: str, rejected_name: str, *, paired: bool, chat: bool
) -> Conversation | PlainText | Dropped:
    """A row with a chosen and a rejected reply, and the prompt in both or in its own column.

    Raises:
        DatasetError: a reply is not text.
    """
    chosen = from_stored(fields.get(chosen_name))
    worse = from_stored(fields.peek(rejected_name))
    rejected = from_stored(fields.get(rejected_name)) if paired else None
    base = next((name for name in _PROMPTS if _holds_prompt(fields.peek(name), name)), None)
    if base is None and fields.peek("prompt") is not None:
        base = "prompt"
    if base is None:
        return _with_prompt(fields, chosen_name, chosen, worse, rejected)
    if not isinstance(from_stored(fields.peek(base)), str) or not isinstance(chosen, str):
        return prompt_and_reply(fields, base, chosen_name, chosen, rejected)
    prompt = fields.peek(base)
    if rejected is not None and not isinstance(rejected, str):
        raise DatasetError(f'{fields.where}: "{rejected_name}" is {kind(rejected)}; it must be text.')
    if prompt.strip() and chosen.startswith(prompt) and isinstance(worse, str) and worse.startswith(prompt):
        # Both sides repeat the prompt.
        chosen = chosen[len(prompt) :]
        rejected = None if rejected is None else rejected[len(prompt) :]
    return flat(fields, base, chosen, rejected, chat=chat, plain=base == "prompt")


def _holds_prompt(value: object, name: str) -> bool:
    if name in BASES and isinstance(value, str):
        return name == "prompt" or bool(value.strip())
    if name == "input" and isinstance(value, Mapping):
        return is_prompt(value.get("messages"))
    return is_prompt(value) or (name == "prompt" and value is not None)


def _with_prompt(
    fields: Fields, name: str, chosen: object, worse: object, rejected: object
) -> Conversation | PlainText | Dropped:
    """Both sides include the prompt."""
    if isinstance(chosen, str):
        cut = last_reply(chosen)
        other = last_reply(worse) if isinstance(worse, str) else None
        if cut is None or (isinstance(worse, str) and other is None):
            if not isinstance(worse, str):
                raise DatasetError(
                    f"{fields.where}: {name} is text, and without a prompt column or a rejected text the end of "
                    "the prompt is unknown. Add a prompt column."
                )
            cut = other = shared_text(chosen, worse)
        if rejected is None:
            return _plain(chosen[:cut], chosen[cut:], None)
        if not isinstance(worse, str) or chosen[:cut] != worse[:other]:
            return Dropped("chosen and rejected differ before the last reply")
        return _plain(chosen[:cut], chosen[cut:], worse[other:])
    messages = with_system(parse_messages(chosen, name, fields.where), fields)
    other_side = None
    if rejected is not None:
        other_side = with_system(parse_messages(rejected, "rejected", fields.where), fields)
    return _paired(messages, other_side, fields, 0, name)


def prompt_and_reply(
    fields: Fields, base: str, column: str, reply: object, rejected: object
) -> Conversation | PlainText | Dropped:
    """A prompt column and a reply column, at least one of them with messages."""
    prompt = from_stored(fields.peek(base))
    if base == "input" and isinstance(prompt, Mapping):
        fields.used.add(base)
        inner = Fields({**fields.row, "tools": prompt.get("tools") or fields.peek("tools")}, fields.where, fields.note)
        inner.used = fields.used
        fields, prompt = inner, prompt["messages"]
    reply = from_stored(reply)
    rejected = from_stored(rejected)
    stated = not isinstance(prompt, str)
    if isinstance(reply, str):
        reply = [{"role": "assistant", "content": reply}]
    messages = parse_messages(reply, column, fields.where)
    if stated:
        opening = parse_messages(prompt, base, fields.where)
        fields.used.add(base)
        messages, first = _merged(opening, messages)
    else:
        opening = [{"role": "user", "content": prompt}]
        # A reply that starts with another role is the full conversation. If the prompt column does not repeat part of
        # it, that column stays unused and the row is refused.
        first = 0
        if messages[0]["role"] == "assistant":
            fields.used.add(base)
            messages = [*opening, *messages]
        else:
            opening = messages[:-1]
    other = None
    if rejected is not None:
        other = _rejected_side(rejected, opening, messages, fields)
    before = len(messages)
    messages = with_system(messages, fields)
    other = None if other is None else with_system(other, fields)
    return _paired(messages, other, fields, first + (len(messages) - before if first else 0), column)


def _merged(opening: list[Message], messages: list[Message]) -> tuple[list[Message], int]:
    """Prompt and reply as one conversation, and the reply's index; the reply may repeat all or part of the prompt."""
    size = len(opening)
    for start in range(len(messages) - size):
        if all(map(same_message, messages[start:], opening)):
            return messages, start + size
    for shared in range(min(size, len(messages) - 1), 0, -1):
        if all(map(same_message, opening[-shared:], messages)):
            return [*opening[:-shared], *messages], size
    return [*opening, *messages], size


def _rejected_side(rejected: object, opening: list[Message], messages: list[Message], fields: Fields) -> list[Message]:
    """The full rejected conversation; `rejected` is all of it, the part after the prompt, or only the reply."""
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    other = parse_messages(rejected, "rejected", fields.where)
    if other[0]["role"] == "assistant":
        return [*messages[:-1], *other] if len(other) == 1 else [*opening, *other]
    return _merged(opening, other)[0] if len(other) > 1 else other


def _paired(
    messages: list[Message], other: list[Message] | None, fields: Fields, first: int, column: str
) -> Conversation | Dropped:
    made = conversation(messages, fields, column, first=first)
    if other is None or isinstance(made, Dropped):
        return made
    size = len(made.messages)
    ends = [place for place, message in enumerate(other, 1) if message["role"] == "assistant"]
    if not ends:
        raise wrong_end("rejected", other[-1]["role"], fields.where)
    if ends[-1] < len(other) and size == len(messages):
        fields.note(AFTER_LAST)
    other = other[: ends[-1]]
    if len(other) != size or not all(map(same_message, other, made.messages[:-1])):
        return Dropped("chosen and rejected differ before the last reply")
    if is_empty(other[-1]):
        return Dropped("empty rejected reply")
    mark = untrained_mark(other[-1])
    if mark is not None:
        return Dropped(f"rejected reply {mark}")
    return Conversation(
        made.messages, first, other[-1], made.tools, made.documents, made.template_options, made.untrained
    )


def _plain(prompt: str, completion: str, rejected: str | None) -> PlainText | Dropped:
    if not completion.strip():
        return Dropped("empty reply")
    if rejected is not None and not rejected.strip():
        return Dropped("empty rejected reply")
    return PlainText(prompt, completion, rejected)


def rated(fields: Fields, *, paired: bool, chat: bool, use: ColumnUse | None) -> Conversation | PlainText | Dropped:
    """A prompt with several rated replies, as in UltraFeedback: the best is chosen, the worst rejected.

    Raises:
        DatasetError: the replies are malformed or have no ratings.
    """
    replies = from_json_text(fields.get("completions"))
    if not isinstance(replies, Sequence) or isinstance(replies, str):
        raise DatasetError(f'{fields.where}: "completions" is {kind(replies)}; it must be a list of rated replies.')
    texts = [_reply_text(reply, number, fields.where) for number, reply in enumerate(replies, 1)]
    base = next((name for name in BASES if isinstance(fields.peek(name), str)), None)
    if base is None:
        raise DatasetError(f"{fields.where}: completions need a prompt or instruction column with text. Add it.")
    if not texts:
        return Dropped("no completions")
    given = [name for name in _SCORES if any(name in reply for reply in replies)]
    if not given:
        raise DatasetError(
            f'{fields.where}: "completions" have no {" or ".join(_SCORES[:3])}, so the best reply is unknown. Add the '
            "scores, or use prompt, chosen and rejected."
        )
    # Two kinds of scores are two scales, so all replies need the same one.
    scales = ([_number(reply.get(name)) for reply in replies] for name in given)
    scores = next((scale for scale in scales if not any(map(math.isnan, scale))), None)
    if scores is None:
        return Dropped("a completion without a score")
    found = list(zip(scores, texts, strict=True))
    best, worst = max(found, key=lambda pair: pair[0]), min(found, key=lambda pair: pair[0])
    if paired and best[0] == worst[0]:
        return Dropped("chosen and rejected have the same score")
    if use is not None and len(found) > (2 if paired else 1):
        use.note(f"completions (all but the best{' and the worst' if paired else ''})")
    return flat(fields, base, best[1], worst[1] if paired else None, chat=chat, plain=False)


def _reply_text(reply: object, number: int, where: str) -> str:
    text = next((reply[key] or "" for key in _REPLY_KEYS if key in reply), None) if isinstance(reply, Mapping) else None
    if not isinstance(text, str) or not isinstance(reply, Mapping):
        raise DatasetError(
            f'{where}: item {number} of "completions" has no response. Use objects with a response field.'
        )
    return text


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError):
        return math.nan


def compare_scores(fields: Fields) -> None:
    """Note a row whose scores say that the chosen reply is worse than the rejected one; it may have none."""
    given: dict[str, tuple[str, float]] = {}
    for name, value in fields.row.items():
        value = value[-1] if isinstance(value, list) and value else value
        inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
        given |= {plain_name(full): (full, _number(one)) for full, one in inner.items()}
    for plain, (name, score) in given.items():
        words = set(plain.split("_"))
        if words <= _DIFFERENCE | _SCORE | _QUALIFIERS and words & _DIFFERENCE and score < 0:
            fields.note(f"{RATED_LOWER} ({name} < 0)")
            return
        if words <= {"chosen"} | _SCORE | _QUALIFIERS and "chosen" in words and words & _SCORE:
            other, theirs = given.get(plain.replace("chosen", "rejected"), ("", math.nan))
            if score < theirs:
                fields.note(f"{RATED_LOWER} ({name} < {other})")
                return
