"""Laws of the generator that is a script, the fake of everything above generation."""

import pytest

from sapo.errors import ConfigurationError
from sapo.generation.scripted import GenerateCall, ScriptedGenerator


def test_scripted_replies_come_in_order_and_calls_are_kept():
    fake = ScriptedGenerator([[[7, 8]], [[], [9]]])
    assert fake.generate([(1, 2)], [2], [5]) == [[7, 8]]
    assert fake.generate([[1], [2]], [0, 3], [6, 7]) == [[], [9]]
    assert fake.calls == [GenerateCall([[1, 2]], [2], [5]), GenerateCall([[1], [2]], [0, 3], [6, 7])]
    with pytest.raises(ConfigurationError, match="call 2: the script has only 2 replies"):
        fake.generate([[1]], [1], [1])


def test_scripted_function_answers_every_call():
    fake = ScriptedGenerator(
        lambda contexts, budgets, seeds: [[seed] * budget for seed, budget in zip(seeds, budgets, strict=True)]
    )
    assert fake.generate([[1], [2]], [1, 2], [8, 9]) == [[8], [9, 9]]
    assert fake.generate([[1]], [0], [8]) == [[]]
    assert len(fake.calls) == 2


def test_scripted_reply_must_fit_the_request():
    with pytest.raises(ConfigurationError, match="call 0: the script has 1 rows for 2 contexts"):
        ScriptedGenerator([[[7]]]).generate([[1], [2]], [1, 1], [1, 2])
    with pytest.raises(ConfigurationError, match="call 0, row 0: the reply has 2 tokens, the budget is 1"):
        ScriptedGenerator([[[7, 8]]]).generate([[1]], [1], [1])
