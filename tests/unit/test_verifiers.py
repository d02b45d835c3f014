import textwrap

import pytest

from sapo.errors import ConfigurationError, DatasetError
from sapo.evaluation.task_files import load_task_file
from sapo.evaluation.verifiers import exact_match, last_number, make_verifier, numeric


def test_exact_match_looks_past_white_space_alone():
    assert exact_match(" Paris \n", "Paris")
    assert not exact_match("paris", "Paris")
    assert exact_match("paris", "Paris", ignore_case=True)
    assert not exact_match("Paris.", "Paris")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 18.", 18),
        ("#### 1,234", 1234),
        ("from 3 to -2.5e2", -250),
        ("1,2 and 3", 3),
        (".5", 0.5),
        ("none", None),
        ("$1,000,000.75!", 1000000.75),
    ],
)
def test_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_numeric_compares_the_last_numbers():
    assert numeric("16 - 3 - 4 = 9, so 9 x 2 = $18", "She makes 9 * 2 = 18.\n#### 18")
    assert not numeric("18, or rather 19", "18")
    assert not numeric("eighteen", "18")
    assert numeric("0.3333333", "0.33333333")


def verify(tmp_path, response, row, **task):
    return make_verifier(task, "here", tmp_path)(response, row)


def test_regex_searches_and_with_an_answer_compares_the_group(tmp_path):
    assert verify(tmp_path, "yes.", {}, verifier="regex", pattern="^yes") == 1
    assert verify(tmp_path, "oh yes.", {}, verifier="regex", pattern="^yes") == 0
    task = {"verifier": "regex", "pattern": r"answer is (\w+)"}
    assert verify(tmp_path, "the answer is A. No, the answer is B.", {"answer": "B"}, **task) == 1
    assert verify(tmp_path, "the answer is A", {"answer": "B"}, **task) == 0
    assert verify(tmp_path, "abc", {"pattern": "b"}, verifier="regex") == 1


def test_callable_by_import_path_gets_response_and_row(tmp_path):
    (tmp_path / "own_rules.py").write_text("def longer(response, row):\n    return len(response) > row['least']\n")
    assert verify(tmp_path, "abcd", {"least": 3}, verifier="own_rules:longer") == 1
    assert verify(tmp_path, "ab", {"least": 3}, verifier="own_rules:longer") == 0


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"verifier": "magic"}, "exact_match, regex, numeric"),
        ({"verifier": "regex", "pattern": "("}, "not a regular expression"),
        ({"verifier": "no_such_module_here:f"}, "cannot be imported"),
        ({"verifier": "json:nothing"}, "no function nothing"),
    ],
)
def test_wrong_verifiers_are_refused_before_anything_runs(tmp_path, task, says):
    with pytest.raises(ConfigurationError, match=says):
        make_verifier(task, "here", tmp_path)


def test_callable_must_give_a_share(tmp_path):
    (tmp_path / "odd_rules.py").write_text("def two(response, row):\n    return 2\n")
    with pytest.raises(DatasetError, match="between 0 and 1"):
        verify(tmp_path, "3", {}, verifier="odd_rules:two")


def write(tmp_path, yaml, rows='{"prompt": "1 + 1 =", "answer": "2"}\n'):
    (tmp_path / "rows.jsonl").write_text(rows)
    file = tmp_path / "task.yaml"
    file.write_text(textwrap.dedent(yaml))
    return file


def test_task_file_with_several_tasks(tmp_path):
    file = write(
        tmp_path,
        """
        tasks:
          - {name: sums, data: rows.jsonl, verifier: numeric, max_new_tokens: 8}
          - {name: words, data: rows.jsonl, stop: ["\\n"], chat: false}
        """,
    )
    sums, words = load_task_file(file)
    assert (sums.name, sums.max_new_tokens, sums.chat) == ("sums", 8, None)
    assert (words.stop, words.chat) == (("\n",), False)
    assert sums.verify("it is 2", sums.rows[0]) == 1


@pytest.mark.parametrize(
    ("yaml", "rows", "says"),
    [
        ("name: a\ndata: rows.jsonl\nverifer: numeric\n", None, "unknown option verifer"),
        ("data: rows.jsonl\n", None, "name is missing"),
        ("name: a\n", None, "data is missing"),
        ("name: a\ndata: rows.jsonl\n", '{"prompt": "x"}\n', 'has no "answer"'),
        ("name: a\ndata: rows.jsonl\n", '{"answer": "x"}\n', 'needs "prompt"'),
        ("name: a\ndata: rows.jsonl\nverifier: regex\n", '{"prompt": "x"}\n', 'has no "pattern"'),
        ("name: a\ndata: nothing.jsonl\n", None, "no file or folder"),
        ("[1, 2]\n", None, "tasks"),
        ("a: [\n", None, "not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_task_file_is_said_before_a_model_loads(tmp_path, yaml, rows, says):
    file = write(tmp_path, yaml) if rows is None else write(tmp_path, yaml, rows)
    with pytest.raises((ConfigurationError, DatasetError), match=says):
        load_task_file(file)
