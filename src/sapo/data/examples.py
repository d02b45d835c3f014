"""`Example`s of `Turn`s for the trainer, the options that shape them, and how they are stored."""

from __future__ import annotations

import datetime
import hashlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from sapo.data.clock import parse_date
from sapo.data.report import DataReport
from sapo.errors import ConfigurationError, DatasetError, TokenizerError

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant reply and its prompt, as token ids.

    Attributes:
        index: index among the assistant messages of the row.
        prompt_ids: everything before the reply, including the header that opens it.
        response_ids: the reply, including its EOS token unless it was truncated.
        rejected_ids: the rejected reply, in paired data only.
        opponent_prompt_ids: the prompt with the opponent's own system message, if it has one.
    """

    index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...] | None = None
    opponent_prompt_ids: tuple[int, ...] | None = None

    @property
    def generation_ids(self) -> tuple[int, ...]:
        """The prompt that the opponent generates from."""
        return self.prompt_ids if self.opponent_prompt_ids is None else self.opponent_prompt_ids

    @property
    def wider_prompt_ids(self) -> tuple[int, ...]:
        """The longer of the two prompts, which leaves the less room for a response."""
        return max(self.prompt_ids, self.generation_ids, key=len)


@dataclass(frozen=True, slots=True)
class Example:
    """One item of the dataloader.

    Attributes:
        row: row of the source dataset, from 0. Seeds derive from it, so it survives shuffling and sharding.
        turns: exactly one, except with `assistant_turns="random"`, where one is drawn each epoch.
    """

    row: int
    turns: tuple[Turn, ...]


class RunOptions(Protocol):
    """The options of `SAPOConfig` that data are prepared with, described there."""

    max_length: int
    max_prompt_length: int | None
    prompt_truncation: Literal["keep_end", "keep_start"]
    max_length_policy: Literal["auto", "truncate", "drop", "error"]
    assistant_turns: Literal["last", "random", "all"]
    pair_source: Any
    opponent_system_prompt: str | None
    template_date: str | None


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How rows become examples.

    Attributes:
        max_length: maximum tokens of prompt plus response.
        max_prompt_length: maximum tokens of the prompt when prompt plus response are too long.
        prompt_truncation: which side of a prompt is kept.
        max_length_policy: truncate turns longer than `max_length`, drop them, or raise an error; `auto` truncates, and
            raises an error if more than half of the turns are too long.
        assistant_turns: train on the last reply, on a random one per epoch, or on all.
        paired: read both the chosen and the rejected reply.
        opponent_system_prompt: the system message of `Turn.opponent_prompt_ids`; None for no such prompt.
        date: the date for chat templates that print one; None for today.
        embeddings: number of embeddings of the model; a token beyond them is refused. None if it is not known.
    """

    max_length: int
    max_prompt_length: int
    prompt_truncation: Literal["keep_end", "keep_start"] = "keep_end"
    max_length_policy: Literal["auto", "truncate", "drop", "error"] = "truncate"
    assistant_turns: Literal["last", "random", "all"] = "last"
    paired: bool = False
    opponent_system_prompt: str | None = None
    date: datetime.date | None = None
    embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2 or self.max_prompt_length < 1:
            raise ConfigurationError(
                f"max_length={self.max_length} and max_prompt_length={self.max_prompt_length} leave no tokens "
                "for a prompt and a response. Set them to at least 2 and 1."
            )
        if self.max_prompt_length > self.max_length:
            raise ConfigurationError(
                f"max_prompt_length={self.max_prompt_length} exceeds max_length={self.max_length}. Lower it, or raise "
                "max_length."
            )

    @classmethod
    def of(cls, config: RunOptions, embeddings: int | None = None) -> DataOptions:
        """The data options of a run's configuration, and the number of embeddings of its model."""
        return cls(
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length or config.max_length,
            prompt_truncation=config.prompt_truncation,
            max_length_policy=config.max_length_policy,
            assistant_turns=config.assistant_turns,
            paired=config.pair_source == "paired",
            opponent_system_prompt=config.opponent_system_prompt,
            date=None if config.template_date is None else parse_date(config.template_date),
            embeddings=embeddings,
        )


class ExampleTable:
    """Prepared turns in flat arrays, which take far less memory than lists of Python integers."""

    NESTED = ("prompt_ids", "response_ids", "rejected_ids", "opponent_prompt_ids")

    def __init__(self, *, paired: bool, join_turns: bool, opponent_prompts: bool = False) -> None:
        self._left_out = {
            *(() if paired else ("rejected_ids",)),
            *(() if opponent_prompts else ("opponent_prompt_ids",)),
        }
        self._join = join_turns
        self._rows = array("q")
        self._turns = array("q")
        self._counts = array("q")
        self._tokens = {name: (array("i"), array("q")) for name in self.NESTED}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: int, turn: Turn) -> None:
        """Store a turn; with `join_turns`, consecutive turns of one row form one example."""
        if self._join and self._rows and self._rows[-1] == row:
            self._counts[-1] += 1
        else:
            self._rows.append(row)
            self._counts.append(1)
        self._turns.append(turn.index)
        for name, (values, lengths) in self._tokens.items():
            ids = getattr(turn, name) or ()
            values.extend(ids)
            lengths.append(len(ids))

    def extend(self, other: ExampleTable) -> None:
        """Store the examples of another table, of other rows."""
        self._rows += other._rows
        self._turns += other._turns
        self._counts += other._counts
        for name, (values, lengths) in self._tokens.items():
            more, their_lengths = other._tokens[name]
            values += more
            lengths += their_lengths

    def dataset(self) -> datasets.Dataset:
        """All examples, in memory: `row`, `turn` and the `NESTED` columns, the last two only if they were asked for."""
        first = _offsets(self._counts)
        columns: dict[str, pyarrow.Array] = {
            "row": pyarrow.array(np.array(self._rows)),
            "turn": pyarrow.ListArray.from_arrays(first, pyarrow.array(np.array(self._turns))),
        }
        for name, (values, lengths) in self._tokens.items():
            if name not in self._left_out:
                tokens = pyarrow.array(np.array(values, dtype=np.int32))
                inner = pyarrow.ListArray.from_arrays(_offsets(lengths), tokens)
                columns[name] = pyarrow.ListArray.from_arrays(first, inner)
        return datasets.Dataset.from_dict(columns)


def _offsets(lengths: array[int]) -> pyarrow.Array:
    offsets = np.concatenate(([0], np.cumsum(np.array(lengths))))
    if offsets[-1] >= 2**31:
        raise DatasetError(
            f"{offsets[-1]} tokens exceed what one dataset can hold in memory. Use part of the split, "
            "such as train[:50%]."
        )
    return pyarrow.array(offsets.astype(np.int32))


def is_prepared(rows: Any) -> bool:
    """Whether `rows` is a dataset that `prepare_dataset` returned."""
    return isinstance(rows, datasets.Dataset) and {"row", "turn", "prompt_ids", "response_ids"} <= set(
        rows.column_names
    )


def check_tokens(prepared: datasets.Dataset, tokenizer: Any, embeddings: int | None, source: str, first: int) -> None:
    """Refuse tokens that the model has no embedding for: they would end the run at the first batch that holds one.

    Args:
        prepared: rows.
        tokenizer: that made them; its EOS and pad tokens are checked too.
        embeddings: of the model; None if the number is not known.
        source: name of the rows in messages.
        first: number of the first row.

    Raises:
        TokenizerError: names the token, and a row that holds it.
    """
    if embeddings is None:
        return
    largest, row = largest_token(prepared)
    where = f"row {row - first + 1} of {source}"
    for name in ("pad", "eos"):
        own = getattr(tokenizer, f"{name}_token_id")
        if largest < embeddings and own is not None and own >= embeddings:
            largest, where = own, f"the {'EOS' if name == 'eos' else name} token of the tokenizer"
    if largest >= embeddings:
        raise TokenizerError(
            f"{where}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the {embeddings} "
            "embeddings of the model. Take the tokenizer that belongs to it, or save the model again after "
            f"model.resize_token_embeddings({max(len(tokenizer), largest + 1)})."
        )


def largest_token(prepared: datasets.Dataset) -> tuple[int, int]:
    """The largest token id of a prepared dataset, and the number of a row that contains it."""
    largest, row = -1, 0
    for batch in prepared.with_format("arrow").iter(batch_size=1000):
        for name in ExampleTable.NESTED:
            if name in batch.column_names:
                nested = pyarrow.compute.list_flatten(batch.column(name))
                found = pyarrow.compute.max(pyarrow.compute.list_flatten(nested)).as_py()
                if found is not None and found > largest:
                    largest = found
                    holds = [any(found in ids for ids in turns) for turns in batch.column(name).to_pylist()]
                    row = batch.column("row")[holds.index(True)].as_py()
    return largest, row


def collate_examples(records: list[dict[str, Any]]) -> dict[str, list[Example]]:
    """Records of a prepared dataset -> `{"examples": [...]}`.

    Uses no random numbers: on resume the first batches are collated before any state is restored.
    """
    examples = []
    for record in records:
        names = [name for name in ExampleTable.NESTED if name in record]
        parts = zip(record["turn"], *(record[name] for name in names), strict=True)
        turns = (Turn(index, **dict(zip(names, map(tuple, ids), strict=True))) for index, *ids in parts)
        examples.append(Example(record["row"], tuple(turns)))
    return {"examples": examples}


def dataset_digest(prepared: datasets.Dataset) -> str:
    """SHA-256 of row numbers and tokens, in order; detects changed data on resume."""
    names = [name for name in ("row", "turn", *ExampleTable.NESTED) if name in prepared.column_names]
    digest = hashlib.sha256(" ".join(names).encode())
    for batch in prepared.with_format("arrow").iter(batch_size=1000):
        for name in names:
            values = batch.column(name).combine_chunks()
            while pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
                _feed(digest, values.value_lengths())
                values = values.flatten()
            _feed(digest, values)
    return digest.hexdigest()


def _feed(digest: _Hash, values: pyarrow.Array) -> None:
    # One integer width, so that a dataset saved with wider integers has the same digest.
    digest.update(values.to_numpy(zero_copy_only=False).astype("<i8").tobytes())


__all__ = [
    "DataOptions",
    "DataReport",
    "Example",
    "ExampleTable",
    "Turn",
    "check_tokens",
    "collate_examples",
    "dataset_digest",
    "is_prepared",
    "largest_token",
]
