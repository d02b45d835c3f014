"""Laws of hostile rows: each is accepted as tokens that the model knows, or refused in one line."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.loading import load_rows
from sapo.data.prepare import prepare_dataset
from sapo.errors import DatasetError, SapoError
from tests.faults.mutations import damaged, line, mutated
from tests.faults.trials import check_one_line, trials
from tests.prepared import CHATML, talk
from tests.tiny import byte_tokenizer

CORPUS = [
    [{"messages": talk("hi", "yo", "and you?", "fine", system="Be kind.")}],
    [{"messages": talk("call", "x"), "tools": '[{"name": "f"}]'}],
    [{"prompt": "Say it.", "completion": " It."}],
    [{"prompt": talk("Say it."), "completion": [{"role": "assistant", "content": "It."}]}],
    [{"prompt": "Say it.", "chosen": "It.", "rejected": "No."}],
    [{"chosen": talk("a", "b"), "rejected": talk("a", "c")}],
    [{"chosen": "Human: a\n\nAssistant: b c", "rejected": "Human: a\n\nAssistant: d"}],
    [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}],
    [{"instruction": "Add.", "input": "1 2", "output": "3"}],
    [{"question": "1 + 2?", "answer": "3"}],
    [{"messages": talk("one", "1")}, {"messages": talk("two", "2", "three", "3")}],
]
CHAT, PLAIN = byte_tokenizer(CHATML), byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@settings(max_examples=trials(400, 10_000), deadline=None, derandomize=True)
@given(st.integers(0, 2**63))
def test_a_mutated_row_is_accepted_or_refused_in_one_line(folder, seed):
    rng = random.Random(seed)
    rows = rng.choice(CORPUS)
    for _ in range(rng.randint(1, 3)):
        rows = [mutated(row, rng) for row in rows]
    content = b"\n".join(map(line, rows))
    if rng.random() < 0.3:
        content = damaged(content, rng)
    accepted_or_refused(folder / rng.choice(["rows.jsonl", "rows.json"]), content, rng)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
columns = ["messages", "prompt", "completion", "chosen", "rejected", "conversations", "instruction", "input", "output"]


@settings(max_examples=trials(100, 2_000), deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(st.sampled_from(columns), json_values, min_size=1), min_size=1, max_size=3))
def test_a_row_of_anything_is_accepted_or_refused_in_one_line(folder, rows):
    accepted_or_refused(folder / "any.jsonl", b"\n".join(map(line, rows)), random.Random(len(str(rows))))


def accepted_or_refused(file, content, rng):
    file.write_bytes(content)
    tokenizer = rng.choice([CHAT, PLAIN])
    turns = rng.choice(["last", "random", "all"])
    options = DataOptions(rng.choice([64, 4096]), 32, assistant_turns=turns, paired=rng.random() < 0.3)
    try:
        prepared, report = prepare_dataset(
            load_rows(file), tokenizer, options, eos_ids=eos_token_ids(tokenizer, None), source=file.name
        )
    except SapoError as error:
        check_one_line(error)
        return
    assert len(prepared) == report.kept > 0
    assert report.kept + sum(report.dropped.values()) >= report.rows
    for example in collate_examples(list(prepared))["examples"]:
        for turn in example.turns:
            everything = [*turn.prompt_ids, *turn.response_ids, *(turn.rejected_ids or ())]
            assert turn.prompt_ids
            assert turn.response_ids
            assert len(turn.prompt_ids) + len(turn.response_ids) <= options.max_length
            assert all(0 <= token < len(tokenizer) for token in everything)


HOSTILE_TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch /tmp/owned') }}",
    "mutation": "{{ messages.append(1) }}",
    "endless": "{% for i in range(10**9) %}x{% endfor %}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES)
def test_a_chat_template_that_reaches_out_is_refused_in_one_line(template):
    tokenizer = byte_tokenizer(HOSTILE_TEMPLATES[template])
    with pytest.raises(DatasetError, match="the chat template raised an error") as error:
        prepare_dataset(
            [{"messages": talk("a", "b")}], tokenizer, DataOptions(64, 32), eos_ids=eos_token_ids(tokenizer, None)
        )
    assert "\n" not in str(error.value)


def test_json_nested_beyond_reason_is_refused(tmp_path):
    file = tmp_path / "deep.jsonl"
    file.write_text('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(DatasetError, match="nested too deeply"):
        load_rows(file)
    file.write_text(json.dumps({"prompt": "a", "completion": "b" * 10}) + "\n" + '{"prompt": 1e999999}')
    assert len(load_rows(file)) == 2
