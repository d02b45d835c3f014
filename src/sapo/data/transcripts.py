"""Find the start of the last reply in a conversation stored as one text, by its role markers."""

from __future__ import annotations

import re

_HEADER = r"(?::(?:[ \t]*\n)?|[ \t]*(?:\n|$))"
"""What follows the word of a role: a colon or the end of the line. A space before a reply belongs to the reply."""

_FAMILIES = tuple(
    (re.compile(assistant), re.compile(other))
    for assistant, other in (
        (r"<\|im_start\|>assistant\n", r"<\|im_start\|>(?!assistant)\w+"),
        (
            r"<\|start_header_id\|>assistant<\|end_header_id\|>\n{0,2}",
            r"<\|start_header_id\|>(?!assistant)\w+<\|end_header_id\|>",
        ),
        (r"\[/INST\]", r"\[INST\]"),
        (r"<start_of_turn>model\n", r"<start_of_turn>(?!model)\w+"),
        (r"<\|assistant\|>\n?", r"<\|(?:user|system|observation|tool)\|>"),
        (r"<[|\uff5c]Assistant[|\uff5c]>", r"<[|\uff5c]User[|\uff5c]>"),
        (r"<\|CHATBOT_TOKEN\|>", r"<\|(?:USER|SYSTEM)_TOKEN\|>"),
        (
            # In Guanaco a turn may begin on the line of another. A heading goes on after the word, or has other hashes.
            rf"(?:^|\n)### ?(?:Response|Assistant|Output|Answer){_HEADER}|### (?:Assistant|Response):(?:[ \t]*\n)?",
            rf"(?:^|\n)### ?(?:Instruction|Input|Human|User|System|Question){_HEADER}|### (?:Human|User|Instruction):",
        ),
        (
            rf"(?:^|\n)## ?(?:Response|Assistant|Output|Answer){_HEADER}",
            rf"(?:^|\n)## ?(?:Instruction|Input|Human|User|System|Question){_HEADER}",
        ),
        (r"\bASSISTANT:", r"\b(?:USER|HUMAN|SYSTEM):"),
        (r"\n\nAssistant:", r"\n\nHuman:"),  # hh-rlhf, where a reply may quote a dialogue without blank lines
        (r"(?:^|\n)(?:[Aa]ssistant|GPT|gpt|AI|Bot|bot):", r"(?:^|\n)(?:[Hh]uman|[Uu]ser|[Ss]ystem):"),
        (r"(?:^|\n)Output:", r"(?:^|\n)(?:Instruct|Input):"),
        (r"(?:^|\n)(?:Answer|A):", r"(?:^|\n)(?:Question|Q):"),
    )
)


_SPECIAL = 7
"""Families whose markers are tokens of a chat template, which nobody types; they come first."""


def is_rendered(prompt: str) -> bool:
    """Whether a prompt ends with the header that a chat template opens a reply with."""
    text = prompt.rstrip()
    ends = (match.end() for family in _FAMILIES[:_SPECIAL] for match in family[0].finditer(prompt))
    return any(end >= len(text) for end in ends)


def last_reply(text: str) -> int | None:
    """Position at which the last reply begins: the end of its role marker.

    Only markers of the family that appears first count: a reply may quote other markers.

    Returns:
        The index in `text`; its length if the conversation ends with another role; None if no marker opens a reply.
    """
    found = [(match.start(), order) for order, family in enumerate(_FAMILIES) for match in _first(family, text)]
    for _, order in sorted(found):
        assistant, other = _FAMILIES[order]
        opened = [match.end() for match in assistant.finditer(text)]
        if opened:
            rest = other.search(text, opened[-1])
            return opened[-1] if rest is None else len(text)
        if order < _SPECIAL:
            return None
    return None


def _first(family: tuple[re.Pattern[str], re.Pattern[str]], text: str) -> list[re.Match[str]]:
    return [match for match in (pattern.search(text) for pattern in family) if match is not None]


def shared_text(chosen: str, rejected: str) -> int:
    """Length of the prompt that two texts share, moved back to white space so that no word is split."""
    cut = 0
    for mine, theirs in zip(chosen, rejected, strict=False):
        if mine != theirs:
            break
        cut += 1
    while cut and not (cut < len(chosen) and chosen[cut].isspace()):
        cut -= 1
    return cut
