"""Pairs that a frozen model generates for a full dataset, and their Parquet files.

A file has one row per pair: `row` and `turn` of the dataset, `prompt`, `chosen` and `rejected` for any tool that reads
preference data, and `prompt_ids`, `chosen_ids`, `rejected_ids`, the exact tokens, for training with this package. It is
written in parts, each atomically, so that a killed run can continue.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from sapo.data.examples import ExampleTable, Turn, collate_examples
from sapo.data.texts import PromptTexts
from sapo.errors import CheckpointError, DatasetError
from sapo.preference.pairs import Pair
from sapo.preference.self_play import SelfPlay
from sapo.runs.checkpoint import compare_facts
from sapo.runs.files import replacing, write_atomically
from sapo.runs.lock import locked

_FACTS = b"sapo_facts"
_REPORT = b"sapo_report"
_SPENT = b"sapo_spent"
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True, slots=True)
class PairsReport:
    """Statistics of a file of pairs.

    Attributes:
        written: generated pairs, including those that are not in the file.
        identical: pairs whose rejected response equals the chosen one; excluded by default.
        ended: fraction of rejected responses that end with an EOS token.
        chosen_length: mean tokens of a chosen response.
        rejected_length: mean tokens of a rejected response.
        wall_seconds: wall time of generation, summed over processes.
        cpu_seconds: CPU time of generation, summed over processes.
    """

    written: int
    identical: int
    ended: float
    chosen_length: float
    rejected_length: float
    wall_seconds: float
    cpu_seconds: float

    def line(self) -> str:
        """One-line summary."""
        return (
            f"{self.written} pairs, {self.identical} of them identical; {self.ended:.1%} of the rejected responses "
            f"have an EOS token; mean lengths {self.chosen_length:.1f} and {self.rejected_length:.1f} tokens"
        )


@dataclass(frozen=True, slots=True)
class PairWriter:
    """Writes the pairs of one dataset into one file.

    Attributes:
        file: output file; until it is complete, its parts are in a folder next to it, named after it.
        facts: what the pairs depend on; a part with other facts is refused.
        eos_ids: EOS tokens.
        rows_a_part: examples per part; a killed run continues at the next part.
        process: index of this process.
        processes: number of processes, which share the folder.
        wait: returns when all processes have called it.
    """

    file: Path
    facts: dict[str, Any]
    eos_ids: frozenset[int]
    rows_a_part: int
    process: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def _folder(self) -> Path:
        return self.file.with_name(f"{self.file.name}.parts")

    def locked(self) -> AbstractContextManager[None]:
        """Keep other runs from writing the same file; the first process holds the lock.

        Raises:
            ConfigurationError: another run has it.
        """
        return locked(self._folder) if self.process == 0 else nullcontext()

    def report(self) -> PairsReport | None:
        """Statistics of the complete file; None if it does not exist yet.

        Raises:
            CheckpointError: its facts differ.
        """
        if not self.file.exists():
            return None
        report: dict[str, Any] = json.loads(self._metadata(self.file)[_REPORT])
        return PairsReport(**report)

    def write_parts(self, dataset: datasets.Dataset, source: SelfPlay, *, epoch: int, each: Callable[[], None]) -> None:
        """Generate and write the missing parts.

        Args:
            dataset: prepared rows.
            source: generates the pairs; its buffer is not used.
            epoch: seeds differ from epoch to epoch.
            each: called after each part.

        Raises:
            CheckpointError: the facts of an existing part differ.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in range(self.process, self._parts(dataset), self.processes):
            part = self._folder / f"part-{number:05d}.parquet"
            if part.exists():
                self._metadata(part)
            else:
                first = number * self.rows_a_part
                rows = range(first, min(first + self.rows_a_part, len(dataset)))
                began = time.perf_counter(), time.process_time()
                examples = collate_examples([dataset[row] for row in rows])["examples"]
                table = _table(source.regenerate(examples, epoch=epoch))
                spent = {"wall": time.perf_counter() - began[0], "cpu": time.process_time() - began[1]}
                _write(part, table, {_FACTS: _json(self.facts), _SPENT: _json(spent)})
            each()
        self.wait()

    def remaining(self, dataset: datasets.Dataset) -> int:
        """Number of parts that this process has to check or write."""
        return len(range(self.process, self._parts(dataset), self.processes))

    def _parts(self, dataset: datasets.Dataset) -> int:
        return -(-len(dataset) // self.rows_a_part)

    def join(self, dataset: datasets.Dataset, tokenizer: Any, texts: PromptTexts, *, skip_identical: bool) -> None:
        """Join the parts and add their texts, on the first process; remove the parts.

        Both responses of a pair are decoded from tokens, so that they differ only in content.

        Raises:
            DatasetError: every pair is identical.
        """
        if self.process == 0:
            names = [self._folder / f"part-{number:05d}.parquet" for number in range(self._parts(dataset))]
            whole = pyarrow.concat_tables([pyarrow.parquet.read_table(name) for name in names])
            spent = [json.loads(self._metadata(name)[_SPENT]) for name in names]
            report, kept = self._count(whole, spent, skip_identical=skip_identical)
            if not kept:
                raise DatasetError(
                    f"{self.file.name}: the model generated the chosen response in all of {report.written} rows; "
                    "there is nothing to train on. Raise the temperature, or stop here."
                )
            whole = whole.take(kept)
            table = pyarrow.table(
                {"row": whole["row"], "turn": whole["turn"]}
                | _texts(whole, tokenizer, texts)
                | {name: whole[name] for name in _IDS}
            )
            _write(self.file, table, {_FACTS: _json(self.facts), _REPORT: _json(asdict(report))})
            shutil.rmtree(self._folder)
        self.wait()

    def _count(
        self, table: pyarrow.Table, spent: Sequence[dict[str, float]], *, skip_identical: bool
    ) -> tuple[PairsReport, list[int]]:
        chosen, rejected = table["chosen_ids"].to_pylist(), table["rejected_ids"].to_pylist()
        different = [place for place, pair in enumerate(zip(chosen, rejected, strict=True)) if pair[0] != pair[1]]
        count = len(chosen)
        report = PairsReport(
            written=count,
            identical=count - len(different),
            ended=sum(bool(ids) and ids[-1] in self.eos_ids for ids in rejected) / count,
            chosen_length=sum(map(len, chosen)) / count,
            rejected_length=sum(map(len, rejected)) / count,
            wall_seconds=sum(part["wall"] for part in spent),
            cpu_seconds=sum(part["cpu"] for part in spent),
        )
        return report, different if skip_identical else list(range(count))

    def _metadata(self, file: Path) -> dict[bytes, bytes]:
        try:
            metadata: dict[bytes, bytes] = pyarrow.parquet.read_schema(file).metadata or {}
            facts = json.loads(metadata[_FACTS])
        except (pyarrow.ArrowInvalid, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{file}: incomplete file of pairs. Remove it and generate the pairs again."
            ) from error
        compare_facts(file, facts, json.loads(_json(self.facts)))
        return metadata


def move_to_json_lines(pairs: Path, file: Path) -> None:
    """Write the texts of a complete file of pairs as JSON lines, with row and turn; remove the pairs.

    Args:
        pairs: Parquet file.
        file: JSON lines, replaced when complete.
    """
    table = pyarrow.parquet.read_table(pairs)
    rows = table.drop_columns(list(_IDS)).to_pylist()
    write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    pairs.unlink()


def read_pairs(files: Iterable[Path], *, max_length: int) -> datasets.Dataset:
    """Files of pairs as one prepared dataset of paired examples, from their tokens.

    Args:
        files: complete files.
        max_length: maximum tokens of prompt plus response.

    Raises:
        DatasetError: a file is missing or contains longer pairs.
    """
    table = ExampleTable(paired=True, join_turns=False)
    for file in files:
        if not file.is_file():
            raise DatasetError(f"{file}: no such file of pairs.")
        columns = pyarrow.parquet.read_table(file, columns=["row", "turn", *_IDS]).to_pydict()
        for row, turn, prompt, chosen, rejected in zip(*columns.values(), strict=True):
            if len(prompt) + max(len(chosen), len(rejected)) > max_length:
                raise DatasetError(f"{file}: row {row} is longer than max_length={max_length}. Raise it.")
            table.add(row, Turn(turn, tuple(prompt), tuple(chosen), tuple(rejected)))
    return table.dataset()


def _table(pairs: Sequence[Pair]) -> pyarrow.Table:
    ids = pyarrow.list_(pyarrow.int32())
    return pyarrow.table(
        {
            "row": pyarrow.array([pair.row for pair in pairs], pyarrow.int64()),
            "turn": pyarrow.array([pair.turn for pair in pairs], pyarrow.int64()),
            "prompt_ids": pyarrow.array([list(pair.prompt_ids) for pair in pairs], ids),
            "chosen_ids": pyarrow.array([list(pair.chosen_ids) for pair in pairs], ids),
            "rejected_ids": pyarrow.array([list(pair.rejected_ids) for pair in pairs], ids),
        }
    )


def _texts(table: pyarrow.Table, tokenizer: Any, texts: PromptTexts) -> dict[str, list[Any]]:
    def replies_after(column: str) -> list[str]:
        # In context: decoded separately, many tokenizers drop the space at the start of a reply.
        wholes = [[*prompt, *reply] for prompt, reply in zip(prompt_ids, table[column].to_pylist(), strict=True)]
        texts: list[str] = tokenizer.batch_decode(wholes, skip_special_tokens=True)
        return [text[len(before) :] for text, before in zip(texts, befores, strict=True)]

    prompt_ids = table["prompt_ids"].to_pylist()
    befores = tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
    replies = {name: replies_after(f"{name}_ids") for name in ("chosen", "rejected")}
    places = zip(table["row"].to_pylist(), table["turn"].to_pylist(), strict=True)
    prompts = [texts.prompt(row, turn) for row, turn in places]
    if any(prompt is None for prompt in prompts):
        # Text and conversations do not fit into one column: use the rendered prompts.
        return {"prompt": tokenizer.batch_decode(prompt_ids, skip_special_tokens=False), **replies}
    if texts.plain:
        return {"prompt": prompts, **replies}
    turns = {name: [[{"role": "assistant", "content": text}] for text in reply] for name, reply in replies.items()}
    return {"prompt": prompts, **turns}


def _write(file: Path, table: pyarrow.Table, metadata: dict[bytes, bytes]) -> None:
    with replacing(file) as partial:
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), partial)


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
