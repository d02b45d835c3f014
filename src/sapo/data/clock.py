"""Fix the date that chat templates print, so that the same rows give the same tokens on any day."""

from __future__ import annotations

import datetime
import logging
from typing import TYPE_CHECKING, Any

from sapo.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CLOCK = "strftime_now"
_DIRECTIVES = "aAbBcCdDeFfgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template prints the current date or time."""
    template: Any = tokenizer.chat_template
    return any(_CLOCK in text for text in (template.values() if isinstance(template, dict) else [template or ""]))


def parse_date(text: str) -> datetime.date:
    """A date written YYYY-MM-DD.

    Raises:
        ConfigurationError: `text` is not a date in this form.
    """
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(f"template_date={text}: not a date. Use the form 2026-01-31.") from error


def forget_idle_date(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Where the chat template prints no date, say that a `template_date` has no effect, and leave it out of the run.

    Args:
        config: of the run; has `template_date`.
        tokenizer: with the chat template of the run.

    Raises:
        ConfigurationError: it is not a date.
    """
    if config.template_date is None or prints_date(tokenizer):
        return
    date = parse_date(config.template_date)
    logger.warning(f"No effect with a chat template that prints no date: template_date={date}.")
    config.template_date = None


def dated_template(template: str, date: datetime.date) -> str:
    """The template with its clock fixed at the start of a day.

    A macro shadows `strftime_now` and replaces each `strftime` directive by its text.
    """
    if _CLOCK not in template:
        return template
    day = datetime.datetime(date.year, date.month, date.day)
    steps = ["replace('%%', '\\0')"]
    for flag in ("-", ""):
        for directive in _DIRECTIVES:
            steps.append(f"replace('%{flag}{directive}', {_literal(day.strftime(f'%{flag}{directive}'))})")
    steps.append("replace('\\0', '%')")
    # Jinja drops the first line break after a block, so the one after the macro is not printed.
    return f"{{%- macro {_CLOCK}(format) -%}}{{{{ format | {' | '.join(steps)} }}}}{{%- endmacro %}}\n{template}"


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t") + "'"
