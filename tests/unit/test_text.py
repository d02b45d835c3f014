"""Nothing that is printed drives the terminal, and numbers are spelled in one way."""

import sys

import pytest

from sapo.errors import brief
from sapo.text.escape import visible
from sapo.text.numbers import bytes_text, count_text, duration_text, number_text


def test_no_control_or_format_character_gets_through():
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = visible(text)
    assert not {
        char for char in shown if not char.isprintable() and char not in "\n\u200c\u200d" and not char.isspace()
    }
    assert not set(shown) & set("\x00\x07\x08\t\r\x1b\x7f\x9b\u2028\u202e\u2066\ufeff")
    assert visible("\x1b[2J\u202eabc") == "\\x1b[2J\\u202eabc"


def test_text_that_is_meant_to_be_read_stays_as_it_is():
    for text in ("naïve 日本語\n🙂", "a\u00a0b\u3000c", "\u0645\u06cc\u200c\u062e", "👨\u200d👩\u200d👧", ""):
        assert visible(text) == text


def test_what_the_encoding_does_not_have_is_spelled_out():
    assert visible("é⟦x⟧", "latin-1") == "é\\u27e6x\\u27e7"
    assert visible("é", "no such encoding") == "\\xe9"


def test_a_quoted_error_is_one_short_line():
    assert brief("one\n two\t\x1b[31m") == "one two \\x1b[31m"
    assert len(brief("x" * 1000, 50)) == 50


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (number_text(0.123456), "0.123"),
        (number_text(12345.6), "12,346"),
        (number_text(-9999.4, 4), "-9999"),
        (number_text(None), "-"),
        (number_text(float("nan")), "nan"),
        (count_text(7_241_732_096), "7.24 B"),
        (bytes_text(141e9), "141.00 GB"),
        (bytes_text(5e6), "5.00 MB"),
        (duration_text(59.6), "1 min 0 s"),
        (duration_text(3700), "1 h 1 min"),
    ],
)
def test_numbers(found, expected):
    assert found == expected
