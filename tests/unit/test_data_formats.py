import pytest

from sapo.data.formats import detect_format, parse_row
from sapo.data.messages import Conversation, Dropped, PlainText
from sapo.errors import DatasetError

WHERE = "row 17 of train.jsonl"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def parse(row, *, paired=False, chat=True):
    layout = detect_format(row, paired=paired, source="train.jsonl")
    return parse_row(row, layout, paired=paired, chat=chat, where=WHERE)


def contents(conversation):
    return [message["content"] for message in conversation.messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt/completion"),
        ({"prompt": "a", "chosen": "b"}, "chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen"),
        ({"chosen": [], "rejected": []}, "chosen"),
        ({"conversations": [], "id": 3}, "conversations"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"question": "a", "answer": "b"}, "question/answer"),
        ({"messages": None, "question": "a", "answer": "b"}, "question/answer"),
        ({"messages": [], "prompt": "a", "chosen": [], "rejected": []}, "messages"),
    ],
)
def test_format_follows_columns(row, expected):
    assert detect_format(row, paired=False, source="x") == expected


def test_paired_prefers_chosen_over_messages():
    row = {"messages": [], "prompt": "a", "chosen": [], "rejected": []}
    assert detect_format(row, paired=True, source="x") == "chosen"


def test_unknown_format_lists_columns_and_accepted():
    with pytest.raises(DatasetError, match=r"x: unknown format.*columns body, title.*prompt \+ completion"):
        detect_format({"title": "a", "body": "b"}, paired=False, source="x")
    with pytest.raises(DatasetError, match='Is "complection" meant to be "completion"'):
        detect_format({"prompt": "a", "complection": "b"}, paired=False, source="x")


def test_paired_without_rejected_is_refused():
    with pytest.raises(DatasetError, match=r"has the columns chosen, prompt, but .* requires chosen and rejected"):
        detect_format({"prompt": "a", "chosen": "b"}, paired=True, source="x")


def test_row_of_other_format_is_named():
    with pytest.raises(DatasetError, match=r"row 17 of train\.jsonl: lacks completion.* it has prompt"):
        parse_row({"prompt": "a"}, "prompt/completion", paired=False, chat=True, where=WHERE)
    given = {"question": "a", "answer": "b"}
    with pytest.raises(DatasetError, match=r"row 17 of train\.jsonl: lacks completion.* it has answer, question"):
        parse_row(given, "prompt/completion", paired=False, chat=True, where=WHERE)


def test_messages_become_a_conversation():
    found = parse({"messages": [{"role": "system", "content": ""}, user("hi"), assistant("yo")], "tools": [{}]})
    assert contents(found) == ["", "hi", "yo"]
    assert found.tools == [{}]


def test_tools_may_be_json_text():
    row = {"messages": [user("hi"), assistant("yo")], "tools": '[{"name": "f"}]'}
    assert parse(row).tools == [{"name": "f"}]
    with pytest.raises(DatasetError, match=r'row 17 of train\.jsonl: "tools" is text but not valid JSON'):
        parse({**row, "tools": "{"})


def test_reply_that_only_calls_a_tool_is_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    tool = {"role": "tool", "content": ""}
    found = parse({"messages": [user("hi"), call, tool, assistant("done")]})
    assert contents(found) == ["hi", "", "", "done"]


def test_what_follows_the_last_reply_is_left_out_and_noted():
    notes = []
    row = {"messages": [user("a"), assistant("b"), user("c"), {"role": "tool", "content": "d"}]}
    found = parse_row(row, "messages", paired=False, chat=True, where=WHERE, note=notes.append)
    assert contents(found) == ["a", "b"]
    assert notes == ["messages after the last reply are left out"]
    whole = {"chosen": [user("a"), assistant("b"), user("c")], "rejected": [user("a"), assistant("z"), user("c")]}
    for row in (whole, whole | {"chosen": whole["chosen"][:2]}, whole | {"rejected": [*whole["rejected"], user("y")]}):
        notes.clear()
        found = parse_row(row, "chosen", paired=True, chat=True, where=WHERE, note=notes.append)
        assert (contents(found), found.rejected) == (["a", "b"], assistant("z"))
        assert notes == ["messages after the last reply are left out"]


def test_a_reply_that_is_none_of_the_assistants_is_refused():
    with pytest.raises(DatasetError) as caught:
        parse({"prompt": [user("a"), assistant("b"), user("c")], "completion": [user("d")]})
    assert str(caught.value) == (
        'row 17 of train.jsonl: "completion" ends with role "user"; the last message must be the assistant\'s.'
    )


@pytest.mark.parametrize(
    ("scores", "names"),
    [
        ({"score_chosen": 3, "score_rejected": 7.5}, "score_chosen < score_rejected"),
        ({"chosen_score": "3", "rejected_score": "7"}, "chosen_score < rejected_score"),
        ({"chosen-rating": 1, "rejected-rating": 2}, "chosen-rating < rejected-rating"),
        ({"chosen_avg_rating": 1, "rejected_avg_rating": 2}, "chosen_avg_rating < rejected_avg_rating"),
        ({"chosenScore": 1, "rejectedScore": 2}, "chosenScore < rejectedScore"),
        ({"rewards": {"chosen": -2.0, "rejected": -1.0}}, "rewards.chosen < rewards.rejected"),
        ({"margin": -0.5}, "margin < 0"),
        ({"Score diff": "-1"}, "Score diff < 0"),
        ({"score_chosen": 3, "score_rejected": 3}, None),
        ({"score_chosen": 3, "score_rejected": None}, None),
        ({"chosen_brevity_score": 1, "rejected_brevity_score": 2}, None),
        ({"chosen_rank": 1, "rejected_rank": 2, "margin": 0, "delta": float("nan")}, None),
    ],
)
def test_a_chosen_reply_that_is_rated_lower_is_noted(scores, names):
    notes = []
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": [user("a"), assistant("b")]}):
        row = row | scores
        parse_row(row, "chosen", paired="prompt" in row, chat=True, where=WHERE, note=notes.append)
    expected = f"warning: the chosen reply is rated lower than the rejected one ({names})"
    assert notes == ([] if names is None else [expected] * 2)


def test_scores_in_the_last_messages_are_compared_too():
    notes = []
    sides = {"chosen": {**assistant("b"), "score": 1}, "rejected": {**assistant("c"), "score": 4}}
    row = {"prompt": [user("a")]} | {name: [{**user("a"), "score": 9}, side] for name, side in sides.items()}
    parse_row(row, "chosen", paired=True, chat=True, where=WHERE, note=notes.append)
    assert notes == ["warning: the chosen reply is rated lower than the rejected one (chosen.score < rejected.score)"]


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([{"role": "narrator", "content": "x"}, assistant("b")], 'message 1 .* unknown role "narrator"'),
        ([{"content": "x"}, assistant("b")], "message 1 .* has no role"),
        ([{"role": "asistant", "content": "x"}], 'unknown role "asistant"; nearest: assistant.'),
        ([{"role": 3, "content": "x"}], "unknown role 3; known are assistant"),
        ([user([{"type": "image_url"}]), assistant("b")], 'message 1 .* a part of type "image_url" in its content'),
        ([user([{"type": "text"}]), assistant("b")], 'message 1 .* a part of type "text" in its content'),
        ([user([{"degrees": 20}]), assistant("b")], "message 1 .* an object as a part in its content"),
        ([user([7]), assistant("b")], "has the int 7 as a part in its content"),
        ([{"role": "user", "text": "hi"}, assistant("b")], "message 1 .* has no content; its fields are role, text"),
        ([user(7), assistant("b")], "has the int 7 as content"),
        (["hello"], 'message 1 of "messages" is text'),
        ([], "empty list"),
        ("hello", '"messages" is text; it must be a list'),
        ([user("only a question")], "no assistant message"),
    ],
)
def test_structural_fault_names_row(messages, fault):
    with pytest.raises(DatasetError, match=f"^row 17 of train.jsonl: .*{fault}"):
        parse({"messages": messages})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("hi"), assistant(" \n")]}, "empty reply"),
        ({"messages": [user("hi"), assistant(""), user("so?"), assistant("x")]}, "empty reply"),
        ({"messages": [user(" "), assistant("x")]}, "empty user message"),
        ({"prompt": "a", "completion": " "}, "empty reply"),
        ({"question": "a", "answer": ""}, "empty reply"),
        ({"instruction": " ", "output": "b"}, "empty prompt"),
        ({"messages": [user("hi"), assistant(None)]}, "empty reply"),
        ({"messages": [user(None), assistant("b")]}, "empty user message"),
    ],
)
def test_empty_text_drops_the_row(row, reason):
    assert parse(row) == Dropped(reason)


def test_sharegpt_roles_are_translated():
    row = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
    }
    found = parse(row)
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant"]
    assert contents(found) == ["Be brief.", "hi", "yo"]


def test_plain_prompt_and_completion_stay_plain():
    assert parse({"prompt": "a", "completion": "b"}) == PlainText("a", "b")


def test_prompt_messages_are_not_learnt_from():
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    found = parse(row)
    assert contents(found) == ["a", "b", "c", "d"]
    assert found.first == 3


@pytest.mark.parametrize("reply", ["d", [assistant("d")]])
@pytest.mark.parametrize("prompt", ["c", [user("c")]])
def test_prompt_and_reply_may_mix_text_and_messages(prompt, reply):
    found = parse({"prompt": prompt, "chosen": reply})
    if isinstance(prompt, str) and isinstance(reply, str):
        assert found == PlainText("c", "d")
    else:
        assert contents(found) == ["c", "d"]


@pytest.mark.parametrize("prompt", [{}, {"prompt": "a"}, {"prompt": [user("a")]}])
def test_chosen_may_repeat_the_prompt(prompt):
    chosen = [user("a"), assistant("good")]
    rejected = [user("a"), assistant("bad")]
    found = parse({**prompt, "chosen": chosen, "rejected": rejected}, paired=True)
    assert contents(found) == ["a", "good"]
    assert found.rejected == assistant("bad")
    assert contents(parse({**prompt, "chosen": chosen})) == ["a", "good"]


@pytest.mark.parametrize("rejected", ["bad", [assistant("bad")], [user("a"), assistant("bad")]])
@pytest.mark.parametrize("chosen", ["good", [assistant("good")], [user("a"), assistant("good")]])
def test_pair_sides_may_differ_in_shape(chosen, rejected):
    found = parse({"prompt": [user("a")], "chosen": chosen, "rejected": rejected}, paired=True)
    assert contents(found) == ["a", "good"]
    assert found.rejected == assistant("bad")


def test_scores_beside_the_content_do_not_separate_a_pair():
    chosen = [{**user("a"), "score": 1}, assistant("good")]
    rejected = [{**user("a"), "score": 2}, assistant("bad")]
    assert isinstance(parse({"chosen": chosen, "rejected": rejected}, paired=True), Conversation)


def test_pair_that_parts_before_the_last_reply_is_dropped():
    row = {"chosen": [user("a"), assistant("b")], "rejected": [user("z"), assistant("b")]}
    assert parse(row, paired=True) == Dropped("chosen and rejected differ before the last reply")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: hi A: yes", "Q: hi A: no", "Q: hi A:"),
        ("Q: hi A: yes", "Q: hi A: yellow", "Q: hi A:"),
        ("Q\nyes", "Q\nno", "Q"),
        ("yes", "no", ""),
    ],
)
def test_shared_text_is_the_prompt(chosen, rejected, prompt):
    row = {"chosen": chosen, "rejected": rejected}
    found = parse(row, paired=True)
    assert found == PlainText(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    assert parse(row) == PlainText(prompt, chosen[len(prompt) :])


def test_chosen_text_without_prompt_is_refused():
    with pytest.raises(DatasetError, match=r"row 17 .*the end of the prompt is unknown. Add a prompt column"):
        parse({"chosen": "text"})


def test_empty_rejected_is_dropped():
    assert parse({"prompt": "a", "chosen": "b", "rejected": " "}, paired=True) == Dropped("empty rejected reply")
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("")]}
    assert parse(row, paired=True) == Dropped("empty rejected reply")


def test_rejected_must_end_with_the_assistant():
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [user("a"), user("b")]}
    with pytest.raises(DatasetError, match='"rejected" ends with role "user"'):
        parse(row, paired=True)


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert contents(parse(row)) == ["Add.\n\n1 and 2", "3"]
    assert parse(row, chat=False) == PlainText("Add.\n\n1 and 2\n\n", "3")
    assert contents(parse({**row, "input": None})) == ["Add.", "3"]


def test_question_is_plain_without_template():
    row = {"question": "1+1?", "answer": "2"}
    assert parse(row, chat=False) == PlainText("1+1?\n", "2")
    assert contents(parse(row)) == ["1+1?", "2"]


def test_text_columns_must_hold_text():
    with pytest.raises(DatasetError, match=r'row 17 of train\.jsonl: "answer" is an object; it must be text'):
        parse({"question": "a", "answer": {"value": "b"}})
