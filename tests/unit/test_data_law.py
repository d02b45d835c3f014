"""The law of all shapes: a text is trained on, or its row is counted as left out, or its column is listed."""

import itertools
import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.prepare import prepare_dataset
from sapo.errors import DatasetError, TokenizerError
from tests.tiny import byte_tokenizer
from tests.unit.test_data_prepare import CHATML

CHAT, PLAIN = byte_tokenizer(CHATML), byte_tokenizer()
TOOLS = byte_tokenizer("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML)
WORD = re.compile(r"w\d+q")


@st.composite
def texts(draw):
    # A word that occurs nowhere else is put in place of the number sign.
    return draw(
        st.sampled_from(["#", "# and four more words", "  #\n", "one # two", "## #", "#.", "# #", "a #", "#!", ""])
    )


def wrapped(kind, role, content):
    if kind == "sharegpt":
        return {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}
    if kind == "parts":
        return {"role": role, "content": [{"type": "text", "text": content}]}
    return {"role": role, "content": content}


@st.composite
def talks(draw, last=("assistant",)):
    kind = draw(st.sampled_from(["plain", "sharegpt", "parts"]))
    roles = ["user", "assistant"] * draw(st.integers(1, 3))
    if draw(st.booleans()):
        roles.insert(0, "system")
    if last == ("user",):
        roles = roles[:-1]
    messages = [wrapped(kind, role, draw(texts())) for role in roles]
    for message in messages:
        extra = draw(st.sampled_from([{}, {}, {}, {"weight": 0}, {"train": True}, {"thought": "# in thought"}]))
        message.update(extra)
    return json.dumps(messages) if draw(st.integers(0, 9)) == 0 else messages


REPLY = st.one_of(texts(), talks().map(lambda talk: talk if isinstance(talk, str) else talk[-1:]))
SHAPES = {
    "messages": {"messages": talks()},
    "conversation": {"conversation": talks()},
    "completion": {"prompt": texts(), "completion": texts()},
    "mixed": {"prompt": st.one_of(texts(), talks(("user",))), "completion": REPLY},
    "alpaca": {"instruction": texts(), "input": texts(), "output": texts()},
    "question": {"question": texts(), "answer": texts()},
    "response": {"query": texts(), "response": texts()},
    "chosen": {"prompt": st.one_of(texts(), talks(("user",))), "chosen": REPLY, "rejected": REPLY},
    "whole": {"chosen": talks(), "rejected": talks()},
    "orca": {"question": texts(), "chosen": texts(), "rejected": texts()},
    "sharegpt": {"conversations": talks(("user",)), "chosen": REPLY, "rejected": REPLY},
    "spin": {"real": talks(), "generated": talks()},
    "ratings": {
        "instruction": texts(),
        "completions": st.lists(
            st.fixed_dictionaries({"response": texts(), "score": st.integers(0, 3)}), min_size=1, max_size=3
        ),
    },
    "text": {"text": st.sampled_from(["Human: #\nAssistant: #", "<|im_start|>user\n#<|im_start|>assistant\n#", "#"])},
}
EXTRAS = {
    "system": texts(),
    "context": texts(),
    "history": st.lists(st.tuples(texts(), texts()).map(list), max_size=2),
    "tools": st.just([{"name": "#"}]),
    "documents": st.just([{"text": "#"}]),
    "images": st.just(["#"]),
    "note": texts(),
    "meta": st.fixed_dictionaries({"inner": texts()}),
    "id": st.integers(),
    "weight": st.sampled_from([0, 1, 1, 0.5]),
    "label": st.sampled_from([True, True, False]),
    "passage": texts(),
}


@st.composite
def datasets_of_one_shape(draw):
    columns = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        extras = draw(st.lists(st.sampled_from(sorted(EXTRAS)), max_size=2, unique=True))
        rows.append(
            {name: draw(value) for name, value in columns.items()} | {name: draw(EXTRAS[name]) for name in extras}
        )
    numbers = itertools.count()
    return [json.loads(re.sub("#", lambda _: f"w{next(numbers)}q", json.dumps(row))) for row in rows]


def words(value):
    return WORD.findall(json.dumps(value))


@settings(max_examples=300, deadline=None)
@given(
    datasets_of_one_shape(),
    st.sampled_from([CHAT, PLAIN, TOOLS]),
    st.sampled_from(["last", "random", "all"]),
    st.booleans(),
)
def test_no_text_is_lost_without_a_word(rows, tokenizer, turns, paired):
    options = DataOptions(4096, 2048, assistant_turns=turns, paired=paired)
    try:
        prepared, report = prepare_dataset(
            rows, tokenizer, options, eos_ids=eos_token_ids(tokenizer, None), source="x", count_faults=True
        )
    except (DatasetError, TokenizerError):
        return  # of all rows: nothing is trained on
    kept = {}
    for example in collate_examples(list(prepared))["examples"]:
        for turn in example.turns:
            ids = [*turn.prompt_ids, *turn.response_ids, *(turn.rejected_ids or ())]
            kept.setdefault(example.row, []).append(tokenizer.decode(ids))
    left_out = {number - 1 for numbers in report.dropped_rows.values() for number in numbers}
    left_out |= {number - 1 for numbers in report.faults.rows.values() for number in numbers}
    listed = {re.split(r"[ .]", name)[0] for name in report.columns.unused}
    for number, row in enumerate(rows):
        if number not in kept:
            assert number in left_out
            continue
        said = "".join(kept[number])
        assert set(WORD.findall(said)) <= set(words(row))
        for name, value in row.items():
            thoughts = words(re.findall(r'"thought[^}]*', json.dumps(value).replace("\\", ""))) if value else []
            for word in words(value):
                # A reply of a kept row may be left out, and is counted; fields of messages are listed as theirs.
                allowed = name in listed or number in left_out or (word in thoughts and "messages" in listed)
                assert word in said or allowed, (name, word)
