"""The README's order and examples; that its commands run is in test_docs.py."""

import re

from tests.integration import pages
from tests.integration.pages import ROOT

README = ROOT / "README.md"


def test_the_first_screens_have_idea_install_and_a_run_in_that_order():
    text = README.read_text(encoding="utf-8")
    places = [text.index(part) for part in ("docs/images/idea.svg", "python3 -m venv", "pip install", "sapo train")]
    assert places == sorted(places)
    assert places[-1] < text.index("## Results")


def test_the_shell_example_is_three_commands_and_the_python_example_is_short():
    examples = [block for block in pages.blocks(README) if "sapo train" in block.text]
    assert len(re.findall(r"^sapo ", examples[0].text, re.MULTILINE)) == 3
    (python,) = [block for block in pages.blocks(README) if block.kind == "python"]
    assert len(python.text.strip().splitlines()) <= 12


def test_it_says_where_self_play_does_not_help():
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## When to use it") :]
    assert "docs/results.md" in section[: section.index("\n## ", 5)]
