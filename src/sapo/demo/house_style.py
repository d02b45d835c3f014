"""Help-desk conversations of a made-up shop, and the house style of its answers, which a program can check.

A question names an order, often the customer, and one concern. Its answer has

    Hello Mira,                                     the customer's name, where the question gives one
    The shade leaves our workshop on Monday. Your ticket is LK-4821.
    Warm regards, Larkspur Lamps                    always the last line

with one to three sentences between, the order number as a ticket in this form, named once, and no list. Questions
and answers are put together from parts by a seeded generator; a question wording belongs either to training or to
evaluation.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, Final

from sapo.demo.shop_texts import (
    BACKGROUNDS,
    NAMES,
    OPENINGS,
    ORDERS,
    PRODUCTS,
    SIGNATURES,
    TICKETS,
    TOPICS,
    UNSEEN_TOPICS,
)

__all__ = ["RULES", "HelpDeskRow", "broken_rules", "heldout_rows", "training_rows"]

CLOSING: Final = "Warm regards, Larkspur Lamps"
RULES: Final = ("greeting", "at most three sentences", "ticket number", "closing line", "no list")
"""What `broken_rules` checks, in its order."""

TRAINING_ROWS: Final = 400
_HELDOUT_WORDINGS: Final = 1
"""Wordings at the end of each topic's questions that only evaluation uses."""

_LIST_ITEM: Final = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_SENTENCE: Final = re.compile(r"[^.!?]*[^.!?\s][^.!?]*(?:[.!?]+(?=\s|$)|$|[.!?]+)")


@dataclass(frozen=True, slots=True)
class HelpDeskRow:
    """One question with an answer in house style.

    Attributes:
        question: the customer's message.
        answer: in house style.
        order: the order number in it, four digits.
        name: the customer's name; None if the question gives none.
        topic: what it is about.
    """

    question: str
    answer: str
    order: str
    name: str | None
    topic: str

    def messages(self) -> list[dict[str, str]]:
        """The row as a conversation."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]

    def as_row(self) -> dict[str, Any]:
        """The row as training data."""
        return {"messages": self.messages()}


def training_rows(count: int = TRAINING_ROWS, *, seed: int = 0) -> list[HelpDeskRow]:
    """`count` conversations with distinct questions; a longer list begins with the shorter one."""
    return _rows(count, list(TOPICS), slice(None, -_HELDOUT_WORDINGS), random.Random(f"larkspur training {seed}"))


def heldout_rows(count: int = 60, *, seed: int = 0) -> list[HelpDeskRow]:
    """`count` conversations of which training has neither the wording nor, for one in three, the topic.

    The order is mixed, so that a shorter list has topics of both kinds too.
    """
    rng = random.Random(f"larkspur held out {seed}")
    unseen = _rows(-(-count // 3), list(UNSEEN_TOPICS), slice(None), rng)
    seen = _rows(count - count // 3, list(TOPICS), slice(-_HELDOUT_WORDINGS, None), rng)
    mixed = [row for place in range(0, len(seen), 2) for row in (*seen[place : place + 2], *unseen[place // 2 :][:1])]
    return mixed[:count]


def broken_rules(row: HelpDeskRow, text: str) -> set[str]:
    """The rules of `RULES` that `text` breaks as an answer to `row`; white space at its ends does not count."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    broken = set()
    greeting = "Hello," if row.name is None else f"Hello {row.name},"
    if lines[:1] != [greeting]:
        broken.add("greeting")
    if lines[-1:] != [CLOSING]:
        broken.add("closing line")
    body = [line for line in lines if line not in (greeting, CLOSING)]
    sentences = [one for line in body for one in _SENTENCE.findall(line)]
    if not 1 <= len(sentences) <= 3:
        broken.add("at most three sentences")
    if re.findall(r"\bLK-\w+", text) != [f"LK-{row.order}"]:
        broken.add("ticket number")
    if _LIST_ITEM.search(text):
        broken.add("no list")
    return broken


def _rows(count: int, topics: list[str], wordings: slice, rng: random.Random) -> list[HelpDeskRow]:
    rows: list[HelpDeskRow] = []
    seen: set[str] = set()
    while len(rows) < count:
        row = _row(topics[len(rows) % len(topics)], wordings, rng)
        if row.question not in seen:
            seen.add(row.question)
            rows.append(row)
    # Not topic after topic: the first rows of any number hold most topics in any order.
    rng.shuffle(rows)
    return rows


def _row(topic: str, wordings: slice, rng: random.Random) -> HelpDeskRow:
    texts = (TOPICS | UNSEEN_TOPICS)[topic]
    product, order = rng.choice(PRODUCTS), f"{rng.randint(1000, 9999)}"
    name = rng.choice(NAMES) if rng.random() < 0.7 else None
    core = rng.choice(texts.questions[wordings]).format(product=product)
    parts = [core]
    if rng.random() < 0.5:
        parts.insert(0, rng.choice(OPENINGS))
    parts.insert(rng.randint(max(0, len(parts) - 1), len(parts)), rng.choice(ORDERS).format(order=order))
    for background in rng.sample(BACKGROUNDS, rng.choice((0, 0, 0, 1, 1, 2))):
        parts.insert(rng.randint(0, len(parts)), background)
    if name is not None:
        parts.append(rng.choice(SIGNATURES).format(name=name))
    said = [rng.choice(texts.answers).format(product=product)]
    if rng.random() < 0.6:
        said.append(rng.choice(texts.more).format(product=product))
    said.append(rng.choice(TICKETS).format(ticket=f"LK-{order}"))
    greeting = "Hello," if name is None else f"Hello {name},"
    return HelpDeskRow(" ".join(parts), "\n".join((greeting, " ".join(said), CLOSING)), order, name, topic)
