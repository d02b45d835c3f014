"""What a judge's text says, once its reasoning and the rubric that it repeats are left out."""

from __future__ import annotations

import re

_THINKING = r"(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis)"
_MARKS = (
    (rf"<\|?{_THINKING}\|?>", rf"</\|?{_THINKING}\|?>|<\|?/{_THINKING}\|?>"),
    (rf"\[{_THINKING}\]", rf"\[/{_THINKING}\]"),
    (r"<\|begin_of_(?:thought|thinking)\|>", r"<\|end_of_(?:thought|thinking)\|>"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|channel\|>(?:analysis|commentary)<\|message\|>", r"<\|end\|>|<\|channel\|>final<\|message\|>"),
)
"""Opening and closing marks of reasoning, as models write them."""

_NUMBER = r"(\d+(?:\.\d+)?)"
_EMPHASIS = r"[*_`\"'“”]*"
_LABEL = rf"\b(?:rating|score|grade|verdict){_EMPHASIS}\s*[:=]\s*{_EMPHASIS}\s*"
_CRITERION = rf"^\W*(\w[\w -]*?){_EMPHASIS}\s*[:=]\s*{_EMPHASIS}"
_OVERALL = ("overall", "final", "total", "average")
_EXAMPLE = re.compile(
    r"(?:for example|for instance|e\.g\.|such as|format|template|in the form|instructed|\bas in)[^.\n]{0,60}$"
    r"|\b(?:would (?:earn|get|receive|deserve|merit|have)|could have|if (?:it|this|the|only)|had it)\b[^.\n]{0,60}$"
    r"|\bout of\s*$",
    re.IGNORECASE,
)
"""What leads to a rating that is shown and not given."""


def without_thinking(text: str) -> str:
    """`text` without what stands between marks of reasoning.

    A mark that is never closed hides the rest (the judge ran out of tokens while it reasoned); one that is closed and
    never opened hides all before it (the prompt had opened it).
    """
    for opening, closing in _MARKS:
        flags = re.IGNORECASE | re.DOTALL
        text = re.sub(rf"(?:{opening}).*?(?:{closing})", "\n", text, flags=flags)
        *_, text = re.split(closing, text, flags=flags)
        text = re.split(opening, text, maxsplit=1, flags=flags)[0]
    return text


def rating(verdict: str) -> float | None:
    """The rating between 1 and 10 that a verdict gives.

    Given is a number in double brackets after "Rating:" (or score, grade, verdict), alone on a line, or at the end of
    the text; the last one counts. Not given is one within marks of reasoning, or one that is quoted from the rubric
    ("for example: [[5]]", "[[1]] is the worst"), or one of what might have been ("would earn [[10]]"). Single brackets
    count where there are no double ones.

    Returns:
        None if none is given, if it is out of range, if a rating with a label is followed by another without, or if the
        last is only that of one criterion of several ("Style: [[5]]").
    """
    text = without_thinking(verdict)
    return _rating(text, rf"\[\[{_NUMBER}\]\]") if "[[" in text else _rating(text, rf"(?<!\[)\[{_NUMBER}\](?!\])")


def _rating(text: str, form: str) -> float | None:
    labelled = _given(text, rf"{_LABEL}{form}")
    alone = _given(text, rf"(?m:^[ \t>#-]*{_EMPHASIS}{form}{_EMPHASIS}[ \t.]*$)")
    sentence = re.split(r"(?<=[.!?])\s+|\n", text.rstrip())[-1]
    if len(re.findall(form, sentence)) == 1:
        # With two of them it speaks of the scale.
        alone += _given(text, rf"{form}{_EMPHASIS}[\s.!]*\Z")
    if not labelled and not alone:
        return None
    criteria = [label.lower() for label, _ in re.findall(rf"(?m){_CRITERION}{form}", text)]
    if not labelled and len({*criteria}) > 1 and not criteria[-1].startswith(_OVERALL):
        return None
    last = max(labelled or alone)
    if labelled and any(place > last[0] and value != last[1] for place, value in alone):
        return None
    return last[1] if 1 <= last[1] <= 10 else None


def _given(text: str, pattern: str) -> list[tuple[int, float]]:
    """Where each rating of this form ends, and its value; without those that are examples."""
    return [
        (found.end(1), float(found[1]))
        for found in re.finditer(pattern, text, flags=re.IGNORECASE)
        if not _EXAMPLE.search(text[: found.start()])
    ]
