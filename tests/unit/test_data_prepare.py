"""Laws of prepared rows: prompt and response as a model sees them, what is truncated, dropped or refused."""

import pickle

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.config import SAPOConfig
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, Example, Turn, collate_examples, dataset_digest
from sapo.data.prepare import prepare_dataset
from sapo.errors import ConfigurationError, DatasetError, TokenizerError
from tests.prepared import CHATML, WIDE, prepare, talk, texts_of
from tests.tiny import byte_tokenizer, tiny_llama, tiny_rows, tiny_tokenizer


def test_response_is_what_follows_the_generation_prompt(chatml):
    (example,), report = prepare([{"messages": talk("hi", "yo", system="Be kind.")}], chatml)
    prompt, response = texts_of(example.turns[0], chatml)
    assert prompt == ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert response == "yo<|im_end|>"
    assert (report.rows, report.kept, report.dropped) == (1, 1, {})


def test_pairs_most_of_which_are_rated_the_other_way_round_are_refused(chatml):
    better, worse = ({"score_chosen": a, "score_rejected": b} for a, b in ((2, 1), (1, 2)))
    rows = [{"prompt": "a", "chosen": f"b{i}", "rejected": "c"} for i in range(4)]
    mixed = [row | scores for row, scores in zip(rows, (worse, better, {}, worse), strict=True)]
    _, report = prepare(mixed, chatml)
    assert report.kept == 4
    assert report.lines()[1:] == [
        "warning: the chosen reply is rated lower than the rejected one (score_chosen < score_rejected): 2 rows "
        "(rows 1, 4)",
        "columns not used: rejected, score_chosen, score_rejected",
    ]
    with pytest.raises(DatasetError, match=r"in 3 of 4 rows .*\(score_chosen < score_rejected\)\. Swap chosen and"):
        prepare([*mixed[1:], *[rows[0] | worse] * 2][-4:], chatml)
    _, report = prepare_dataset(
        [row | worse for row in rows], chatml, WIDE, eos_ids=eos_token_ids(chatml, None), count_faults=True
    )
    assert report.faults.of_all[0].startswith("dataset: in 4 of 4 rows the chosen reply is rated lower")


word = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(word, word), min_size=1, max_size=4))
def test_prompt_is_prefix_of_response_context(chatml, pairs):
    messages = talk(*(text for pair in pairs for text in pair))
    options = DataOptions(4096, 2048, assistant_turns="all")
    examples, report = prepare([{"messages": messages}], chatml, options)
    whole = chatml.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert report.boundary_merges == 0
    for example, (_, reply) in zip(examples, pairs, strict=True):
        turn = example.turns[0]
        context = [*turn.prompt_ids, *turn.response_ids]
        assert whole[: len(context)] == context
        assert texts_of(turn, chatml)[1] == reply + "<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=40),
    word,
    st.integers(2, 60),
    st.integers(1, 60),
    st.sampled_from(["keep_end", "keep_start"]),
)
def test_truncation_budget_is_never_exceeded(chatml, prompt, completion, max_length, max_prompt, mode):
    options = DataOptions(max_length, min(max_prompt, max_length), prompt_truncation=mode)
    rows = [{"prompt": prompt, "completion": completion}, {"prompt": "a", "completion": "b"}]
    turns = [turn for example in prepare(rows, chatml, options)[0] for turn in example.turns]
    full = [turn for example in prepare(rows, chatml)[0] for turn in example.turns]
    for turn in turns:
        assert turn.response_ids
        assert len(turn.prompt_ids) + len(turn.response_ids) <= max_length
    if len(turns) == len(full) == 2:
        cut, uncut = turns[0], full[0]
        assert uncut.response_ids[: len(cut.response_ids)] == cut.response_ids
        size = len(cut.prompt_ids)
        kept = uncut.prompt_ids[-size:] if mode == "keep_end" else uncut.prompt_ids[:size]
        assert cut.prompt_ids == kept


def test_no_second_end_token():
    closing = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    double = byte_tokenizer(closing)
    (example,), _ = prepare([{"messages": talk("hi", "yo")}], double)
    assert texts_of(example.turns[0], double)[1] == "yo<|im_end|>"
    plain = byte_tokenizer()
    rows = [{"prompt": "a", "completion": text} for text in ("b", "b</s>", "b</s>\n", "b</s></s>")]
    examples, _ = prepare(rows, plain)
    assert {texts_of(example.turns[0], plain)[1] for example in examples} == {"b</s>"}


def test_end_token_inside_a_reply_does_not_cut_it(chatml):
    (example,), _ = prepare([{"messages": talk("hi", "one</s>two \n")}], chatml)
    assert texts_of(example.turns[0], chatml)[1] == "one</s>two \n<|im_end|>"


def test_end_token_is_appended_where_the_template_has_none():
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    (example,), _ = prepare([{"messages": talk("hi", "yo")}], tokenizer)
    assert texts_of(example.turns[0], tokenizer) == ("u:hi\na:", "yo\n</s>")


def test_plain_prompt_has_start_token_but_no_end_token():
    tokenizer = byte_tokenizer(bos=True, closing=True)
    (example,), _ = prepare([{"prompt": "Q: ", "completion": "yes"}], tokenizer)
    assert texts_of(example.turns[0], tokenizer) == ("<s>Q: ", "yes</s>")


def test_plain_rows_never_meet_the_template(chatml):
    (example,), _ = prepare([{"prompt": "a", "completion": "b"}], chatml)
    assert texts_of(example.turns[0], chatml) == ("a", "b</s>")


def test_token_across_the_boundary_is_counted_and_split():
    tokenizer = byte_tokenizer(CHATML, merges=[("Ċ", "Ċ"), ("a", "b")])
    rows = [{"prompt": "xa", "completion": "by"}, {"prompt": "x", "completion": "ab"}]
    examples, report = prepare(rows, tokenizer)
    assert report.boundary_merges == 1
    assert any("tokenized separately" in line for line in report.lines())
    assert [texts_of(example.turns[0], tokenizer) for example in examples] == [
        ("xa", "by</s>"),
        ("x", "ab</s>"),
    ]
    (example,), report = prepare([{"messages": talk("hi", "\nyo")}], tokenizer)
    assert report.boundary_merges == 1
    assert texts_of(example.turns[0], tokenizer)[1] == "\nyo<|im_end|>"


def test_template_that_rewrites_history_is_refused():
    template = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>'")
    rows = [{"messages": talk("hi", "<think>yo")}, {"messages": talk("hi", "yo")}]
    with pytest.raises(TokenizerError) as caught:
        prepare(rows, byte_tokenizer(template))
    message = str(caught.value)
    assert message.startswith("row 2 of train.jsonl: the chat template renders the prompt differently")
    assert "is '<th' without the reply and 'yo<|im_end|>' with it" in message
    assert "get_training_chat_template" in message


def test_messages_without_template_name_the_way_out():
    with pytest.raises(TokenizerError, match=r"row 1 of train.jsonl: .*no chat template.*--chat_template_path chatml"):
        prepare([{"messages": talk("hi", "yo")}], byte_tokenizer())


def test_question_and_answer_follow_the_tokenizer(chatml):
    row = {"question": "1+1?", "answer": "2"}
    (example,), report = prepare([row], chatml)
    assert texts_of(example.turns[0], chatml)[1] == "2<|im_end|>"
    assert report.format == "question/answer"
    plain = byte_tokenizer()
    (example,), _ = prepare([row], plain)
    assert texts_of(example.turns[0], plain) == ("1+1?\n", "2</s>")


def test_template_refusal_names_row():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role.') }}{% endif %}" + CHATML
    rows = [{"messages": talk("hi", "yo")}, {"messages": talk("hi", "yo", system="x")}]
    with pytest.raises(
        DatasetError, match=r"^row 2 of train.jsonl: the chat template raised an error \(No system role\)"
    ):
        prepare(rows, byte_tokenizer(template))


def test_unknown_role_names_row(chatml):
    rows = [{"messages": talk("hi", "yo")}] * 300
    rows = [*rows, {"messages": [{"role": "narrator", "content": "x"}]}]
    with pytest.raises(DatasetError, match=r'^row 301 of train.jsonl: message 1 .* unknown role "narrator"'):
        prepare(rows, chatml)


def test_assistant_turns(chatml):
    rows = [{"messages": talk("a", "b", "c", "d", "e", "f")}, {"messages": talk("g", "h")}]

    def shape(mode):
        examples, _ = prepare(rows, chatml, DataOptions(4096, 2048, assistant_turns=mode))
        return [(example.row, [turn.index for turn in example.turns]) for example in examples]

    assert shape("last") == [(0, [2]), (1, [0])]
    assert shape("random") == [(0, [0, 1, 2]), (1, [0])]
    assert shape("all") == [(0, [0]), (0, [1]), (0, [2]), (1, [0])]


def test_stated_prompt_gives_no_turns(chatml):
    row = {"prompt": talk("a", "b", "c"), "completion": talk("c", "d")[1:]}
    (example,), _ = prepare([row], chatml, DataOptions(4096, 2048, assistant_turns="random"))
    assert [turn.index for turn in example.turns] == [1]


def test_row_numbers_survive_drops(chatml):
    rows = [{"messages": talk("a", text)} for text in ("", "b", "", "d")]
    rows.append({"messages": [{"role": "assistant", "content": "first"}]})
    examples, report = prepare(rows, chatml)
    assert [example.row for example in examples] == [1, 3]
    assert report.dropped == {"empty reply": 2, "reply without a prompt": 1}
    assert (report.rows, report.kept) == (5, 2)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hi", "completion": 3}, '"completion" is the int 3; it must be text or a list of messages'),
        ({"messages": 3}, '"messages" is the int 3; it must be a list of messages'),
    ],
)
def test_a_number_in_place_of_a_reply_is_told_what_may_stand_there(row, said, chatml):
    with pytest.raises(DatasetError, match=said):
        prepare([row], chatml)


def test_nothing_left_says_why(chatml):
    with pytest.raises(DatasetError, match=r"none of its 3 rows can be used \(dropped 3 for: empty reply\)"):
        prepare([{"messages": talk("a", "")}] * 3, chatml)
    with pytest.raises(DatasetError, match=r"train\.jsonl: has no rows"):
        prepare([], chatml)


def test_prompt_that_fills_the_length_is_dropped():
    rows = [{"prompt": "p" * 30, "completion": "c"}, {"prompt": "p", "completion": "c"}]
    examples, report = prepare(rows, byte_tokenizer(), DataOptions(10, 10))
    assert [example.row for example in examples] == [1]
    assert report.dropped == {"no tokens left for a response after the prompt": 1}


def test_empty_prompt_needs_a_start_token():
    rows = [{"prompt": "", "completion": "c"}, {"prompt": "p", "completion": "c"}]
    assert prepare(rows, byte_tokenizer())[1].dropped == {"empty prompt": 1}
    assert prepare(rows, byte_tokenizer(bos=True))[1].dropped == {}


def test_overlong_rows_are_cut_dropped_or_refused():
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "p" * 8, "completion": "c" * 8}, {"prompt": "p", "completion": "c"}]
    (long, short), report = prepare(rows, tokenizer, DataOptions(10, 5))
    assert texts_of(long.turns[0], tokenizer) == ("ppppp", "ccccc")
    assert texts_of(short.turns[0], tokenizer) == ("p", "c</s>")
    assert (report.truncated_prompts, report.truncated_responses) == (1, 1)
    assert (report.prompt_lengths, report.response_lengths) == ([5, 1], [5, 2])
    assert "truncated: 1 prompts, 1 responses" in "\n".join(report.lines())
    (_, report) = prepare(rows, tokenizer, DataOptions(10, 5, max_length_policy="drop"))
    assert report.dropped == {"longer than max_length=10": 1}
    with pytest.raises(DatasetError, match=r"row 1 of train\.jsonl: 8 prompt tokens and 9 response .* to 17"):
        prepare(rows, tokenizer, DataOptions(10, 5, max_length_policy="error"))


def test_pair_shares_one_prompt_and_one_budget():
    tokenizer = byte_tokenizer()
    row = {"prompt": "p" * 8, "chosen": "c", "rejected": "r" * 9}
    (example,), report = prepare([row], tokenizer, DataOptions(12, 5, paired=True))
    turn = example.turns[0]
    assert texts_of(turn, tokenizer) == ("ppppp", "c</s>")
    assert tokenizer.decode(list(turn.rejected_ids)) == "r" * 7
    assert (report.truncated_prompts, report.truncated_responses) == (1, 1)


def test_pair_of_conversations(chatml):
    row = {"chosen": talk("q", "good"), "rejected": talk("q", "bad"), "messages": talk("q", "good")}
    (example,), _ = prepare([row], chatml, DataOptions(4096, 2048, paired=True, assistant_turns="all"))
    assert chatml.decode(list(example.turns[0].rejected_ids)) == "bad<|im_end|>"
    (example,), report = prepare([row], chatml)
    assert report.format == "messages"
    assert example.turns[0].rejected_ids is None


def test_pair_of_equals_is_dropped(chatml):
    rows = [{"prompt": "p", "chosen": "c", "rejected": other} for other in ("c", "r")]
    examples, report = prepare(rows, chatml, DataOptions(4096, 2048, paired=True))
    assert [example.row for example in examples] == [1]
    assert report.dropped == {"chosen equals rejected": 1}


def test_columns_of_the_prepared_dataset(chatml):
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    eos_ids = eos_token_ids(chatml, None)
    prepared, _ = prepare_dataset(rows, chatml, WIDE, eos_ids=eos_ids)
    assert prepared.column_names == ["row", "turn", "prompt_ids", "response_ids"]
    assert prepared.cache_files == []
    prepared, _ = prepare_dataset(rows, chatml, DataOptions(99, 50, paired=True), eos_ids=eos_ids)
    assert prepared.column_names == ["row", "turn", "prompt_ids", "response_ids", "rejected_ids"]
    assert prepared.features["row"].dtype == "int64"


def test_lists_and_datasets_prepare_alike(chatml):
    rows = [{"messages": talk("a", "b", "c", "d")}, {"messages": talk("e", "f", system="g")}]
    assert prepare(rows, chatml) == prepare(datasets.Dataset.from_list(rows), chatml)


def test_collator_pickles_and_keeps_order():
    records = [
        {"row": 4, "turn": [0, 1], "prompt_ids": [[1], [1, 2]], "response_ids": [[3], [4]]},
        {"row": 2, "turn": [0], "prompt_ids": [[5]], "response_ids": [[6]], "rejected_ids": [[7]]},
    ]
    collate = pickle.loads(pickle.dumps(collate_examples))
    assert collate(records) == {
        "examples": [
            Example(4, (Turn(0, (1,), (3,)), Turn(1, (1, 2), (4,)))),
            Example(2, (Turn(0, (5,), (6,), (7,)),)),
        ]
    }


def test_digest_identifies_rows_and_tokens(chatml):
    def digest(rows, **options):
        options = DataOptions(4096, 2048, **options)
        prepared, _ = prepare_dataset(rows, chatml, options, eos_ids=eos_token_ids(chatml, None))
        return dataset_digest(prepared), prepared

    rows = [{"messages": talk("a", "b", "c", "d")}, {"messages": talk("e", "f")}]
    first, prepared = digest(rows)
    assert digest(rows)[0] == first
    assert dataset_digest(prepared.select([0, 1])) == first
    others = [
        digest(rows[:1])[0],
        digest(rows[::-1])[0],
        digest(rows, assistant_turns="all")[0],
        digest(rows, assistant_turns="random")[0],
        dataset_digest(prepared.select([1, 0])),
    ]
    assert len({first, *others}) == 6


def test_digest_tells_where_a_prompt_ends():
    def digest(prompt, response):
        columns = {"row": [0], "turn": [[0]], "prompt_ids": [[prompt]], "response_ids": [[response]]}
        return dataset_digest(datasets.Dataset.from_dict(columns))

    assert digest([1, 2], [3]) != digest([1], [2, 3])


def test_options_without_room_are_refused():
    with pytest.raises(ConfigurationError, match="max_length=1"):
        DataOptions(1, 1)
    with pytest.raises(ConfigurationError, match="max_prompt_length=0"):
        DataOptions(10, 0)
    with pytest.raises(ConfigurationError, match="max_prompt_length=11 exceeds max_length=10"):
        DataOptions(10, 11)


def test_options_follow_the_configuration(tmp_path):
    given = {
        "max_length": 9,
        "max_prompt_length": 4,
        "prompt_truncation": "keep_start",
        "max_length_policy": "drop",
        "assistant_turns": "all",
    }
    config = SAPOConfig(
        str(tmp_path), segment_length=0.5, pair_source="paired", use_cpu=True, report_to="none", **given
    )
    assert DataOptions.of(config) == DataOptions(**given, paired=True)


def test_tokens_are_those_of_the_tokenizers_own_call():
    """Also of a tokenizer that was saved while it truncated and padded, and of one without a backend in Rust."""
    tokenizer = byte_tokenizer(CHATML)
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in (("Grüße 😀  \n\n", "née\u200b " * 40), ("a", "b"))
    ]
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=300)
    fast, _ = prepare_dataset(rows, tokenizer, WIDE, eos_ids=[tokenizer.eos_token_id])
    slow_kind = type("Slow", (type(tokenizer),), {"is_fast": False})
    tokenizer.__class__ = slow_kind
    slow, _ = prepare_dataset(rows, tokenizer, WIDE, eos_ids=[tokenizer.eos_token_id])
    assert fast.to_list() == slow.to_list()
    assert len(fast[0]["response_ids"][0]) > 200


@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_a_trainer_given_rows_refuses_tokens_beyond_the_embeddings(column, make_trainer, tokenizer):
    """The same check as of the command line, which prepares rows before it has a model."""
    rows = [*tiny_rows(3), {"prompt": "w1 w2", "chosen": " w3 w4"}]
    rows[3][column] = " w1 w59"
    options = DataOptions(32, 16)
    prepared, _ = prepare_dataset(rows, tokenizer, options, eos_ids=[1])
    small = tiny_llama(vocab_size=len(tokenizer) - 1)
    for shape in (rows, prepared):
        with pytest.raises(TokenizerError, match=r"row 4 of \w+: token 62 .*beyond the 62 embeddings"):
            make_trainer(rows=shape, model=small)
    with pytest.raises(TokenizerError, match="row 4 of eval_dataset"):
        make_trainer(rows=rows[:2], eval_rows=rows, model=small)
    with pytest.raises(TokenizerError, match="row 4 of"):
        prepare_dataset(rows, tokenizer, DataOptions(32, 16, embeddings=62), eos_ids=[1], first_row=100)
    make_trainer(rows=rows[:2], model=small)


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_an_eos_or_pad_token_beyond_the_embeddings_is_refused(name):
    other = tiny_tokenizer()
    other.add_special_tokens({name: "<new>"})
    rows = [{"prompt": "w1", "chosen": " w2<eos>"}]
    with pytest.raises(TokenizerError, match=rf"the {'EOS' if name == 'eos_token' else 'pad'} token of the tokenizer"):
        prepare_dataset(rows, other, DataOptions(32, 16, embeddings=63), eos_ids=[1])
