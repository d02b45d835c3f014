"""Prompts alone: what a model is asked, without a reply to train on; from rows, or shipped with the package."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sapo.data.columns import belongs_to_prompt
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.formats import parse_row, without_nan
from sapo.data.messages import Dropped, Message, PlainText, from_stored, parse_messages
from sapo.data.prepare import prepare_dataset
from sapo.data.prompts import BASES
from sapo.errors import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "."
"""Stands for the missing reply while a row is encoded."""
_TALKS = ("messages", "conversations", "conversation", "prompt")


def unanswered(rows: Iterable[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Rows with a placeholder for the reply: all with `messages`, or all with `instruction` and `output`.

    Args:
        rows: with or without replies, which are left out: messages in any spelling, or a text column such as `prompt`
            or `instruction`, with the columns that belong to it, such as `system`.
        source: name of the rows in messages.

    Raises:
        DatasetError: a row without a prompt, or with a column that belongs to it and is not kept, such as `tools`.
    """
    asked = [_unanswered(row, f"row {number} of {source}") for number, row in enumerate(rows, 1)]
    return asked if len({*map(tuple, asked)}) < 2 else [_as_messages(row) for row in asked]


def _unanswered(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = {name: value for name, value in without_nan(row).items() if belongs_to_prompt(name)}
    messages: list[Message] = []
    for name in _TALKS:
        if given.get(name) and not isinstance(from_stored(given[name]), str):
            messages = parse_messages(given.pop(name), name, where)
            break
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if messages:
        given["messages"] = [*messages, {"role": "assistant", "content": _PLACEHOLDER}]
        layout = "messages"
    else:
        base = next((name for name in BASES if isinstance(given.get(name), str) and given[name].strip()), None)
        if base is None:
            raise DatasetError(f"{where}: has no prompt. Give messages, or text in one of {', '.join(BASES)}.")
        given["response"] = _PLACEHOLDER
        layout = f"{base}/response"
    parsed = parse_row(given, layout, paired=False, chat=True, where=where)
    if isinstance(parsed, Dropped):
        raise DatasetError(f"{where}: cannot be asked: {parsed.reason}. Fix the row, or remove it.")
    if isinstance(parsed, PlainText):
        return {"instruction": parsed.prompt, "output": _PLACEHOLDER}
    if parsed.tools or parsed.documents or parsed.template_options:
        raise DatasetError(
            f"{where}: has tools, documents or chat_template_kwargs, which are not kept. Remove these columns."
        )
    if layout != "messages" and len(parsed.messages) == 2:
        return {"instruction": parsed.messages[0]["content"], "output": _PLACEHOLDER}
    return {"messages": list(parsed.messages)}


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        return row
    asked = {"role": "user", "content": row["instruction"]}
    return {"messages": [asked, {"role": "assistant", "content": row["output"]}]}


def encode_prompts(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    eos_ids: Collection[int],
    source: str,
) -> tuple[list[dict[str, Any]], list[tuple[int, ...]]]:
    """The rows with a placeholder reply, and their prompts as token ids, as training makes them; too long ones go.

    Args:
        rows: see `unanswered`.
        tokenizer: with or without a chat template.
        options: lengths, and the date of the chat template.
        eos_ids: see `eos_token_ids`.
        source: name of the rows in messages.
    """
    asked = unanswered(rows, source)
    options = replace(
        options, paired=False, opponent_system_prompt=None, max_length_policy="drop", assistant_turns="last"
    )
    prepared, _ = prepare_dataset(asked, tokenizer, options, eos_ids=eos_ids, source=source)
    examples = collate_examples(list(prepared))["examples"]
    return [asked[one.row] for one in examples], [one.turns[-1].prompt_ids for one in examples]


@dataclass(frozen=True, slots=True)
class ShippedPrompt:
    """A shipped prompt and its kind, such as "arithmetic"."""

    kind: str
    text: str


@cache
def shipped_prompts(name: str = "general") -> tuple[ShippedPrompt, ...]:
    """The prompts of `shipped/NAME.tsv`: `general` to measure with, `replay` for self-replay; no text is in both."""
    text = (files("sapo.data") / "shipped" / f"{name}.tsv").read_text(encoding="utf-8")
    return tuple(ShippedPrompt(*line.split("\t")) for line in text.splitlines())


def general_prompts(
    tokenizer: Any, eos_ids: Collection[int], options: DataOptions, name: str = "general"
) -> list[tuple[int, ...]]:
    """`shipped_prompts(name)` as token ids, each as the training data's prompts are made; too long ones are left out.

    Args:
        tokenizer: with or without a chat template.
        eos_ids: EOS tokens.
        options: lengths, and the date of the chat template.
        name: of the prompts.
    """
    rows = [{"instruction": prompt.text} for prompt in shipped_prompts(name)]
    return encode_prompts(rows, tokenizer, options, eos_ids=eos_ids, source=f"{name} prompts")[1]
