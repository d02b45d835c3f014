"""A verdict is what the judge gives, not what it thinks, quotes or considers; what is unclear is never guessed."""

import math

import pytest

from sapo.evaluation.alpaca_eval import preference
from sapo.evaluation.verdicts import rating, without_thinking


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # The last one in the agreed form.
        ("Rating: [[3]]\nOn second thoughts it is wrong.\nRating: [[2]]", 2),
        ("The rubric says [[1]] is worst and [[10]] best. It helps. Rating: [[4]]", 4),
        ("**Rating:** [[8]]", 8),
        ("**Rating: [[8.5]]**\n\nIt is thorough.", 8.5),
        ("Score = [[6]] because the second half is missing", 6),
        ("Good work.\n\n[[7]]\n\nIt could be shorter.", 7),
        ("A fine answer, so I give it [[9]].", 9),
        ('My verdict: "[[5]]"', 5),
        ("The answer follows the format 'Rating: [[5]]'. It is poor.\nRating: [[2]]", 2),
        ("Rating: [6]", 6),
        # A rubric restated is no verdict.
        ("The scale goes from [[1]] to [[10]] and a good answer gets more.", None),
        ("The rubric says [[1]] is worst", None),
        ("It is clear. The scale goes from [[1]] to [[10]].", None),
        ("It cannot be rated. The maximum is 10, that is 9 out of [[10]]", None),
        ('I must answer in the format "[[rating]]", for example: "Rating: [[5]]".', None),
        ("[[1]] is the lowest, [[10]] the highest rating, and this one", None),
        ("As instructed, e.g. [[5]]", None),
        # Reasoning is no verdict.
        ("<think>Rating: [[9]]? No.</think>Rating: [[3]]", 3),
        ("<think>Surely Rating: [[9]]</think>It is hard to tell.", None),
        ("<think>Rating: [[9]], or perhaps", None),
        ("Rating: [[9]] at first sight, but</think>\nRating: [[4]]", 4),
        ("[THINK]Rating: [[2]][/THINK]\n[[8]]", 8),
        ("<|channel|>analysis<|message|>Rating: [[1]]<|end|><|channel|>final<|message|>Rating: [[6]]", 6),
        ("◁think▷Rating: [[1]]◁/think▷Rating: [[6]]", 6),
        # Unclear, or no number of the scale.
        ("Rating: [[4]]\nOr rather\n[[9]]", None),
        ("Rating: [[11]]", None),
        ("Rating: [[0]]", None),
        ("Rating: [[7/10]]", None),
        ("Accuracy: [[8]]\nStyle: [[5]]", None),
        ("- **Accuracy**: [[8]]\n- **Style**: [[5]]\n- **Overall**: [[7]]", 7),
        ("A perfect answer would earn a rating: [[10]]. This one does not.", None),
        ("Rating: [[2]]. If it were correct I would say Rating: [[10]].", 2),
        ("I would rate this [[7]]", 7),
        ("See [3] and [4] for why this is wrong", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_rating_is_the_last_one_given(text, value):
    assert rating(text) == value


def test_text_without_marks_is_left_as_it_is():
    assert without_thinking("I think [[5]] is fair.\n") == "I think [[5]] is fair.\n"


def top(**chances):
    return {"top_logprobs": [[token, math.log(chance)] for token, chance in chances.items()]}


def test_a_judge_that_begins_to_reason_has_not_preferred():
    """The letters are among the likeliest tokens all the same, with a chance of next to nothing."""
    verdict = {"top_logprobs": [["<think>", -0.01], ["m", -9.0], ["M", -11.0]]}
    assert preference(verdict, model_first=True) is None
    assert preference(top(The=0.5, m=0.2, M=0.1), model_first=True) is None
    assert preference(top(m=0.6, M=0.3, The=0.1), model_first=True) == pytest.approx(2 / 3)
