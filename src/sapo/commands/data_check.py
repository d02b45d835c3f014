"""Show, before a run, what became of the data and which segments the opponent will regenerate.

Text from data goes to the screen as `rich.text.Text`, never as markup, with its control characters spelled out:
a row can neither colour the screen nor move the cursor.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from sapo.commands.notices import held_notices
from sapo.commands.parser import Parsed
from sapo.data.examples import Example, Turn, collate_examples
from sapo.data.report import DataReport, percentile, row_name
from sapo.errors import DatasetError, ModelError
from sapo.preference.segments import Segment, choose_segment, segment_tokens
from sapo.seeds import derive_seed
from sapo.text.escape import visible
from sapo.text.numbers import share_text
from sapo.weights.source import find_source

if TYPE_CHECKING:
    import datasets
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

WHOLE_SHARE_HINT = 0.2
"""Share of responses regenerated in full above which a shorter segment is suggested."""

_SHOWN = 600
"""Characters shown of each part of the example."""


def run_data_check(given: Parsed) -> None:
    """`sapo data check FILE`."""
    values = given.values()
    if values.get("eval_dataset_name"):
        values.setdefault("eval_strategy", "steps")  # rows that are named are checked
    if not any(_is_gguf(values.get(name)) for name in ("model_name_or_path", "chat_template_path")):
        _leave_torch_out()
    from rich.console import Console

    from sapo.commands.data_arguments import describe
    from sapo.commands.inputs import load_inputs, quiet_libraries

    quiet_libraries()
    run = describe(values)
    with held_notices():
        inputs = load_inputs(run, count_faults=True)
        check_data(
            inputs.train,
            inputs.train_reports,
            inputs.tokenizer,
            evaluation=inputs.eval_reports,
            warnings=inputs.shared_rows(),
            segment_length=run.config.segment_length,
            tail_margin=run.config.tail_margin,
            seed=run.config.seed,
            console=Console(),
        )


def _leave_torch_out() -> None:
    """Let transformers run without torch in this process: rows and tokenizers need none, and importing it takes two
    thirds of the time of a check.

    transformers asks once whether torch is installed, and has no switch for it. Where torch is loaded already, as in a
    program that calls `main`, nothing is changed.
    """
    if "torch" in sys.modules:
        return
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    # Python's own way to say that a module is not there; it stays so only while transformers asks.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers.utils import is_torch_available

        is_torch_available()
    finally:
        del sys.modules["torch"]


def _is_gguf(model: str | None) -> bool:
    """Whether transformers reads a tokenizer from a GGUF file, for which it needs torch."""
    try:
        return model is not None and find_source(model).is_gguf
    except ModelError:
        return False  # what is wrong with it is said when it is read


def check_data(
    prepared: datasets.Dataset,
    reports: Sequence[DataReport],
    tokenizer: PreTrainedTokenizerBase,
    *,
    segment_length: float | None,
    tail_margin: int,
    seed: int,
    console: Console,
    evaluation: Sequence[DataReport] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Print the report, the lengths, how much would be regenerated, and one example with its parts marked.

    Args:
        prepared: from `prepare_mixture`.
        reports: from `prepare_mixture`.
        tokenizer: the tokenizer that prepared the data.
        segment_length: see `segments.segment_tokens`.
        tail_margin: see `segments.choose_segment`.
        seed: which example, and which segment of it, is shown.
        console: where to print; colours and width follow it.
        evaluation: reports of the rows to evaluate on.
        warnings: lines to print after the reports.

    Raises:
        DatasetError: training would be refused; raised after all of that.
    """
    checked = [*reports, *evaluation]
    lines = [line for report in checked for line in [*report.lines(), *report.details()]]
    for line in [*lines, *warnings]:
        console.print(_safe(line, console))
    prompts = [length for report in reports for length in report.prompt_lengths]
    responses = [length for report in reports for length in report.response_lengths]
    console.print()
    console.print(_length_table(prompts, responses))
    paired = "rejected_ids" in prepared.column_names
    if not paired:
        console.print()
        for line in regenerated_in_full(responses, segment_length):
            console.print(_safe(line, console))
    rng = random.Random(derive_seed(seed, "data check"))
    (example,) = collate_examples([prepared[rng.randrange(len(prepared))]])["examples"]
    turn = example.turns[rng.randrange(len(example.turns))]
    console.print()
    console.print(_safe(f"Example: {_title(example, turn, reports)}", console, "bold"))
    if turn.rejected_ids is not None:
        _show_pair(turn, tokenizer, console)
    else:
        segment = choose_segment(len(turn.response_ids), segment_length, rng, tail_margin=tail_margin)
        _show_segment(turn, segment, tokenizer, console)
    for report in checked:
        if report.faults is not None and report.faults.of_all:
            raise DatasetError(report.faults.of_all[0])
    refused = sum(report.faults.counts.total() for report in checked if report.faults is not None)
    if refused:
        raise DatasetError(
            f"{refused} of {sum(report.rows for report in checked)} rows are refused, for the reasons above: training "
            "would stop at the first. Fix or remove them."
        )


def regenerated_in_full(response_lengths: list[int], segment_length: float | None) -> list[str]:
    """Say how many responses the segment covers entirely, and the way out when they are many.

    Args:
        response_lengths: tokens of each response, each at least 1.
        segment_length: see `segments.segment_tokens`.
    """
    total = len(response_lengths)
    if segment_length is None:
        return [f"All {total} responses are regenerated in full (segment_length=none)."]
    whole = sum(segment_tokens(length, segment_length) >= length for length in response_lengths)
    share = whole / total if total else 0.0
    if not whole:
        return ["Every response is longer than its segment, so a part of each is kept."]
    lines = [
        f"In {whole} of {total} responses ({share_text(share)}) the segment is as long as the response, so all of it "
        "is regenerated."
    ]
    if share > WHOLE_SHARE_HINT:
        lines.append("To keep a part of each, give the segment as a fraction of the response: --segment_length 0.3")
    return lines


def _length_table(prompts: list[int], responses: list[int]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens")
    table.add_column("prompt", justify="right")
    table.add_column("response", justify="right")
    for label, percent in (("min", 0), ("50%", 50), ("90%", 90), ("99%", 99), ("max", 100)):
        table.add_row(label, *(str(percentile(sorted(lengths), percent)) for lengths in (prompts, responses)))
    return table


def _title(example: Example, turn: Turn, reports: Sequence[DataReport]) -> str:
    title = row_name(example.row, reports)
    return f"{title}, reply {turn.index + 1}" if turn.index else title


def _show_segment(turn: Turn, segment: Segment, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    response = turn.response_ids
    head, tail = response[: segment.start], response[segment.stop :]
    inside_ids = response[segment.start : segment.stop]
    prompt, before, inside, after = _pieces(tokenizer, [turn.prompt_ids, head, inside_ids, tail])
    opening, closing = _brackets(console)
    text = Text()
    text.append_text(_safe(_shorten(before, keep_end=True), console, "green"))
    text.append(opening, "bold magenta")
    text.append_text(_safe(_shorten(inside), console, "magenta"))
    text.append(closing, "bold magenta")
    text.append_text(_safe(_shorten(after), console, "cyan"))
    counts = f"A {len(head)}, B {len(segment)}, C {len(tail)} tokens"
    console.print(Text(f"prompt ({len(turn.prompt_ids)} tokens):", "bold"))
    console.print(_safe(_shorten(prompt, keep_end=True), console, "dim"))
    if turn.opponent_prompt_ids is not None:
        console.print(Text(f"the opponent's prompt ({len(turn.opponent_prompt_ids)} tokens):", "bold"))
        console.print(_safe(_shorten(tokenizer.decode(list(turn.opponent_prompt_ids))), console, "dim"))
    console.print(Text(f"response ({counts}; the opponent regenerates {opening}B{closing}):", "bold"))
    console.print(text)


def _show_pair(turn: Turn, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    prompt, chosen = _pieces(tokenizer, [turn.prompt_ids, turn.response_ids])
    _, rejected = _pieces(tokenizer, [turn.prompt_ids, turn.rejected_ids or ()])
    shown = (("prompt", _shorten(prompt, keep_end=True), "dim"), ("chosen", chosen, "green"))
    for label, piece, style in (*shown, ("rejected", rejected, "magenta")):
        console.print(Text(f"{label}:", "bold"))
        console.print(_safe(_shorten(piece), console, style))


def _pieces(tokenizer: PreTrainedTokenizerBase, parts: list[tuple[int, ...]]) -> list[str]:
    """Decode parts that follow one another, keeping the spaces between them.

    Decoded alone, a part loses the space it starts with in some vocabularies; so each is what it adds.
    """
    texts: list[str] = []
    ids: list[int] = []
    before = ""
    for part in parts:
        ids += part
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        # A character whose bytes lie in two parts decodes differently once it is complete.
        texts.append(whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(part)))
        before = whole
    return texts


def _brackets(console: Console) -> tuple[str, str]:
    try:
        "⟦⟧".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return "[[", "]]"
    return "⟦", "⟧"


def _shorten(text: str, *, keep_end: bool = False) -> str:
    """A text of at most `_SHOWN` characters and a note: without its middle, or its beginning."""
    left_out = len(text) - _SHOWN
    if left_out <= 0:
        return text
    note = f"[{left_out} more characters]"
    if keep_end:
        return f"{note} {text[left_out:]}"
    return f"{text[: _SHOWN // 2]} {note} {text[len(text) - _SHOWN // 2 :]}"


def _safe(text: str, console: Console, style: str = "") -> Text:
    return Text(visible(text, console.encoding), style)
