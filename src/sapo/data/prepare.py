"""Rows -> token ids: prompt and response of each turn, the chat template rendered once for each.

The published code puts every message through the template alone, so that the assistant's header lands in the response
(docs/departures.md). Here the response is exactly what follows the prompt that generation will start from.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow
from jinja2 import TemplateError

from sapo.data.formats import Conversation, Dropped, Message, PlainText, detect_format, parse_row
from sapo.errors import ConfigurationError, DatasetError, TokenizerError
from sapo.segments import truncate

_CHUNK = 256
"""Rows tokenized in one call: enough for the tokenizer's threads, small in memory."""

_NO_TEMPLATE = (
    "the tokenizer has no chat template. Set tokenizer.chat_template, copy one with "
    'trl.clone_chat_template(model, tokenizer, "Qwen/Qwen3-0.6B"), or give rows of plain prompt and completion.'
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant reply and what came before it, as token ids.

    Attributes:
        index: which assistant message of the row this is, from 0.
        prompt_ids: all before the reply, up to and including the header that opens it.
        response_ids: the reply; its end token included, unless it was cut.
        rejected_ids: the worse reply, of paired data only.
    """

    index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """What one draw from the dataloader gives.

    Attributes:
        row: row of the source dataset, from 0. Seeds derive from it, so it survives shuffling and sharding.
        turns: exactly one, except with `assistant_turns="random"`, where one is drawn each epoch.
    """

    row: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How rows become examples.

    Attributes:
        max_length: tokens of prompt and response together.
        max_prompt_length: tokens the prompt keeps when both together are too long.
        truncation_mode: which side of a prompt is kept.
        overlong: cut what exceeds `max_length`, leave the row out, or stop.
        assistant_turns: learn from the last reply, from one drawn each epoch, or from each.
        paired: rows hold chosen and rejected, and both are wanted.
    """

    max_length: int
    max_prompt_length: int
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    assistant_turns: Literal["last", "random", "all"] = "last"
    paired: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 2 or self.max_prompt_length < 1:
            raise ConfigurationError(
                f"max_length={self.max_length} and max_prompt_length={self.max_prompt_length} leave no room for a "
                "prompt and a response. Give at least 2 and 1 tokens."
            )


@dataclass
class DataReport:
    """What became of the rows.

    Attributes:
        source: the dataset's name, as in messages.
        format: the format recognised.
        rows: rows read.
        kept: examples kept.
        dropped: why rows were left out, and how many; in "random" and "all" mode a too long turn counts alone.
        truncated_prompts: turns whose prompt was cut.
        truncated_responses: turns whose response (or rejected response) was cut, its end token lost.
        boundary_merges: responses tokenized apart, since the text's tokens run across the end of the prompt.
        prompt_lengths: tokens of each turn's prompt, after cutting.
        response_lengths: tokens of each turn's response, after cutting.
    """

    source: str
    format: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_responses: int = 0
    boundary_merges: int = 0
    prompt_lengths: list[int] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A short summary, in plain text."""
        turns = len(self.response_lengths)
        several = f" ({turns} turns)" if turns != self.kept else ""
        lines = [f"{self.source}: format {self.format}, {self.rows} rows, {self.kept} examples kept{several}"]
        lines += [f"dropped {count}: {reason}" for reason, count in sorted(self.dropped.items())]
        if self.truncated_prompts or self.truncated_responses:
            lines.append(
                f"cut to fit: {self.truncated_prompts} prompts, {self.truncated_responses} responses "
                "(a cut response has no end token)"
            )
        if self.boundary_merges:
            lines.append(
                f"{self.boundary_merges} responses tokenized apart from their prompt: a token would span both. "
                "A space that ends each prompt belongs at the start of the completion."
            )
        return lines


@dataclass(frozen=True, slots=True)
class _Draft:
    """One turn as text, before it is tokenized; `texts` holds prompt, prompt + reply, and prompt + rejected if paired."""

    row: int
    index: int
    texts: tuple[str, ...]
    plain: bool


def end_token_ids(tokenizer: Any, generation_eos: int | list[int] | None) -> frozenset[int]:
    """All tokens that end a reply: the tokenizer's, the generation configuration's, and the chat template's.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`.
        generation_eos: `eos_token_id` of the model's generation configuration.

    Raises:
        TokenizerError: there is none.
    """
    ids = {generation_eos} if isinstance(generation_eos, int) else set(generation_eos or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        ids.update(_template_end(tokenizer))
    if not ids:
        raise TokenizerError(
            "no end token: neither the tokenizer, nor the generation configuration, nor a chat template names one, "
            "so no reply would ever end. Set tokenizer.eos_token."
        )
    return frozenset(ids)


def _template_end(tokenizer: Any) -> list[int]:
    marker = "zebra quartz"
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
    try:
        _, found, tail = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(marker)
    except (TemplateError, TypeError, ValueError):
        return []  # a template for other shapes of talk: the rows themselves will tell
    if not found:
        return []
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder:
            # Some vocabularies hold line breaks as added tokens; those do not end a turn.
            if tokenizer.decode([token]).strip():
                return [token]
        elif tokenizer.decode([token]).strip():
            break
    return []


def prepare_dataset(
    rows: datasets.Dataset | Iterable[dict[str, Any]],
    tokenizer: Any,
    options: DataOptions,
    *,
    end_ids: Collection[int],
    source: str = "dataset",
) -> tuple[datasets.Dataset, DataReport]:
    """Tokenize all rows, in memory.

    Args:
        rows: what `load_rows` returned, or any iterable of rows.
        tokenizer: a `PreTrainedTokenizerBase`.
        options: lengths, turns, pairs.
        end_ids: see `end_token_ids`. A response that ends with none of them gets the tokenizer's own.
        source: the dataset's name in messages.

    Returns:
        A dataset with one record per `Example` (`row` int64; `turn` list of int64; `prompt_ids`, `response_ids` and,
        if paired, `rejected_ids`, each a list of lists of int32), and the report.

    Raises:
        DatasetError: a malformed row, a too long one if `overlong="error"`, or nothing left.
        TokenizerError: no chat template, no end token, or a template that rewrites the history.
    """
    numbered = enumerate(rows)
    head = next(numbered, None)
    if head is None:
        raise DatasetError(f"{source}: holds no rows. Give a dataset that does.")
    layout = detect_format(head[1], paired=options.paired, source=source)
    report = DataReport(source, layout)
    encoder = _Encoder(tokenizer, end_ids, report)
    columns = _Columns(options.paired)
    numbered = _chain(head, numbered)
    while chunk := list(islice(numbered, _CHUNK)):
        drafts: list[_Draft] = []
        for number, row in chunk:
            report.rows += 1
            where = f"row {number + 1} of {source}"
            parsed = parse_row(row, layout, paired=options.paired, chat=encoder.chat, where=where)
            if isinstance(parsed, Dropped):
                _count(report, parsed.reason)
            elif isinstance(parsed, PlainText):
                drafts.append(_plain_draft(parsed, number))
            else:
                drafts += encoder.render(parsed, number, options, where)
        turns = [(draft.row, turn) for draft, turn in encoder.turns(drafts) if _admit(turn, options, report)]
        for number, turn in _fit(turns, options, report):
            columns.add(number, turn, joined=options.assistant_turns == "random")
    report.kept = len(columns.rows)
    if not report.kept:
        reasons = ", ".join(f"{count} for {reason!r}" for reason, count in sorted(report.dropped.items()))
        raise DatasetError(
            f"{source}: none of its {report.rows} rows can be used (dropped {reasons}). "
            "Mend the rows, or raise max_length if they are too long."
        )
    return columns.dataset(), report


def collate_examples(records: list[dict[str, Any]]) -> dict[str, list[Example]]:
    """Records of a prepared dataset -> `{"examples": [...]}`.

    Draws nothing: on resume the first batches are collated before any state is restored.
    """
    examples = []
    for record in records:
        rejected = record.get("rejected_ids") or [None] * len(record["turn"])
        parts = zip(record["turn"], record["prompt_ids"], record["response_ids"], rejected, strict=True)
        turns = tuple(
            Turn(index, tuple(prompt), tuple(response), None if other is None else tuple(other))
            for index, prompt, response, other in parts
        )
        examples.append(Example(record["row"], turns))
    return {"examples": examples}


def dataset_digest(prepared: datasets.Dataset) -> str:
    """SHA-256 of row numbers and tokens, in order: on resume it tells whether the data are the same."""
    digest = hashlib.sha256()
    names = [name for name in ("row", *_Columns.NAMES) if name in prepared.column_names]
    digest.update(" ".join(names).encode())
    for batch in prepared.with_format("arrow").iter(batch_size=1000):
        for name in names:
            values = batch.column(name).combine_chunks()
            while pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
                _feed(digest, values.value_lengths())
                values = values.flatten()
            _feed(digest, values)
    return digest.hexdigest()


def _feed(digest: Any, values: pyarrow.Array) -> None:
    digest.update(values.to_numpy(zero_copy_only=False).astype("<i8").tobytes())


def _chain(head: tuple[int, Any], rest: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    yield head
    yield from rest


def _count(report: DataReport, reason: str) -> None:
    report.dropped[reason] = report.dropped.get(reason, 0) + 1


def _plain_draft(text: PlainText, row: int) -> _Draft:
    whole = (text.prompt, text.prompt + text.completion)
    rejected = () if text.rejected is None else (text.prompt + text.rejected,)
    return _Draft(row, 0, (*whole, *rejected), plain=True)


def _admit(turn: Turn, options: DataOptions, report: DataReport) -> bool:
    """Whether a turn has what learning needs, before its length is looked at."""
    if not turn.prompt_ids:
        # Without so much as a start token there is nothing the first token could be predicted from.
        _count(report, "empty prompt")
    elif not turn.response_ids:
        _count(report, "empty reply")
    else:
        return True
    return False


def _fit(
    turns: list[tuple[int, Turn]], options: DataOptions, report: DataReport
) -> Iterator[tuple[int, Turn]]:
    for row, turn in turns:
        longest = max(turn.response_ids, turn.rejected_ids or (), key=len)
        total = len(turn.prompt_ids) + len(longest)
        if total > options.max_length and options.overlong != "truncate":
            if options.overlong == "error":
                raise DatasetError(
                    f"row {row + 1} of {report.source}: {len(turn.prompt_ids)} prompt tokens and {len(longest)} "
                    f"response tokens exceed max_length={options.max_length}. Raise it to {total}, or set overlong "
                    "to truncate or drop."
                )
            _count(report, f"longer than max_length={options.max_length}")
            continue
        prompt, _ = truncate(
            turn.prompt_ids,
            longest,  # both sides of a pair share one prompt, so the longer decides whether it is cut
            max_length=options.max_length,
            max_prompt_length=options.max_prompt_length,
            truncation_mode=options.truncation_mode,
        )
        room = max(0, options.max_length - len(prompt))
        cut = Turn(
            turn.index,
            tuple(prompt),
            turn.response_ids[:room],
            None if turn.rejected_ids is None else turn.rejected_ids[:room],
        )
        if not room:
            _count(report, f"no room for a response after {len(prompt)} prompt tokens")
        elif cut.response_ids == cut.rejected_ids:
            _count(report, "chosen equals rejected")
        else:
            report.truncated_prompts += len(prompt) < len(turn.prompt_ids)
            report.truncated_responses += len(longest) > room
            report.prompt_lengths.append(len(prompt))
            report.response_lengths.append(len(cut.response_ids))
            yield row, cut


class _Encoder:
    """The tokenizer, and what is worked out once about it."""

    def __init__(self, tokenizer: Any, end_ids: Collection[int], report: DataReport) -> None:
        if tokenizer.eos_token_id is None:
            raise TokenizerError(
                "the tokenizer has no end token to close a response with. Set tokenizer.eos_token."
            )
        self.chat = bool(tokenizer.chat_template)
        self._tokenizer = tokenizer
        self._ends = frozenset({*end_ids, tokenizer.eos_token_id})
        self._report = report
        self._blank: dict[int, bool] = {}
        self._start = self._start_ids()

    def render(self, talk: Conversation, row: int, options: DataOptions, where: str) -> list[_Draft]:
        """The turns of a conversation to learn from, as text."""
        if not self.chat:
            raise TokenizerError(f"{where}: holds messages, but {_NO_TEMPLATE}")
        places = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
        turns = [(index, place) for index, place in enumerate(places) if place >= max(talk.first, 1)]
        if not turns:
            _count(self._report, "reply without a prompt")
            return []
        if options.assistant_turns == "last" or talk.rejected is not None:
            turns = turns[-1:]
        drafts = []
        for index, place in turns:
            prompt = talk.messages[:place]
            replies = (talk.messages[place], *([talk.rejected] if talk.rejected is not None else []))
            texts = [self._template(prompt, talk, where, opening=True)]
            texts += [self._template((*prompt, reply), talk, where) for reply in replies]
            drafts.append(_Draft(row, index, tuple(texts), plain=False))
        return drafts

    def turns(self, drafts: Sequence[_Draft]) -> Iterator[tuple[_Draft, Turn]]:
        """Tokenize; prompt and response are cut from the tokens of both together wherever that is possible."""
        if not drafts:
            return
        ids = iter(self._encode([text for draft in drafts for text in draft.texts]))
        for draft in drafts:
            start = self._start if draft.plain else []
            prompt = next(ids)
            replies = [
                self._reply(draft, prompt, next(ids), draft.texts[0], text) for text in draft.texts[1:]
            ]
            rejected = replies[1] if len(replies) > 1 else None
            yield draft, Turn(draft.index, (*start, *prompt), replies[0], rejected)

    def _reply(
        self, draft: _Draft, prompt: list[int], whole: list[int], before: str, text: str
    ) -> tuple[int, ...]:
        if whole[: len(prompt)] == prompt:
            return self._ended(whole[len(prompt) :])
        if not text.startswith(before):
            raise self._rewritten(draft, prompt, whole)
        # Generation starts from the prompt's own tokens, so a token that would span both cannot occur there.
        self._report.boundary_merges += 1
        return self._ended(self._encode([text[len(before) :]])[0])

    def _ended(self, reply: list[int]) -> tuple[int, ...]:
        """Cut after the end token of the turn and append one if there is none.

        Templates add white space after the end token, and some a second one that closes the document. Both come
        after the point where generation stops.
        """
        first_end = None
        for place in range(len(reply) - 1, -1, -1):
            if reply[place] in self._ends:
                first_end = place
            elif not self._is_blank(reply[place]):
                break
        if first_end is not None:
            return tuple(reply[: first_end + 1])
        return (*reply, self._tokenizer.eos_token_id) if reply else ()

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]

    def _template(
        self, messages: Sequence[Message], talk: Conversation, where: str, *, opening: bool = False
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=talk.tools, add_generation_prompt=opening, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise DatasetError(
                f"{where}: the chat template refuses it ({reason}). Mend the row, or use another template."
            ) from error
        return text

    def _rewritten(self, draft: _Draft, prompt: list[int], whole: list[int]) -> TokenizerError:
        pairs = zip(prompt, whole, strict=False)
        place = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), len(whole))
        mine, theirs = (
            repr(self._tokenizer.decode(ids[place : place + 1])) if place < len(ids) else "nothing"
            for ids in (prompt, whole)
        )
        return TokenizerError(
            f"row {draft.row + 1} of {self._report.source}: the chat template renders the prompt differently once the "
            f"reply follows: token {place + 1} is {mine} before and {theirs} after. Use a template that keeps what "
            "came before unchanged, such as trl.chat_template_utils.get_training_chat_template(tokenizer) gives."
        )

    def _start_ids(self) -> list[int]:
        """What the tokenizer puts before plain text, such as a start token; what it puts after is left out."""
        bare = self._encode(["a"])[0]
        full = self._tokenizer("a")["input_ids"]
        places = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        return list(full[: places[0]]) if places else []

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # lengths are looked after here, not by the tokenizer's own limit
        )["input_ids"]
        return encoded


class _Columns:
    """Arrow columns in the making: flat arrays and offsets, far smaller than lists of Python integers."""

    NAMES = ("turn", "prompt_ids", "response_ids", "rejected_ids")

    def __init__(self, paired: bool) -> None:
        self._paired = paired
        self.rows = array("q")
        self._turns = array("q")
        self._first = array("q", [0])
        self._tokens = {name: (array("i"), array("q", [0])) for name in self.NAMES[1:]}

    def add(self, row: int, turn: Turn, *, joined: bool) -> None:
        if joined and self.rows and self.rows[-1] == row:
            self._first[-1] += 1
        else:
            self.rows.append(row)
            self._first.append(self._first[-1] + 1)
        self._turns.append(turn.index)
        for name, ids in zip(
            self.NAMES[1:], (turn.prompt_ids, turn.response_ids, turn.rejected_ids), strict=True
        ):
            values, offsets = self._tokens[name]
            values.extend(ids or ())
            offsets.append(len(values))

    def dataset(self) -> datasets.Dataset:
        first = self._offsets(self._first)
        columns = {
            "row": pyarrow.array(np.array(self.rows)),
            "turn": pyarrow.ListArray.from_arrays(first, pyarrow.array(np.array(self._turns))),
        }
        for name, (values, offsets) in self._tokens.items():
            if name != "rejected_ids" or self._paired:
                tokens = pyarrow.array(np.array(values, dtype=np.int32))
                inner = pyarrow.ListArray.from_arrays(self._offsets(offsets), tokens)
                columns[name] = pyarrow.ListArray.from_arrays(first, inner)
        return datasets.Dataset.from_dict(columns)

    def _offsets(self, offsets: array[int]) -> pyarrow.Array:
        if offsets[-1] >= 2**31:
            raise DatasetError(
                f"{offsets[-1]} tokens are more than one dataset can hold in memory. Take a part of the split, "
                "such as train[:50%]."
            )
        return pyarrow.array(np.array(offsets, dtype=np.int32))
