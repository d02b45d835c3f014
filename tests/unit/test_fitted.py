"""Laws of lines that fit a terminal."""

import shlex

import pytest

from sapo.text.fitted import fitted

LINES = (
    "Too few pairs for an accuracy, which takes 64 at the start and at the end of a run, and more of both.",
    "Evaluate:  sapo evaluate /runs/mine --suite local --dataset_name /data/my.jsonl --max_length 256 --limit 8",
    "Error: --dataset_name is missing. Example: sapo train --config laptop-lora --dataset_name 'my rows.jsonl'",
    'Error: gguf=q8_0: gguf not installed here. Run: pip install "sapo-llm[gguf]" && pip install another-package',
    "  two spaces before a sentence that goes on and on and on until it is too long for the terminal, and then on",
)


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("line", LINES)
def test_a_line_is_broken_between_words_and_loses_none(line, width):
    shown = fitted(line, width)
    assert shown.replace("\\\n", "").split() == line.split()
    assert max(map(len, shown.split("\n"))) <= width
    assert fitted(line, None) == line
    assert fitted(line, 200) == line


def test_a_command_can_be_pasted():
    command = LINES[1].partition(":  ")[2]
    pasted = fitted(LINES[1], 60).partition(":  ")[2]
    assert pasted.count("\n") >= 1
    assert shlex.split(pasted.replace("\\\n", "")) == shlex.split(command)
    assert fitted(f"  {command}", 60).splitlines()[0].endswith("\\")
    assert fitted(LINES[2], 60).splitlines()[1:][0].startswith("  sapo train --config")
    assert fitted(LINES[3], 60).endswith("      && pip install another-package")


def test_a_row_goes_on_in_its_last_column_or_below_its_first_where_that_is_too_narrow():
    row = "  sapo serve        start vLLM servers for training (for a result: vllm serve)"
    assert fitted(row, 60).splitlines() == [
        "  sapo serve        start vLLM servers for training (for a",
        "                    result: vllm serve)",
    ]
    assert [len(line) - len(line.lstrip()) for line in fitted(row, 40).splitlines()] == [2, 6, 6]


def test_a_flag_and_its_value_are_parted_only_where_both_are_too_long_for_a_line():
    command = "  sapo train --model_name_or_path my-own-sft-model --dataset_name my.jsonl"
    assert fitted(command, 40).splitlines() == [
        "  sapo train --model_name_or_path \\",
        "      my-own-sft-model \\",
        "      --dataset_name my.jsonl",
    ]
    assert fitted(fitted(command, 40), 40) == fitted(command, 40)


def test_a_line_of_python_is_left_as_it_is():
    for line in ("from transformers import AutoModelForCausalLM", f"model = AutoModel.from_pretrained('/{'a' * 40}')"):
        assert fitted(line, 30) == line


def test_what_has_no_space_stays_beside_its_label():
    line = f"Policy:    /{'a' * 100}"
    assert fitted(line, 40) == line
