"""Chat templates that print the date print one date a run: otherwise the same rows are other data tomorrow."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from sapo.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOCK = "strftime_now"
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the time."""
    template: Any = tokenizer.chat_template
    return any(_CLOCK in text for text in (template.values() if isinstance(template, dict) else [template or ""]))


def parse_date(text: str) -> datetime.date:
    """A date written YYYY-MM-DD.

    Raises:
        ConfigurationError: it is not.
    """
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(f"template_date={text}: not a date. Write it as 2026-01-31.") from error


def dated_template(template: str, date: datetime.date) -> str:
    """The template, with the time standing still at the start of a day.

    A macro takes the place of the function that asks the clock. It knows the directives of `strftime` as texts.
    """
    if _CLOCK not in template:
        return template
    day = datetime.datetime(date.year, date.month, date.day)
    steps = ["replace('%%', '\\0')"]
    for flag in ("-", ""):
        for directive in _DIRECTIVES:
            steps.append(f"replace('%{flag}{directive}', {_literal(day.strftime(f'%{flag}{directive}'))})")
    steps.append("replace('\\0', '%')")
    # The line break after the macro is not printed: the first one after a block never is.
    return f"{{%- macro {_CLOCK}(format) -%}}{{{{ format | {' | '.join(steps)} }}}}{{%- endmacro %}}\n{template}"


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t") + "'"
