"""What a run shows on a terminal, in a file, and when it is asked to be quiet."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import PrinterCallback, TrainerState
from transformers.trainer_callback import CallbackHandler

from sapo.preference.pairs import Pair
from sapo.preference.segments import Segment
from sapo.training.progress import Status, TerminalProgress, pair_table, print_headlines
from tests.tiny import byte_tokenizer

LOGS = {"loss": 0.5, "rewards/margins": 1.0, "rewards/accuracies": 0.75}


def shown(width=40, **options):
    out = io.StringIO()
    console = Console(file=out, width=width, **options)
    tokenizer = byte_tokenizer()
    ids = tuple(tokenizer.encode("\x1b[2J[red]hi[/red]", add_special_tokens=False))
    pair = Pair(0, 0, ids, ids, ids, Segment(1, 3), Segment(1, 3))
    trainer = SimpleNamespace(processing_class=tokenizer, last_pairs=[pair])
    progress = TerminalProgress(
        console, trainer.processing_class, lambda: trainer.last_pairs, log_pairs_steps=1, pairs=1
    )
    state = SimpleNamespace(global_step=0, max_steps=4)
    progress.on_train_begin(None, state, None)
    for step in (1, 2):
        state.global_step = step
        progress.on_step_end(None, state, None)
        progress.on_log(None, state, None, logs=LOGS)
    progress.on_train_end(None, state, None)
    return out.getvalue()


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}])
def test_where_there_is_no_terminal_a_log_is_one_plain_line(options):
    lines = [line for line in shown(**options).splitlines() if line.startswith("step ")]
    pattern = r"step 2/4  loss 0.5  margin 1  accuracy 0.75  [\d.e-]+ s/step  left 0:00:0\d"
    assert len(lines) == 2
    assert re.fullmatch(pattern, lines[1])


@pytest.mark.parametrize("width", [30, 40, 80, 120])
def test_a_terminal_of_any_width_gets_steps_time_left_and_whole_numbers(width):
    text = shown(width=width, force_terminal=True)
    lines = re.sub(r"\x1b\[[\d;?]*\w", "", text).replace("\r", "\n").splitlines()
    (last,) = [line for line in lines if line.startswith("step 2/4")][-1:]
    assert re.search(r"\d:\d\d:\d\d left(  [\d.e-]+ s/step)?", last)
    assert ("━" in last and "s/step" in last) == (width >= 80)
    assert any(re.fullmatch(r"loss 0\.5  margin 1(  accuracy 0\.75)?", line.strip()) for line in lines)
    assert all(len(line) <= width for line in lines if "step 2/4" in line or "loss" in line)
    assert "…" not in text


@pytest.mark.parametrize("width", [30, 80])
def test_the_bar_has_as_many_lines_before_the_first_numbers_as_after(width):
    """Else a bar is left behind where a line is printed while the bar is drawn by its own thread."""
    console, heights = Console(file=io.StringIO(), width=width, force_terminal=True), set()
    status = Status(1, 4)
    for numbers in ([], ["loss 0.5"], ["loss 0.5", "margin 1", "accuracy 0.75", "chosen change 0.1"]):
        for status.seconds in (0.0, 1.5):
            status.numbers = numbers
            heights.add(len(console.render_lines(status)))
    assert heights == {2}


def test_no_color_means_none():
    assert "\x1b[3" in shown(force_terminal=True, color_system="standard", _environ={})
    plain = shown(force_terminal=True, color_system="standard", _environ={"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[\d;]*(3[0-7]|9[0-7]|38)[;m]", plain)


def test_quiet_says_nothing():
    assert shown(quiet=True) == ""
    assert shown(quiet=True, force_terminal=True) == ""


def test_model_text_cannot_drive_the_terminal_or_its_markup():
    text = shown(width=140, force_terminal=True)
    assert "\x1b[2J" not in text
    assert "[red]" in re.sub(r"\x1b\[[\d;?]*\w", "", text)


def test_a_pair_is_a_row_with_its_segment_marked():
    tokenizer = byte_tokenizer()
    ids = tuple(tokenizer.encode("abcdef", add_special_tokens=False))
    out = io.StringIO()
    table = pair_table([Pair(0, 0, ids, ids, ids[:4], Segment(2, 4), Segment(2, 4))], tokenizer, 7)
    Console(file=out, width=80).print(table)
    assert "pairs drawn at step 7" in out.getvalue()
    assert "ab⟦cd⟧ef" in out.getvalue()


def test_a_long_prompt_is_shown_from_the_beginning_of_a_word_and_a_pair_once():
    tokenizer = byte_tokenizer()
    prompt, ids = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("elephant " * 30, "ab"))
    pair = Pair(0, 0, prompt, ids, ids, Segment(0, 1), Segment(0, 1))
    out = io.StringIO()
    progress = TerminalProgress(Console(file=out, width=400), tokenizer, lambda: [pair] * 4, log_pairs_steps=1, pairs=3)
    state = SimpleNamespace(global_step=0, max_steps=4)
    progress.on_train_begin(None, state, None)
    state.global_step = 1
    progress.on_step_end(None, state, None)
    assert out.getvalue().count("⟦a⟧b") == 2  # once as chosen, once as rejected
    assert " ... elephant elephant" in out.getvalue()


def test_a_script_prints_the_key_figures_of_a_log_line_and_all_of_others(capsys):
    trainer = SimpleNamespace(callback_handler=CallbackHandler([PrinterCallback], None, None, None, None))
    print_headlines(trainer)
    (printer,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, PrinterCallback)]
    logs = {"loss": 0.5, "rewards/margins": 0.25, "time/step": 1.0, "replay/size": 3.0, "epoch": 1.0}
    printer.on_log(None, TrainerState(), None, logs=dict(logs))
    assert capsys.readouterr().out == "{'loss': '0.5', 'rewards/margins': '0.25', 'epoch': '1'}\n"
    printer.on_log(None, TrainerState(), None, logs={"train_runtime": 2.0})
    assert capsys.readouterr().out == "{'train_runtime': '2'}\n"
    # As transformers removes it, and `sapo train` does.
    trainer.callback_handler.remove_callback(PrinterCallback)
    assert printer not in trainer.callback_handler.callbacks
