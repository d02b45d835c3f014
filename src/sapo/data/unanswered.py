"""Prompts alone: what a model is asked, without a reply to train on; from rows, or shipped with the package."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sapo.data.examples import DataOptions, collate_examples
from sapo.data.prepare import prepare_dataset
from sapo.data.prompts import BASES
from sapo.errors import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "."
"""Stands for the missing reply while a row is encoded."""


def unanswered(rows: Iterable[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Rows with a placeholder for the reply: `messages`, or a text column such as `prompt` or `instruction`.

    Args:
        rows: with or without replies, which are left out.
        source: name of the rows in messages.

    Raises:
        DatasetError: a row without a prompt.
    """
    return [_unanswered(row, f"row {number} of {source}") for number, row in enumerate(rows, 1)]


def _unanswered(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    messages = row.get("messages") or row.get("prompt")
    if isinstance(messages, list):
        kept = list(messages)
        while kept and kept[-1]["role"] == "assistant":
            kept.pop()
        if kept:
            return {"messages": [*kept, {"role": "assistant", "content": _PLACEHOLDER}]}
    text = next((row[name] for name in BASES if isinstance(row.get(name), str) and row[name].strip()), None)
    if text is None:
        raise DatasetError(f"{where}: has no prompt. Give messages, or text in one of {', '.join(BASES)}.")
    if row.get("input") and "instruction" in row:
        text = f"{text}\n\n{row['input']}"
    return {"instruction": text, "output": _PLACEHOLDER}


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
    options = replace(options, paired=False, max_length_policy="drop", assistant_turns="last")
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
