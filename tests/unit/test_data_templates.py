"""What a chat template prints, and what of it is trained on."""

import datetime
import importlib.util
import os
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from sapo.data.clock import dated_template, prints_date
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples, dataset_digest
from sapo.data.loading import load_rows
from sapo.data.prepare import prepare_dataset
from sapo.data.rendering import Renderer
from sapo.errors import DatasetError, TokenizerError
from tests.prepared import CHATML, WIDE, prepare, talk, texts_of
from tests.shared_data import DATA, needs_data
from tests.tiny import BYTE_SPECIAL_TOKENS, byte_tokenizer

TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def only(rows, template, options=WIDE, **more):
    tokenizer = byte_tokenizer(template, **more)
    examples, report = prepare(rows, tokenizer, options)
    return [texts_of(turn, tokenizer) for example in examples for turn in example.turns], report


def call(arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def test_arguments_as_text_or_struct_are_printed_as_an_object():
    rows = [{"messages": [*talk("a"), call(given)]} for given in ('{"day": 0}', {"day": 0, "other": None})]
    given, _ = only(rows, TOOLS)
    assert {reply for _, reply in given} == {'<call>{"name": "f", "arguments": {"day": 0}}</call><|im_end|>'}


def test_structs_of_arrow_give_no_nulls():
    rows = [{"messages": [*talk("a"), call({"a": 1})]}, {"messages": [*talk("a"), call({"b": 2})]}]
    given, _ = only(datasets.Dataset.from_list(rows), TOOLS)
    assert [reply for _, reply in given] == [
        '<call>{"name": "f", "arguments": {"a": 1}}</call><|im_end|>',
        '<call>{"name": "f", "arguments": {"b": 2}}</call><|im_end|>',
    ]


def test_arguments_that_are_broken_json_are_refused_and_other_text_is_kept():
    for text, reason in (('{"day": 1, "day": 2}', "the name 'day' twice"), ('{"day": ', "Expecting value")):
        with pytest.raises(DatasetError, match=f'message 2 of "messages" has a tool call .* not valid JSON .*{reason}'):
            only([{"messages": [*talk("a"), call(text)]}], TOOLS)
    given, _ = only([{"messages": [*talk("a"), call("print(1)")]}], TOOLS)
    assert given[0][1] == '<call>{"name": "f", "arguments": "print(1)"}</call><|im_end|>'


def test_templates_that_join_arguments_as_text_get_text():
    joining = TOOLS.replace("(c.function | tojson)", "c.function.name + ' ' + c.function.arguments")
    given, _ = only([{"messages": [*talk("a"), call({"day": 0})]}], joining)
    assert given[0][1] == '<call>f {"day": 0}</call><|im_end|>'


def test_replies_that_the_template_does_not_print_are_dropped_and_counted():
    rows = [{"messages": [*talk("a"), call("{}")]}, {"messages": talk("a", "b")}]
    given, report = only(rows, CHATML)
    assert [reply for _, reply in given] == ["b<|im_end|>"]
    assert report.dropped == {"the chat template does not print its tool calls": 1}
    assert report.dropped_rows == {"the chat template does not print its tool calls": [1]}
    silent = CHATML.replace("m['content']", "('' if m['content'] == 'b' else m['content'])")
    _, report = only([*rows[1:], {"messages": talk("a", "c")}], silent)
    assert report.dropped == {"the chat template does not print the reply": 1}


def test_a_prompt_that_is_printed_in_part_is_not_trained_on():
    deaf = "{% for m in messages if m['role'] != 'system' %}" + CHATML.split("%}", 1)[1]
    rows = [{"messages": talk("a", "b", system="Be kind.")}, {"messages": talk("a", "b")}]
    _, report = only(rows, deaf)
    assert report.dropped == {"the chat template does not print its system message": 1}
    with pytest.raises(DatasetError, match=r'row 1 of train.jsonl: the chat template does not print its "tools"'):
        only([{"messages": talk("a", "b"), "tools": [{"name": "f"}]}], CHATML)
    with pytest.raises(DatasetError, match=r'does not print its "documents"'):
        only([{"messages": talk("a", "b"), "documents": [{"title": "t", "text": "x y"}]}], CHATML)


def test_an_earlier_reply_or_call_that_is_not_printed_is_part_of_the_prompt_too():
    remembered = "{% if loop.last or m['role'] == 'user' %}"
    forgetful = CHATML.replace("messages %}", "messages %}" + remembered).replace("{% endfor", "{% endif %}{% endfor")
    _, report = only([{"messages": talk("a", "b", "c", "d")}, {"messages": talk("a", "b")}], forgetful)
    assert report.dropped == {"the chat template does not print an earlier reply": 1}
    row = {"messages": [*talk("a"), call("{}"), {"role": "tool", "content": "7"}, *talk("x", "y")[1:]]}
    _, report = only([row, {"messages": talk("a", "b")}], CHATML)
    assert report.dropped == {"the chat template does not print the tool calls of an earlier reply": 1}


def test_a_short_text_that_another_holds_is_still_looked_for():
    deaf = "{% for m in messages if m['role'] != 'system' %}" + CHATML.split("%}", 1)[1]
    _, report = only([{"messages": talk("a b", "c", system="a")}, {"messages": talk("a", "b")}], deaf)
    assert report.dropped == {"the chat template does not print its system message": 1}


def test_content_that_the_template_changes_is_listed():
    for change in ("[:3]", " | replace('d', '')"):
        changed = CHATML.replace("m['content']", f"(m['content']{change})")
        _, report = only([{"messages": talk("abcdef", "abcdef")}], changed)
        assert report.columns.unused == {"messages.content (changed by the chat template)": 1}
        assert report.columns.texts
    kept = CHATML.replace("m['content']", "('<think> ' + m['content'].split('<think>')[-1])")
    _, report = only([{"messages": talk("a", "<think>why</think>because of this")}], kept)
    assert not report.columns.unused
    thought = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    _, report = only([{"messages": talk("a", "<think>why</think>because of this")}], thought)
    assert report.columns.unused == {"messages.content (its reasoning)": 1}


def test_documents_and_options_reach_the_template():
    template = "{% for d in documents or [] %}[{{ d.text }}]{% endfor %}{{ mood | default('') }}" + CHATML
    row = {"messages": talk("a", "b"), "documents": [{"text": "x y"}], "chat_template_kwargs": {"mood": "!", "z": 1}}
    given, report = only([row], template)
    assert given[0][0].startswith("[x y]!<|im_start|>user")
    assert report.columns.unused == {"chat_template_kwargs.z": 1}
    row["chat_template_kwargs"] = {"instructions": "Be kind to all people here."}
    with pytest.raises(DatasetError, match="chat_template_kwargs has text under 'instructions', which the chat templ"):
        only([row], template)


def test_fields_of_messages_that_are_not_printed_are_listed():
    row = {"messages": [*talk("a"), {"role": "assistant", "content": "b", "reasoning_content": "a long thought of it"}]}
    _, report = only([row], CHATML)
    assert report.columns.lines() == [
        "columns not used: messages.reasoning_content",
        "warning: messages.reasoning_content looks like text of the conversation and is not trained on",
    ]


def test_every_field_of_a_message_is_accounted_for():
    row = {"messages": [{**talk("a")[0], "id": 7, "weight": 0.5}, *talk("a", "b", "c", "d")[1:]]}
    row["messages"][-1] |= {"spans": [{"begin": 0, "kind": "x"}], "none": None, "empty": [], "train": True}
    _, report = only([row], CHATML, DataOptions(4096, 2048, assistant_turns="all"))
    # Once for the row, whatever the number of its replies.
    assert report.columns.unused == {"messages.id": 1, "messages.weight": 1, "messages.spans": 1}
    for name in ("tools", "images"):
        held = {"messages": [{**talk("a")[0], name: ["a tool or an image"]}, *talk("a", "b")[1:]]}
        with pytest.raises(
            DatasetError, match=f'row 1 of train.jsonl: a message has "{name}", which the chat template'
        ):
            only([held], CHATML)


def test_the_next_header_is_not_trained_on():
    following = "'<|im_end|>\\n' + ('<|im_start|>user\\n' if loop.last and m['role'] != 'user' else '') }}"
    eager = CHATML.replace("'<|im_end|>\\n' }}", following)
    assert eager != CHATML
    given, _ = only([{"messages": talk("a", "b")}], eager)
    assert given[0][1] == "b<|im_end|>"
    marked = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ('\\nuser: ' if m['role'] != 'user' else '\\n') }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    given, _ = only([{"messages": talk("a", "b")}], marked)
    assert given == [("user: a\nassistant: ", "b</s>")]


@pytest.mark.parametrize("opening", ["", "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"])
def test_the_header_of_a_reply_is_not_trained_on_where_no_prompt_opens_one(opening):
    template = CHATML.split("{% if add_generation_prompt")[0] + opening
    given, _ = only([{"messages": talk("a", "b", "c", "d")}], template, DataOptions(4096, 2048, assistant_turns="all"))
    assert [reply for _, reply in given] == ["b<|im_end|>", "d<|im_end|>"]
    assert given[0][0] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_an_opened_thought_stays_the_models_own():
    thinking = CHATML.replace(
        "m['role'] + '\\n'",
        "m['role'] + '\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.last and m.role != 'user' else '')",
    )
    given, _ = only([{"messages": talk("a", "b")}], thinking)
    assert given[0][1] == "<think>\n\n</think>\n\nb<|im_end|>"


def test_text_that_is_rendered_already_gets_no_second_start_token():
    tokenizer = byte_tokenizer(bos=True)
    rows = [{"prompt": text, "completion": "yes"} for text in ("<s>Q: ", "Q: ", "\n <s>Q: ")]
    examples, _ = prepare(rows, tokenizer)
    assert [texts_of(example.turns[0], tokenizer)[0] for example in examples] == ["<s>Q: "] * 3


MARKED = [{"messages": talk("a", "b", "c", "d", "e", "f")}]


@pytest.mark.parametrize(
    ("turns", "marked", "kept", "dropped"),
    [
        ("last", (5,), [1], 1),
        ("last", (3, 5), [0], 2),
        ("last", (1,), [2], 0),
        ("random", (5,), [0, 1], 1),
        ("all", (1, 5), [1], 2),
    ],
)
def test_marked_replies_are_left_out_of_every_choice_of_turns(turns, marked, kept, dropped):
    messages = [{**m, "train": False} if i in marked else m for i, m in enumerate(MARKED[0]["messages"])]
    tokenizer = byte_tokenizer(CHATML)
    examples, report = prepare([{"messages": messages}], tokenizer, DataOptions(4096, 2048, assistant_turns=turns))
    assert [turn.index for example in examples for turn in example.turns] == kept
    assert report.dropped == ({"reply marked train: false": dropped} if dropped else {})


DATED = "{{ '<|im_start|>system\\nToday: ' + strftime_now('%d %b %Y, %H:%M%%') + '<|im_end|>\\n' }}" + CHATML


def test_a_template_that_prints_the_date_prints_the_given_one():
    tokenizer = byte_tokenizer(DATED)
    assert prints_date(tokenizer)
    assert not prints_date(byte_tokenizer(CHATML))

    def digest(day):
        options = DataOptions(4096, 2048, date=datetime.date(2026, 3, day))
        prepared, _ = prepare_dataset(
            [{"messages": talk("a", "b")}], tokenizer, options, eos_ids=eos_token_ids(tokenizer, None)
        )
        return dataset_digest(prepared), texts_of(collate_examples(list(prepared))["examples"][0].turns[0], tokenizer)

    assert "Today: 05 Mar 2026, 00:00%<" in digest(5)[1][0]
    assert digest(5) == digest(5)
    assert digest(5)[0] != digest(6)[0]


@pytest.mark.parametrize("head", ["", "\n", "  ", "{% set x = 1 %}\n", "{#- c -#} "])
@pytest.mark.parametrize("text", ["{{ strftime_now('%Y-%m-%d') }}", "{% if strftime_now is defined %}ok{% endif %}"])
def test_only_the_date_of_a_template_changes(head, text):
    today = datetime.date.today()
    tokenizer = byte_tokenizer(head + text + "\n" + CHATML)
    said = tokenizer.apply_chat_template(talk("a"), tokenize=False)
    dated = dated_template(tokenizer.chat_template, today)
    assert tokenizer.apply_chat_template(talk("a"), chat_template=dated, tokenize=False) == said


LLAMA = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] "
    "| trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
REAL = os.environ.get("SAPO_TEST_REAL_MODEL", "")


def chatml_tokenizer():
    return byte_tokenizer(CHATML, merges=[("a", "b"), ("Ċ", "Ċ")])


def llama_tokenizer():
    special = (*BYTE_SPECIAL_TOKENS, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return byte_tokenizer(LLAMA, special=special, bos=True, merges=[("t", "h"), ("e", "r")])


def real_tokenizer():
    if not REAL or not Path(REAL).is_dir():
        pytest.skip("SAPO_TEST_REAL_MODEL names no folder of a real model")
    return AutoTokenizer.from_pretrained(REAL)


CONVERSATIONS = [
    talk("Where is my parcel, number 4711?", "It left Hamburg on Monday.\n\nGood day!"),
    talk("2 + 2?", "4", "And doubled?", "8: twice 4.", "Thanks", "You're welcome \u2600", system="Answer in brief."),
    talk("def f(x):\n    return x", "It returns its argument.", "Another way?", "```python\nf = lambda x: x\n```"),
    talk("\u4f60\u597d", "Hello! \U0001f600", system="Translate."),
]


@pytest.mark.parametrize("made", [chatml_tokenizer, llama_tokenizer, real_tokenizer])
@pytest.mark.parametrize("turns", ["last", "random", "all"])
def test_tokens_are_those_of_the_template(made, turns):
    tokenizer = made()
    ends = eos_token_ids(tokenizer, None)
    examples, report = prepare(
        [{"messages": messages} for messages in CONVERSATIONS],
        tokenizer,
        DataOptions(4096, 2048, assistant_turns=turns),
    )
    seen = []
    for example in examples:
        messages = CONVERSATIONS[example.row]
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        for turn in example.turns:
            place = places[turn.index]
            seen.append((example.row, turn.index))
            prompt, whole = (
                tokenizer.apply_chat_template(given, add_generation_prompt=opening, tokenize=True, return_dict=False)
                for given, opening in ((messages[:place], True), (messages[: place + 1], False))
            )
            assert list(turn.prompt_ids) == prompt
            after = whole[len(prompt) + len(turn.response_ids) :]
            assert [*turn.prompt_ids, *turn.response_ids, *after] == whole
            assert not tokenizer.decode(after).strip()
            assert [token in ends for token in turn.response_ids] == [False] * (len(turn.response_ids) - 1) + [True]
            assert tokenizer.decode(turn.response_ids[:-1]).strip() == messages[place]["content"].strip()
    counts = [len([m for m in messages if m["role"] == "assistant"]) for messages in CONVERSATIONS]
    expected = [(row, index) for row, count in enumerate(counts) for index in range(count)]
    last = [(row, count - 1) for row, count in enumerate(counts)]
    assert seen == (last if turns == "last" else expected)
    assert report.boundary_merges == 0


def test_short_messages_are_looked_for_in_one_rendering(monkeypatch):
    rendered, apply = [], Renderer._apply
    monkeypatch.setattr(Renderer, "_apply", lambda *given, **more: rendered.append(1) or apply(*given, **more))
    for size in (4, 40):
        rendered.clear()
        prepare([{"messages": talk(*["ok", "yes"] * size)}], byte_tokenizer(CHATML))
        assert len(rendered) <= 8


TEMPLATES = {
    "llama3": ("<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": ("<end_of_turn>", ["<start_of_turn>"]),
    "qwen2_5": ("<|im_end|>", []),
    "qwen3": ("<|im_end|>", ["<think>", "</think>"]),
    "phi3": ("<|end|>", ["<|user|>", "<|assistant|>"]),
    "cohere": ("<|END_OF_TURN_TOKEN|>", ["<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"]),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_give_clean_turns(name):
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    end, others = TEMPLATES[name]
    tokenizer = byte_tokenizer(
        (folder / f"{name}.jinja").read_text(encoding="utf-8"),
        special=(*dict.fromkeys((*BYTE_SPECIAL_TOKENS, end, *others)),),
    )
    assert tokenizer.convert_tokens_to_ids(end) in eos_token_ids(tokenizer, None)
    rows = [{"messages": talk("hi", "yo", "and?", "so")}]
    examples, report = prepare(rows, tokenizer, DataOptions(4096, 2048, assistant_turns="all"))
    assert report.boundary_merges == 0
    for example, reply in zip(examples, ("yo", "so"), strict=True):
        _, response = texts_of(example.turns[0], tokenizer)
        assert response.endswith(reply + end)
        assert response.count(end) == 1
        assert not any(mark in response for mark in others if "think" not in mark)


@needs_data
@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("gsm8k/test.jsonl", "question/answer"),
        ("gpteacher_roleplay/roleplay.json", "alpaca"),
        ("mt_bench/dummy_conversation.json", "conversations"),
    ],
)
def test_real_data_with_a_real_tokenizer(file, layout):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260k_llama/hf")
    if layout == "conversations":
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        )
    rows = load_rows(DATA / file)[:60]
    examples, report = prepare(rows, tokenizer, source=file)
    assert (report.format, report.kept, report.boundary_merges) == (layout, 60, 0)
    for example in examples:
        turn = example.turns[0]
        assert turn.prompt_ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in turn.response_ids
        assert turn.response_ids.index(tokenizer.eos_token_id) == len(turn.response_ids) - 1
    if layout == "question/answer":
        whole = tokenizer.decode([*examples[0].turns[0].prompt_ids, *examples[0].turns[0].response_ids])
        assert whole == f"<s> {rows[0]['question']}\n{rows[0]['answer']}</s>"


def test_end_tokens_come_from_all_three_places(chatml):
    ids = {token: chatml.convert_tokens_to_ids(token) for token in BYTE_SPECIAL_TOKENS}
    assert eos_token_ids(chatml, None) == {ids["</s>"], ids["<|im_end|>"]}
    assert eos_token_ids(byte_tokenizer(), None) == {ids["</s>"]}
    assert eos_token_ids(byte_tokenizer(), 7) == {7, ids["</s>"]}
    assert eos_token_ids(chatml, [7, 8]) == {7, 8, ids["</s>"], ids["<|im_end|>"]}


def test_end_token_survives_an_odd_template():
    refusing = byte_tokenizer("{{ raise_exception('Only tools here') }}")
    assert eos_token_ids(refusing, None) == {refusing.eos_token_id}
    silent = byte_tokenizer("nothing")
    assert eos_token_ids(silent, None) == {silent.eos_token_id}
    spoken = byte_tokenizer("{% for m in messages %}{{ m['content'] }} END <s>{% endfor %}")
    assert eos_token_ids(spoken, None) == {spoken.eos_token_id}


def test_no_end_token_at_all_is_refused():
    tokenizer = byte_tokenizer(eos=None)
    with pytest.raises(TokenizerError, match=r"no EOS token: .*eos_token in tokenizer_config\.json"):
        eos_token_ids(tokenizer, None)
    with pytest.raises(TokenizerError, match=r"eos_token in tokenizer_config\.json"):
        prepare_dataset([{"prompt": "a", "completion": "b"}], tokenizer, WIDE, eos_ids=[3])
