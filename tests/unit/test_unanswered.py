"""A prompt without its reply is the prompt that training sees: no column of it is lost."""

import pytest

from sapo.data.unanswered import unanswered
from sapo.errors import DatasetError

Q = "Where is the key?"
ASKED = {"role": "user", "content": Q}
SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": "Here."}]
REPLY = {"role": "assistant", "content": "."}
KIND = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": Q, "completion": "Here."}, {"instruction": Q, "output": "."}),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Add.\n\n1 2", "output": "."}),
        ({"question": Q, "context": "A mat.", "answer": "Here."}, {"instruction": f"A mat.\n\n{Q}", "output": "."}),
        ({"question": Q, "system": "Be kind."}, {"messages": [KIND, ASKED, REPLY]}),
        ({"messages": [ASKED, {"role": "assistant", "content": "Here."}]}, {"messages": [ASKED, REPLY]}),
        ({"messages": [ASKED], "system": "Be kind.", "id": 7}, {"messages": [KIND, ASKED, REPLY]}),
        ({"conversations": SHAREGPT}, {"messages": [ASKED, REPLY]}),
        ({"messages": SHAREGPT}, {"messages": [ASKED, REPLY]}),
        ({"prompt": Q, "messages": [ASKED, {"role": "assistant", "content": "Here."}]}, {"messages": [ASKED, REPLY]}),
        ({"prompt": [ASKED], "chosen": "Here."}, {"messages": [ASKED, REPLY]}),
    ],
)  # fmt: skip
def test_what_belongs_to_a_prompt_is_asked_with_it(row, asked):
    assert unanswered([row], "x") == [asked]


def test_rows_of_several_shapes_become_messages():
    found = unanswered([{"prompt": Q}, {"prompt": Q, "system": "Be kind."}], "x")
    assert found == [{"messages": [ASKED, REPLY]}, {"messages": [KIND, ASKED, REPLY]}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a"}, "has no prompt"),
        ({"messages": [REPLY]}, "has no prompt"),
        ({"prompt": Q, "image": "a.png"}, "the columns image belong to the prompt"),
        ({"prompt": Q, "tools": [{"name": "f"}]}, "has tools, documents or chat_template_kwargs, which are not kept"),
        ({"messages": [{"role": "user", "content": " "}]}, "cannot be asked: empty user message"),
    ],
)
def test_a_prompt_that_would_lose_a_part_is_refused(row, said):
    with pytest.raises(DatasetError, match=f"row 2 of x: {said}"):
        unanswered([{"prompt": Q}, row], "x")
