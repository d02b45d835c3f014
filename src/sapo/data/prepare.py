"""Rows -> the trainer's dataset: detect the format, tokenize, truncate, count what is dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets

from sapo.data import cache
from sapo.data.encoding import Draft, Encoder
from sapo.data.examples import DataOptions, DataReport, ExampleTable, Turn, check_tokens, is_prepared
from sapo.data.files import Unreadable
from sapo.data.formats import format_of, parse_row
from sapo.data.messages import Dropped, PlainText
from sapo.data.parallel import in_order, processes_for
from sapo.data.preferences import RATED_LOWER
from sapo.data.report import SHOWN_ROWS, Faults
from sapo.data.token_parts import TextTokens
from sapo.errors import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256
"""Rows tokenized per call: enough for the tokenizer's threads, small in memory."""

_BLOCK = 8 * _CHUNK
"""Rows that a process prepares at a time."""

_NO_ROOM = "no tokens left for a response after the prompt"


def prepare_dataset(
    rows: datasets.Dataset | Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    eos_ids: Collection[int],
    source: str = "dataset",
    first_row: int = 0,
    count_faults: bool = False,
    num_proc: int | None = 1,
    cache_folder: Path | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[datasets.Dataset, DataReport]:
    """Tokenize all rows, in memory.

    Args:
        rows: result of `load_rows`, or any iterable of rows.
        tokenizer: the model's tokenizer.
        options: lengths, turns, pairs.
        eos_ids: see `eos_token_ids`. A response without one gets the tokenizer's own.
        source: name of the dataset in messages.
        first_row: number of the first row in the result; messages always count from 1.
        count_faults: count malformed rows in the report instead of raising at the first, and accept a `max_length`
            that truncates most rows.
        num_proc: number of processes; None for as many as pay. A script that asks for several needs the usual
            `if __name__ == "__main__"`. The result does not depend on it.
        cache_folder: where prepared rows are kept for the next start, and taken from if nothing has changed.
        progress: called with the number of rows that are done.

    Returns:
        A dataset with one record per `Example` (`row` int64; `turn` list of int64; `prompt_ids`,
        `response_ids` and, if paired, `rejected_ids`, each a list of lists of int32), and the report.

    Raises:
        DatasetError: a malformed row; a row that is too long if `max_length_policy="error"`, or more than half of them
            if "auto"; or no row left.
        TokenizerError: no chat template, no EOS token, a template that changes the history, or a token beyond the
            model's embeddings.
    """
    kept_as = ""
    if cache_folder is not None and isinstance(rows, (list, datasets.Dataset)):
        kept_as = cache.key(rows, tokenizer, options, eos_ids, source, first_row)
        found = cache.load(cache_folder, kept_as)
        if found is not None:
            prepared, report = found
            report.faults = Faults() if count_faults else None
            _check_lengths(options, report)
            return prepared, report
    stream = iter(rows)
    row_format, head = format_of(stream, paired=options.paired, source=source)
    preparation = _Preparation(tokenizer, options, tuple(sorted(eos_ids)), source, row_format, first_row, count_faults)
    report, table = preparation.report(), preparation.table()
    if num_proc is None:
        num_proc = processes_for(len(rows)) if isinstance(rows, (list, datasets.Dataset)) else 1
    seen: set[int] = set()
    for part, turns, counts in in_order(preparation, _blocks(enumerate(chain(head, stream))), num_proc):
        report.add(counts)
        table.extend(part)
        for number, mark in turns:
            _note_duplicate(mark, number, seen, report)
        progress(report.rows)
    report.kept = len(table)
    _check_scores(report)
    _check_lengths(options, report)
    if not report.kept:
        reasons = ", ".join(f"{count} for: {reason}" for reason, count in sorted(report.dropped.items()))
        dropped = [f"dropped {reasons}"] if reasons else []
        refused = [] if report.faults is None else report.faults.lines()
        too_long = report.too_long or _NO_ROOM in report.dropped
        raise DatasetError(
            f"{source}: none of its {report.rows} rows can be used ({'; '.join(dropped + refused)}). Fix the "
            f"rows{', or raise max_length' if too_long else ''}."
        )
    prepared = table.dataset()
    check_tokens(prepared, tokenizer, options.embeddings, source, first_row)
    if kept_as and cache_folder is not None and not (report.faults and (report.faults.counts or report.faults.of_all)):
        cache.store(cache_folder, kept_as, prepared, report)
    return prepared, report


def _blocks(numbered: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    stream = iter(numbered)
    while block := list(islice(stream, _BLOCK)):
        yield block


@dataclasses.dataclass(frozen=True)
class _Preparation:
    """What rows are prepared with; calling it prepares a block of numbered rows."""

    tokenizer: Any
    options: DataOptions
    eos_ids: tuple[int, ...]
    source: str
    row_format: str
    first_row: int
    count_faults: bool

    @cached_property
    def tokens(self) -> TextTokens | None:
        """What tokenizes in this process."""
        return TextTokens(self.tokenizer) if self.tokenizer.is_fast else None

    def table(self) -> ExampleTable:
        """A table without examples."""
        return ExampleTable(
            paired=self.options.paired,
            join_turns=self.options.assistant_turns == "random",
            opponent_prompts=self.options.opponent_system_prompt is not None,
        )

    def report(self) -> DataReport:
        """A report without rows."""
        faults = Faults() if self.count_faults else None
        return DataReport(self.source, self.row_format, max_length=self.options.max_length, faults=faults)

    def __call__(self, block: list[tuple[int, Any]]) -> tuple[ExampleTable, list[tuple[int, int]], DataReport]:
        """The block's examples; of each turn the number of its row and what tells it from others; the counts."""
        report, table, options = self.report(), self.table(), self.options
        encoder = Encoder(
            self.tokenizer, self.eos_ids, report, options.date, options.opponent_system_prompt, self.tokens
        )
        turns: list[tuple[int, int]] = []
        for start in range(0, len(block), _CHUNK):
            drafts: list[Draft] = []
            for number, row in block[start : start + _CHUNK]:
                report.rows += 1
                try:
                    drafts += _drafts(row, number, self.row_format, self.options, encoder, report)
                except DatasetError as error:
                    report.refuse(error, number)
            for number, turn in encoder.turns(drafts):
                try:
                    fitted = _fit(turn, number, self.options, report)
                except DatasetError as error:
                    report.refuse(error, number)
                    continue
                if fitted is not None:
                    table.add(self.first_row + number, fitted)
                    # Of numbers alone, a hash is the same in every process.
                    turns.append((number, hash((fitted.prompt_ids, fitted.response_ids, fitted.rejected_ids or ()))))
        return table, turns, report


def _drafts(
    row: dict[str, Any], number: int, row_format: str, options: DataOptions, encoder: Encoder, report: DataReport
) -> list[Draft]:
    where = f"row {number + 1} of {report.source}"
    if isinstance(row, Unreadable):
        raise DatasetError(f"{where}: {row.reason}") from row.error
    parsed = parse_row(
        row, row_format, paired=options.paired, chat=encoder.chat, where=where, use=report.columns,
        note=lambda what: report.note(what, number),
    )  # fmt: skip
    if isinstance(parsed, Dropped):
        report.drop(parsed.reason, number)
        return []
    if isinstance(parsed, PlainText):
        report.replies[0] += 1
        return [encoder.plain(parsed, number, where)]
    roles = [message["role"] for message in parsed.messages]
    report.replies[roles.count("assistant")] += 1
    report.system_messages += any(
        message["role"] in ("system", "developer") and bool(message["content"].strip()) for message in parsed.messages
    )
    return encoder.render(parsed, number, options.assistant_turns, where)


def _note_duplicate(mark: int, row: int, seen: set[int], report: DataReport) -> None:
    if mark not in seen:
        seen.add(mark)
        return
    report.duplicates += 1
    if report.duplicates <= SHOWN_ROWS:
        report.duplicate_rows.append(row + 1)


def _check_scores(report: DataReport) -> None:
    """Refuse pairs most of which are rated the other way round."""
    lower = {what: count for what, count in report.noted.items() if what.startswith(RATED_LOWER)}
    if 2 * sum(lower.values()) <= report.rows:
        return
    names = "; ".join(sorted(what.partition("(")[2].rstrip(")") for what in lower))
    error = DatasetError(
        f"{report.source}: in {sum(lower.values())} of {report.rows} rows the chosen reply is rated lower than the "
        f"rejected one ({names}). Swap chosen and rejected; or, if a lower score is better here, remove the scores."
    )
    if report.faults is None:
        raise error
    report.faults.of_all.append(str(error))


def _check_lengths(options: DataOptions, report: DataReport) -> None:
    """Refuse a `max_length` that truncates most of the data: this is usually a mistake."""
    total = len(report.total_lengths)
    if options.max_length_policy != "auto" or 2 * report.too_long <= total:
        return
    error = DatasetError(
        f"{report.source}: {report.too_long} of {total} prompts plus responses are longer than "
        f"max_length={options.max_length} and would be truncated. Raise it: --max_length {report.length_for(95)} keeps "
        f"95% of them complete, {report.length_for(100)} all; or allow it with --max_length_policy truncate."
    )
    if report.faults is None:
        raise error
    report.faults.of_all.append(str(error))


def _fit(turn: Turn, row: int, options: DataOptions, report: DataReport) -> Turn | None:
    """Truncate a turn to `max_length`, or count why it is dropped."""
    prompt, sides = turn.prompt_ids, [turn.response_ids]
    if turn.rejected_ids is not None:
        sides.append(turn.rejected_ids)
    if not prompt:
        # Without at least a BOS token, nothing predicts the first token.
        report.drop("empty prompt", row)
        return None
    if not all(sides):
        report.drop("empty reply", row)
        return None
    longest, wider = max(sides, key=len), turn.wider_prompt_ids
    total = len(wider) + len(longest)
    report.total_lengths.append(total)
    if total > options.max_length and options.max_length_policy == "error":
        raise DatasetError(
            f"row {row + 1} of {report.source}: {len(wider)} prompt tokens and {len(longest)} response "
            f"tokens exceed max_length={options.max_length}. Raise it to {total}, or set max_length_policy to "
            "truncate or drop."
        )
    if total > options.max_length and options.max_length_policy == "drop":
        report.drop(f"longer than max_length={options.max_length}", row)
        return None
    # Both sides of a pair share one prompt, so the longer side decides whether the prompt is truncated.
    kept, response = truncate(
        wider,
        longest,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        prompt_truncation=options.prompt_truncation,
    )
    if not response:
        report.drop(_NO_ROOM, row)
        return None
    if turn.opponent_prompt_ids is not None:
        if len(kept) < len(wider):
            # Truncated at its start, it would lose the system message that it is there for.
            report.drop(f"longer than max_prompt_length={options.max_prompt_length} with opponent_system_prompt", row)
            return None
        kept = list(prompt)
    cut = [side[: len(response)] for side in sides]
    if len(cut) == 2 and cut[0] == cut[1]:
        report.drop("chosen equals rejected", row)
        return None
    report.truncated_prompts += len(kept) < len(prompt)
    report.truncated_responses += len(response) < len(longest)
    report.prompt_lengths.append(len(kept))
    report.response_lengths.append(len(cut[0]))
    return Turn(turn.index, tuple(kept), cut[0], cut[1] if len(cut) == 2 else None, turn.opponent_prompt_ids)


def prepare_datasets(
    rows: Any, tokenizer: Any, options: DataOptions, *, source: str, reports: dict[str, DataReport], **more: Any
) -> Any:
    """`prepare_dataset` for one dataset or several by name; prepared datasets and None are returned as they are.

    Args:
        rows: a dataset, or a mapping of datasets.
        tokenizer: the model's.
        options: lengths, turns, pairs, and the number of embeddings, which prepared datasets are compared with too.
        source: name in errors and reports; prefix of the names if there are several.
        reports: receives each report by name.
        more: passed to `prepare_dataset`.
    """
    if rows is None:
        return rows
    if isinstance(rows, (str, Path)):
        raise DatasetError(
            f"{source}: {rows} is a name. Pass rows, such as sapo.data.loading.load_rows({str(rows)!r})."
        )
    if callable(rows) or type(rows).__module__.startswith(("pandas.", "polars.")):
        raise DatasetError(
            f"{source}: rows are not read from a {type(rows).__name__}. Pass a datasets.Dataset (Dataset.from_pandas, "
            "Dataset.from_generator) or a list of dicts."
        )
    if is_prepared(rows):
        if ("opponent_prompt_ids" in rows.column_names) != (options.opponent_system_prompt is not None):
            given = "without" if options.opponent_system_prompt is not None else "with"
            raise ConfigurationError(
                f"{source}: these rows were prepared {given} opponent_system_prompt, which this run sets otherwise. "
                "Give rows as they are, or the same option."
            )
        check_tokens(rows, tokenizer, options.embeddings, source, 0)
        return rows
    if isinstance(rows, Mapping):
        return {
            name: prepare_datasets(own, tokenizer, options, source=f"{source}_{name}", reports=reports, **more)
            for name, own in rows.items()
        }
    prepared, reports[source] = prepare_dataset(rows, tokenizer, options, source=source, **more)
    return prepared


def truncate(
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    max_length: int,
    max_prompt_length: int,
    prompt_truncation: Literal["keep_end", "keep_start"] = "keep_end",
) -> tuple[list[int], list[int]]:
    """Truncate prompt plus response to `max_length` tokens, as the published collator does.

    Only if both together are too long: first the prompt is truncated to `max_prompt_length` (keeping its end or its
    start), then, if that is not enough, the response is truncated at its end and loses its EOS token.

    Returns:
        The prompt and the response that remain; the response may be empty when the prompt alone fills `max_length`.

    Raises:
        ValueError: a truncated prompt would be empty, or longer than `max_length`.
    """
    if not 1 <= max_prompt_length <= max_length:
        raise ValueError(f"max_prompt_length={max_prompt_length}: must be between 1 and max_length={max_length}")
    prompt, response = list(prompt), list(response)
    if len(prompt) + len(response) > max_length and len(prompt) > max_prompt_length:
        prompt = prompt[-max_prompt_length:] if prompt_truncation == "keep_end" else prompt[:max_prompt_length]
    return prompt, response[: max(0, max_length - len(prompt))]
