"""Laws of tables: whatever the width, nothing is cut and nothing is wider than the terminal."""

import io
import re

import pytest
from rich.console import Console

from sapo.evaluation.results import SuiteResult
from sapo.evaluation.table import direction, is_significant, show, verdict
from sapo.evaluation.targets import Target
from sapo.measures.intervals import Estimate
from sapo.text.numbers import error_text
from sapo.text.terminal import print_table, say


def printed(width, rows, encoding="utf-8"):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_table(Console(file=out, width=width), "title", rows)
    out.flush()
    return out.buffer.getvalue().decode(encoding)


ROWS = [
    ["name", *(f"run-{i}" for i in range(6))],
    ["a/metric/with/a/name_that_is_longer_than_a_column", *("1.2345 ±0.0012" for _ in range(6))],
    ["output", *("/a/path/" + "deep/" * 8 for _ in range(6))],
    ["[bold]text[/bold] \x1b[2J", *("x" for _ in range(6))],
]


@pytest.mark.parametrize("width", [40, 80, 120, 400])
def test_a_table_fits_and_has_every_cell(width):
    text = printed(width, ROWS)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert len(re.findall(r"1\.2345 ±0\.0012", text)) == 6
    whole = re.sub(r"\s", "", text)
    assert whole.count("/a/path/") == 6
    assert "a/metric/with/a/" in whole
    assert "longer_than_a_column" in whole
    assert "[bold]text[/bold]" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", range(52, 100))
def test_a_name_that_fits_its_column_is_whole_at_any_width(width):
    name = "↑ prefers_data_to_own_per_token"
    rows = [["measure", "start", "mine policy", "data"], [name, "0.094 ±0.050", "-0.171 ±0.022*..", "0.1784 ±0.0087"]]
    shown = printed(width, rows)
    assert name in shown
    assert all(cell in shown for cell in rows[1])
    assert (shown.count("measure") == 1) == (width >= max(map(len, printed(200, rows).splitlines())))


def test_a_table_needs_no_unicode():
    printed(80, ROWS[:1] + ROWS[2:], "ascii")


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (7.01842, 0.33451, "7.02 ±0.33"),
        (0.5, None, "0.5"),
        (1.0, 0.0, "1 ±0"),
        (1234.5, 56.7, "1234 ±57"),
        (0.00123456, 0.0000001, "0.0012 ±0.0000"),
    ],
)
def test_a_value_has_the_digits_of_its_error(value, stderr, text):
    assert error_text(value, stderr) == text


def estimate(value, stderr=0.01, count=200):
    return Estimate(value, stderr, None, None, count)


def test_the_verdict_follows_what_changed_beyond_chance():
    down, up, none = estimate(-0.1), estimate(0.1), estimate(0.01)
    assert "better than the start: the likelihood of held-out" in verdict("local", {"nll": down, "ended": none})
    assert verdict("local", {"nll": none}) == "no change from the start beyond chance, on 200 examples."
    assert "worse than the start" in verdict("local", {"nll": up})
    mixed = verdict("local", {"nll": down, "ended": down, "loops": down})
    assert re.match(r"mixed: the likelihood.* and .*loop.* improved, but .*responses that end .* worsened", mixed)
    assert "better than the start: sums (+0.100 ±0.010)" in verdict("sums", {"sums": up})
    assert "errors themselves are rough" in verdict("local", {"nll": estimate(-0.1, count=8)})
    few = estimate(-0.1, count=4)
    assert verdict("local", {"nll": few}) == "none, 4 examples are too few. Evaluate on 30 rows or more."
    assert not is_significant(few)


def test_measures_of_length_have_no_better_side():
    assert direction("alpaca_eval", "length") == ""
    assert direction("local", "distinct_2") == "data"
    assert direction("leaderboard", "gsm8k") == "higher"


def test_the_table_of_models_has_what_decides_first_and_each_datum_once():
    names = ["length", "length_data", "nll", "ended", "ended_data", "loops", "prefers_data_to_opponent_per_token"]

    def result(shift):
        items = {"nll": {str(i): i % 7 + shift for i in range(40)}}
        return SuiteResult({name: estimate(shift) for name in names}, items, {}, ["a note"])

    roles = {"start": "start", "run policy": "policy", "run opponent": "opponent"}
    targets = [Target(name, name, role, run="run") for name, role in roles.items()]
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    show(console, "local", targets, {target.name: result(-place) for place, target in enumerate(targets)})
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = re.findall(r"^ ([↓↑=] \S+|  change)", text, re.MULTILINE)
    assert rows[:4] == ["↓ nll", "  change", "↑ ended", "↓ loops"]
    assert "ended_data" not in text
    assert text.index("Verdict on run policy: better than the start") < text.index("↓ nll")
    assert "a note" in text


def test_sentences_are_wrapped_at_words_on_a_terminal_alone():
    for terminal, most in ((True, 20), (False, 40)):
        out = io.StringIO()
        say(Console(file=out, width=20, force_terminal=terminal), "Nine words that do not fit into [one] line")
        assert max(map(len, out.getvalue().splitlines())) >= most - 8
        assert (len(out.getvalue().splitlines()) == 1) is not terminal
        assert " ".join(out.getvalue().split()) == "Nine words that do not fit into [one] line"


def test_a_distance_from_the_start_is_neither_better_nor_worse():
    change = {"kl_general": estimate(0.3), "nll_general": estimate(0.3), "ended": estimate(0.1), "loops": estimate(0.1)}
    text = verdict("retention", change)
    assert text.startswith("moved 0.3 nats per token on general prompts from the start; its own replies: mixed: ended")
    assert direction("retention", "kl_general") == direction("retention", "loops") == "lower"
    assert direction("retention", "length") == ""
