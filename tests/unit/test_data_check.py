import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sapo.commands.data_check import check_data, regenerated_in_full
from sapo.data.examples import DataOptions
from sapo.data.prepare import prepare_dataset
from sapo.data.report import percentile
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def shown(rows, tokenizer, *, segment_length=5, width=80, encoding="utf-8", paired=False, color=None):
    options = DataOptions(4000, 2000, paired=paired)
    prepared, report = prepare_dataset(
        rows, tokenizer, options, eos_ids=[tokenizer.eos_token_id], source="talks [bold].jsonl"
    )
    sink = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = Console(file=sink, width=width, force_terminal=color is not None, color_system=color)
    check_data(prepared, [report], tokenizer, segment_length=segment_length, tail_margin=3, seed=0, console=console)
    sink.flush()
    return sink.buffer.getvalue().decode(encoding)


def test_check_reports_rows_lengths_and_example(tokenizer):
    rows = [{"prompt": "Once upon", "completion": " a time there was"}, {"prompt": "x", "completion": " "}]
    text = shown(rows, tokenizer)
    assert "talks [bold].jsonl: format prompt/completion, 2 rows, 1 example kept" in text
    assert "dropped 1: empty reply" in text
    assert "a part of each is kept" in text
    assert "Example: row 1 of talks" in text
    assert "min          9        18" in text


def test_parts_read_as_one_text_without_colour(tokenizer):
    text = shown([{"prompt": "Once", "completion": " upon a time there was"}], tokenizer)
    response = text.splitlines()[-1]
    before, rest = response.split("⟦")
    inside, after = rest.split("⟧")
    assert before + inside + after == " upon a time there was</s>"
    assert len(inside) == 5


def test_colour_marks_the_segment(tokenizer):
    text = shown([{"prompt": "Once", "completion": " upon a time there was"}], tokenizer, color="standard")
    assert "\x1b[35m" in text
    assert "\x1b" not in shown([{"prompt": "Once", "completion": "upon"}], tokenizer)


def test_data_can_neither_colour_nor_control_the_screen(tokenizer):
    hostile = "[red]hi[/red] :smile: \x1b[2J\r\u202e\x00"
    text = shown([{"prompt": hostile, "completion": hostile}], tokenizer, segment_length=None, width=200)
    assert text.count("[red]hi[/red] :smile: \\x1b[2J\\r\\u202e\\x00") == 2
    assert not set("\x1b\r\u202e\x00") & set(text)


def test_output_fits_an_ascii_terminal(tokenizer):
    text = shown([{"prompt": "naïve", "completion": "☃ café, and so on"}], tokenizer, encoding="ascii")
    assert "na\\xefve" in text
    assert "[[" in text
    assert "]]" in text


@pytest.mark.parametrize("width", [8, 20, 40])
def test_narrow_terminals_lose_nothing(tokenizer, width):
    text = shown([{"prompt": "Once", "completion": " upon a time there was"}], tokenizer, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "⟦" in text


def test_long_text_is_shortened(tokenizer):
    text = shown([{"prompt": "p" * 1500, "completion": "c" * 1500}], tokenizer, segment_length=0.5)
    assert text.count("p" * 60) <= 10
    assert "more characters]" in text


def test_pairs_are_shown_side_by_side(tokenizer):
    row = {"prompt": "Once", "chosen": " upon", "rejected": " never"}
    text = shown([row], tokenizer, paired=True)
    assert "regenerated" not in text
    assert text.splitlines()[-4:] == ["chosen:", " upon</s>", "rejected:", " never</s>"]


def test_many_whole_rewrites_get_a_hint():
    lines = regenerated_in_full([10, 300, 20, 400], 256)
    assert lines[0] == (
        "In 2 of 4 responses (50%) the segment is as long as the response, so all of it is regenerated."
    )
    assert "--segment_length 0.3" in lines[1]
    assert len(regenerated_in_full([10, *[300] * 9], 256)) == 1
    assert regenerated_in_full([10, 20], None) == ["All 2 responses are regenerated in full (segment_length=none)."]


@given(st.lists(st.integers(0, 999), min_size=1, max_size=50), st.integers(0, 100))
def test_percentile_covers_its_share(values, percent):
    ordered = sorted(values)
    found = percentile(ordered, percent)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    assert (percentile(ordered, 0), percentile(ordered, 100)) == (min(values), max(values))
