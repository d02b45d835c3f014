"""What a person sees as the prompt of a row is the prompt, and no column is lost without a word."""

import json

import pytest

from sapo.data.columns import ColumnUse
from sapo.data.formats import detect_format, format_of, parse_row
from sapo.data.messages import Conversation, Dropped, PlainText
from sapo.errors import DatasetError

WHERE = "row 3 of x"
Q, A, B = "Where is the key?", "Under the mat.", "No idea."


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def parse(row, *, paired=False, chat=True, use=None):
    layout = detect_format(row, paired=paired, source="x")
    return parse_row(row, layout, paired=paired, chat=chat, where=WHERE, use=use)


def said(row, **options):
    found = parse(row, **options)
    assert isinstance(found, Conversation), found
    return [(message["role"][0], message["content"]) for message in found.messages]


TALK = [("s", "Be kind."), ("u", "Hi"), ("a", "Hello"), ("u", Q), ("a", A)]
HISTORY = [["Hi", "Hello"]]
EARLIER = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), user(Q)]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be kind.", "history": HISTORY, "instruction": Q, "output": A},
        {"system": "Be kind.", "history": HISTORY, "instruction": Q, "input": "", "chosen": A, "rejected": B},
        {"system_prompt": "Be kind.", "history": [user("Hi"), assistant("Hello")], "question": Q, "response": A},
        {"system": "Be kind.", "history": HISTORY, "question": Q, "chosen": A, "rejected": B},
        {"system": "Be kind.", "history": HISTORY, "prompt": Q, "completion": A},
        {"sys_prompt": "Be kind.", "chat_history": HISTORY, "prompt": Q, "response": A},
        {"system": "Be kind.", "history": HISTORY, "prompt": Q, "chosen": A, "rejected": B},
        {"system": "Be kind.", "messages": [*EARLIER[1:], assistant(A)]},
        {"system": "Be kind.", "messages": [*EARLIER, assistant(A)]},
        {"system": "Be kind.", "prompt": EARLIER[1:], "completion": [assistant(A)]},
        {"system": "Be kind.", "chosen": [*EARLIER[1:], assistant(A)], "rejected": [*EARLIER[1:], assistant(B)]},
        {"prompt": EARLIER, "chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]},
        {"prompt": EARLIER[-1:], "chosen": [*EARLIER, assistant(A)], "rejected": [*EARLIER, assistant(B)]},
        {"conversations": EARLIER, "chosen": {"from": "gpt", "value": A}, "rejected": {"from": "gpt", "value": B}},
        {"messages": EARLIER, "chosen": assistant(A), "rejected": assistant(B)},
        {"input": {"messages": EARLIER}, "preferred_output": [assistant(A)], "non_preferred_output": [assistant(B)]},
        {"real": [*EARLIER, assistant(A)], "generated": [*EARLIER, assistant(B)]},
        {
            "system": "Be kind.",
            "history": HISTORY,
            "instruction": Q,
            "completions": [{"response": B, "overall_score": "2"}, {"response": A, "overall_score": 9.5}],
        },
    ],
)
def test_the_prompt_is_what_a_person_sees(row):
    assert said(row) == TALK
    layout = detect_format(row, paired=False, source="x")
    if layout in ("chosen", "real/generated", "preferred_output", "completions"):
        found = parse(row, paired=True)
        assert [message["content"] for message in found.messages] == [text for _, text in TALK]
        assert found.rejected["content"] == B


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}, "Add.\n\n1 2"),
        ({"instruction": "Sum up.", "context": "Long text.", "response": "3"}, "Sum up.\n\nLong text."),
        ({"question": "Who?", "context": "Ann ate.", "answer": "Ann"}, "Ann ate.\n\nWho?"),
        ({"prompt": "Hi", "response": "Yo"}, "Hi"),
        ({"query": "Hi", "response": "Yo"}, "Hi"),
    ],
)
def test_parts_of_a_question_are_joined(row, prompt):
    assert said(row)[0] == ("u", prompt)
    assert parse(row, chat=False).prompt.strip() == prompt


def test_without_a_template_the_parts_are_joined_as_text():
    row = {"system": "Be kind.", "history": HISTORY, "question": Q, "answer": A}
    assert parse(row, chat=False) == PlainText(f"Be kind.\n\nHi\nHello\n{Q}\n", A)


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Key?\n\nAssistant:"


def test_text_pairs_are_cut_at_the_last_role_marker():
    row = {"chosen": f"{HH} It is here.", "rejected": f"{HH} It is gone."}
    assert parse(row) == PlainText(HH, " It is here.")
    assert parse(row, paired=True) == PlainText(HH, " It is here.", " It is gone.")
    other = {**row, "rejected": row["rejected"].replace("Hello", "Hey")}
    assert parse(other, paired=True) == Dropped("chosen and rejected differ before the last reply")
    repeated = {"prompt": HH, **row}
    assert parse(repeated, paired=True) == PlainText(HH, " It is here.", " It is gone.")


@pytest.mark.parametrize(
    ("opening", "reply"),
    [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "It is. Human: no<|im_end|>\n"),
        ("<s>[INST] Hi [/INST] Yo</s>[INST] Key? [/INST]", " Here</s>"),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "Yo<|eot_id|>",
        ),
        ("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "Yo<end_of_turn>\n"),
        ("<|user|>\nHi</s>\n<|assistant|>\n", "Yo</s>"),
        ("A chat. USER: Hi ASSISTANT:", " Yo"),
        ("### Human: Hi### Assistant: Yo### Human: Key?### Assistant:", " Here"),
        ("Instruct: Hi\nOutput:", " Yo"),
        ("Question: Key?\nAnswer:", " Here"),
        ("user: Hi\nassistant:", " Yo"),
        ("### Instruction:\nAdd.\n\n### Response:\n", "3"),
        ("### Human: Hi### Assistant: Yo\n### Human: Key?\n### Assistant:", " Here"),
        ("### Instruction:\nAdd.\n\n### Response:\n", "3\n### Output format\nA number\n## Input\nTwo\n### Question 2"),
        ("## Instruction:\nAdd.\n## Response:\n", "3\n### Output\n4"),
        ("\n\nHuman: Write a chat.\n\nAssistant:", " Sure:\nHuman: hi\nAssistant: hello"),
    ],
)
def test_rendered_text_is_cut_where_its_last_reply_begins(opening, reply):
    assert parse({"text": opening + reply}) == PlainText(opening, reply)


def test_text_without_a_reply_is_not_trained_on():
    assert parse({"text": "User: a\nAssistant: b\nUser: c"}) == Dropped("empty reply")
    with pytest.raises(DatasetError, match=r'row 3 of x: "text" contains no role marker'):
        parse({"text": "Once upon a time."})


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"messages": [user(Q), assistant(A)], "context": "The mat is red.", "history": HISTORY}, "context, history"),
        ({"messages": [user(Q), assistant(A)], "prompt": "Another question?"}, "prompt"),
        ({"question": Q, "answer": A, "passage": "The mat is red."}, "passage"),
        ({"prompt": Q, "completion": A, "images": [{"bytes": b"x"}]}, "images"),
        ({"prompt": "Be a pirate, always.", "chosen": [user(Q), assistant(A)]}, "prompt"),
        ({"chosen": f"{HH} yes", "rejected": f"{HH} no", "system": "Be kind."}, "system"),
        ({"instruction": "Be brief.", "question": Q, "answer": A}, "question"),
        ({"prompt": Q, "completion": A, "tools": [{"name": "f"}]}, "tools"),
        ({"messages": [user(Q), assistant(A)], "System": "Be a pirate."}, "System"),
        ({"messages": [user(Q), assistant(A)], "systemPrompt": "Be a pirate."}, "systemPrompt"),
        ({"messages": [user(Q), assistant(A)], "chat-history": HISTORY}, "chat-history"),
        ({"messages": [user(Q), assistant(A)], "image_path": "cat.png"}, "image_path"),
        ({"messages": [user(Q), assistant(A)], "audio": {"bytes": "x", "path": None}}, "audio"),
        ({"question": Q, "answer": A, "choices": ["Here", "There"]}, "choices"),
        ({"messages": [user(Q), assistant(A)], "available_tools": '[{"name": "f"}]'}, "available_tools"),
    ],
)
def test_a_column_of_the_prompt_is_refused_where_it_cannot_be_used(row, names):
    with pytest.raises(DatasetError, match=f"^row 3 of x: the columns {names} belong to the prompt"):
        parse(row)


def test_media_are_not_to_be_put_into_the_prompt():
    with pytest.raises(DatasetError, match="Only text can be trained on: remove these rows"):
        parse({"messages": [user(Q), assistant(A)], "image": "cat.png"})


def test_columns_that_repeat_the_conversation_or_are_empty_are_no_loss():
    use = ColumnUse()
    row = {"prompt": Q, "messages": [user(Q), assistant(A)], "history": [], "system": "", "images": None}
    assert said({**row, "chosen": row["messages"], "rejected": [user(Q), assistant(B)]}, use=use) == TALK[3:]
    assert use.unused == {"prompt": 1, "chosen": 1, "rejected": 1}
    assert not use.texts


def test_other_columns_are_listed_and_talk_among_them_is_warned_of():
    use = ColumnUse()
    for note in ("short", "a note of more than five words", "x"):
        parse({"prompt": Q, "completion": A, "id": 7, "note": note, "empty": "", "none": None}, use=use)
    assert use.unused == {"id": 3, "note": 3}
    assert use.texts == {"note"}
    assert use.lines()[0] == "columns not used: id, note"
    assert "warning: note looks like text of the conversation" in use.lines()[1]


@pytest.mark.parametrize("text", ["\u4f60\u662f\u4e00\u4e2a\u6d77\u76d7", "\u0e04\u0e38\u0e13\u0e04\u0e37\u0e2d"])
def test_talk_in_a_script_without_spaces_is_warned_of_too(text):
    use = ColumnUse()
    parse({"prompt": Q, "completion": A, "persona": text, "key": "b2f0-99ea-4c"}, use=use)
    assert use.texts == {"persona"}


def test_two_system_texts_are_refused():
    with pytest.raises(DatasetError, match="a system column and another system message"):
        parse({"system": "Be rude.", "messages": [*EARLIER, assistant(A)]})


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"weight": "0"},
        {"train": False},
        {"training": False},
        {"trainable": "false"},
        {"loss": False},
        {"label": False},
        {"label": 0},
        {"mask": True},
        {"ignore": True},
        {"train": 0},
        {"trainable": 0.0},
        {"training": "no"},
        {"Train": False},
        {"label": 0.0},
        {"mask": 1},
        {"loss_mask": 0},
        {"loss_weight": 0.0},
        {"train_on_turn": False},
        {"calculate_loss": 0},
        {"kto_tag": False},
        {"desirable": "false"},
        {"weight": -1},
        {"label": -1},
        {"label": "-1"},
        {"label": "rejected"},
        {"kto_tag": "Undesirable"},
        {"label": "bad"},
        {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
        {"loss_mask": [1, 0, 1]},
        {"weights": [0]},
        {"train": [True, False]},
        {"sample_weight": 0.0},
        {"output_with_loss": False},
    ],
)
def test_marks_of_rows_and_messages_are_honoured(mark):
    assert isinstance(parse({"prompt": Q, "completion": A, **mark}), Dropped)
    found = parse({"messages": [user("Hi"), assistant("Hello", **mark), user(Q), assistant(A)]})
    assert set(found.untrained) == {1}


@pytest.mark.parametrize(
    "mark",
    [
        *({"weight": 1}, {"train": 1}, {"label": True}, {"label": 1.0}, {"mask": 0}, {"loss_scale": 1.0}),
        *({"label": "chosen"}, {"kto_tag": "good"}, {"train_detail": [{"begin_offset": 0, "train": True}]}),
        *({"loss_mask": [1, 1]}, {"masked": [False]}),
    ],
)
def test_marks_that_allow_training_change_nothing(mark):
    use = ColumnUse()
    assert parse({"prompt": Q, "completion": A, **mark}, use=use) == PlainText(Q, A)
    assert not parse({"messages": [user(Q), assistant(A, **mark)]}).untrained


@pytest.mark.parametrize("value", [0.5, float("nan"), "low", ["low"], [[0.5]], 2])
def test_what_is_no_mark_is_listed_and_trained_on(value):
    use = ColumnUse()
    assert parse({"prompt": Q, "completion": A, "weight": value, "loss": 0.0}, use=use) == PlainText(Q, A)
    assert use.unused == {"loss": 1} | ({} if value != value else {"weight": 1})


def test_a_rejected_reply_that_is_marked_is_not_trained_on():
    row = {"prompt": [user(Q)], "chosen": [assistant(A)], "rejected": [assistant(B, weight=0)]}
    assert parse(row, paired=True) == Dropped("rejected reply marked weight: 0")


@pytest.mark.parametrize(
    ("spelling", "role"),
    [
        *(("Human", "user"), ("USER", "user"), ("bard", "assistant"), ("ChatGPT", "assistant"), ("function", "tool")),
        *(("instruction", "user"), ("Output", "assistant"), ("GPT-4", "assistant"), (" claude ", "assistant")),
    ],
)
def test_roles_in_every_spelling(spelling, role):
    found = parse({"conversation": [{"from": "human", "value": "a"}, {"from": spelling, "value": "b"}, assistant("c")]})
    assert found.messages[1]["role"] == role


def test_messages_may_be_json_text():
    stored = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    assert said({"messages": stored}) == [("u", "a"), ("a", "b")]
    row = {"prompt": '[{"role": "user", "content": "a"}]', "completion": '[{"role": "assistant", "content": "b"}]'}
    assert said(row) == [("u", "a"), ("a", "b")]
    assert parse({"prompt": "List", "completion": '[{"name": "f"}]'}) == PlainText("List", '[{"name": "f"}]')


def test_messages_may_be_an_object_with_a_list_per_field():
    stored = {"role": ["user", "assistant"], "content": ["a", "b"]}
    assert said({"messages": stored}) == [("u", "a"), ("a", "b")]
    asked = {"from": ["human"], "value": ["a"]}
    assert said({"conversations": asked, "chosen": "b", "rejected": "c"}) == [("u", "a"), ("a", "b")]
    with pytest.raises(DatasetError, match="unknown role"):
        parse({"messages": {"role": ["user", "assistant"], "content": ["a"]}})


def test_turns_may_be_pairs_of_input_and_output():
    use = ColumnUse()
    row = {"conversation": [{"input": "a", "output": "b", "weight": 0}, {"input": "c", "output": "d"}]}
    assert said(row, use=use) == [("u", "a"), ("a", "b"), ("u", "c"), ("a", "d")]
    assert set(parse(row).untrained) == {1}
    row["conversation"][0]["system"] = "s"
    assert said(row)[0] == ("s", "s")


def test_the_format_is_that_of_the_first_row_that_has_one():
    rows = [{"prompt": Q, "chosen": A, "rejected": None}, {"prompt": Q, "chosen": A, "rejected": B}]
    stream = iter([{"note": "of the authors"}, *rows, {}])
    assert format_of(stream, paired=True, source="x") == ("chosen", [{"note": "of the authors"}, *rows])
    assert list(stream) == [{}]
    with pytest.raises(DatasetError, match="x: has the columns note, but"):
        format_of([{"note": "a"}, {"other": "b"}], paired=True, source="x")


def test_json_text_with_a_duplicate_name_is_no_list_of_messages():
    stored = '[{"role": "user", "content": "a", "content": "b"}]'
    with pytest.raises(DatasetError, match=r'"messages" is text and not valid JSON \(one object has'):
        parse({"messages": stored})
    assert said({"messages": [user("a"), assistant(stored)]})[1] == ("a", stored)


def test_only_a_near_role_is_suggested():
    for role, advice in (("asistant", "nearest: assistant"), ("narration", "known are assistant, developer")):
        with pytest.raises(DatasetError, match=f'unknown role "{role}"; {advice}'):
            parse({"messages": [{"role": role, "content": "a"}]})


def test_a_prompt_may_end_with_a_role_in_any_spelling():
    for role in ("customer", "function_response", " Human "):
        row = {"conversations": [{"from": role, "value": "a"}], "chosen": "b", "rejected": "c"}
        assert said(row)[-1] == ("a", "b")


def test_columns_with_blanks_around_their_names_are_quoted():
    with pytest.raises(DatasetError, match="the columns ' completion', prompt"):
        detect_format({"prompt": Q, " completion": A}, paired=False, source="x")


def test_messages_and_parts_may_be_json_text_each():
    assert said({"messages": ['{"role": "user", "content": "a"}', '{"from": "gpt", "value": "b"}']}) == [
        ("u", "a"),
        ("a", "b"),
    ]
    stored = user('[{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]')
    schema = '{"type": "object", "text": "b"}'
    assert said({"messages": [stored, assistant(schema)]}) == [("u", "a b"), ("a", schema)]
    assert said({"messages": [user({"type": "text", "text": "a"}), assistant("b")]})[0] == ("u", "a")


def test_nan_is_a_missing_text():
    assert parse({"prompt": Q, "completion": A, "note": float("nan")}, use=(use := ColumnUse())) == PlainText(Q, A)
    assert not use.unused
    assert parse({"messages": [user("a"), assistant(float("nan"))]}) == Dropped("empty reply")
    given = {"prompt": Q, "completion": float("nan")}
    assert parse_row(given, "prompt/completion", paired=False, chat=True, where=WHERE) == Dropped("no completion")


def test_a_prompt_that_a_template_has_rendered_is_not_rendered_again():
    opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert parse({"prompt": opening, "response": "Yo"}) == PlainText(opening, "Yo")
    assert parse({"question": "<s>[INST] Hi [/INST]", "answer": "Yo"}) == PlainText("<s>[INST] Hi [/INST]", "Yo")
    assert said({"question": "What does [/INST] mean?", "answer": "Yo"})[0] == ("u", "What does [/INST] mean?")


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a ", "image": None}, {"type": "text", "text": "b"}]
    assert said({"messages": [user(parts), assistant([{"type": "text", "text": "c"}])]}) == [("u", "a b"), ("a", "c")]


CALL = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {**CALL, "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "day": None}}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "assistant", "tool_calls": '[{"name": "add", "arguments": {"a": 1}}]'},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": json.dumps('{"a": 1}')}}]},
        {"role": "assistant", "tool_calls": [{"name": "add", "parameters": {"a": 1, "b": None}}]},
    ],
)
def test_tool_calls_in_every_spelling_have_arguments_as_objects(message):
    found = parse({"messages": [user("Add."), message, {"from": "observation", "value": "2"}, assistant("2")]})
    (call,) = found.messages[1]["tool_calls"]
    assert call["function"] == CALL


def test_arguments_keep_what_their_text_says():
    call = {"function": {"name": "f", "arguments": '{"text": "{\\"b\\": 1}", "none": null}'}}
    found = parse({"messages": [user("a"), {"role": "assistant", "tool_calls": [call]}]})
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"text": '{"b": 1}', "none": None}


def test_nulls_that_arrow_adds_to_tools_are_removed():
    tools = [{"name": "f", "parameters": {"a": {"type": "int", "enum": None}, "b": None}}]
    found = parse({"messages": [user("a"), assistant("b")], "tools": tools})
    assert found.tools == [{"name": "f", "parameters": {"a": {"type": "int"}}}]


def test_two_lists_of_tools_that_differ_are_refused():
    row = {"messages": [user("a"), assistant("b")], "tools": [{"name": "f"}]}
    assert parse({**row, "functions": row["tools"]}).tools == row["tools"]
    with pytest.raises(DatasetError, match='"tools" and "functions" differ'):
        parse({**row, "functions": [{"name": "g"}]})


def test_ratings_decide_and_ties_are_dropped():
    def row(*scores):
        return {"instruction": Q, "completions": [{"response": f"r{i}", "score": s} for i, s in enumerate(scores)]}

    use = ColumnUse()
    assert said(row(3, 5, 1), use=use)[1] == ("a", "r1")
    assert use.unused == {"completions (all but the best)": 1}
    assert parse(row(3, 5, 1), paired=True).rejected["content"] == "r2"
    assert parse(row(3, 3), paired=True) == Dropped("chosen and rejected have the same score")
    for missing in (None, float("nan"), "N/A"):
        assert parse(row(5, missing)) == Dropped("a completion without a score")
    with pytest.raises(DatasetError, match=r'"completions" have no overall_score or score'):
        parse({"instruction": Q, "completions": [{"response": A, "rank": 1}]})
    scales = [{"fine-grained_score": 4.5}, {"overall_score": 9, "fine-grained_score": 3}]
    replies = [{"response": text, **scores} for text, scores in zip((A, B), scales, strict=True)]
    assert said({"instruction": Q, "completions": replies})[1] == ("a", A)
    empty = {"instruction": Q, "completions": [{"response": None, "score": 1}, {"response": A, "score": 2}]}
    assert said(empty)[1] == ("a", A)


def test_a_prompt_column_is_compared_with_both_full_sides():
    sides = {"chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]}
    found = parse({"prompt": f"{Q}\n", **sides}, paired=True)
    assert (found.messages[-1]["content"], found.rejected["content"]) == (A, B)
    with pytest.raises(DatasetError, match="the columns prompt belong to the prompt"):
        parse({"prompt": f"In French: {Q}", **sides}, paired=True)


def test_incomplete_rows_are_dropped_like_empty_ones():
    row = {"prompt": "a", "completion": None}
    assert parse_row(row, "prompt/completion", paired=False, chat=True, where=WHERE) == Dropped("no completion")


def test_options_for_the_template_may_not_take_the_place_of_the_row():
    row = {"messages": [user(Q), assistant(A)], "chat_template_kwargs": {"enable_thinking": False, "x": None}}
    assert parse(row).template_options == {"enable_thinking": False}
    with pytest.raises(DatasetError, match=r'"chat_template_kwargs" sets add_generation_prompt'):
        parse({**row, "chat_template_kwargs": {"add_generation_prompt": True}})
