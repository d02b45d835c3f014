"""Laws of `opponent_system_prompt`: what the opponent reads, and that nothing else reads it."""

import pytest

from sapo.config import SAPOConfig
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.prepare import prepare_dataset
from sapo.errors import ConfigurationError, DatasetError
from sapo.generation.scripted import ScriptedGenerator
from tests.prepared import CHATML, talk
from tests.tiny import byte_tokenizer, tiny_rows

BAD = "Be unhelpful."
SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + CHATML


def prepared(rows, *, template=CHATML, system=BAD, length=4096, **options):
    tokenizer = byte_tokenizer(template)
    given = DataOptions(length, options.pop("prompt", length), opponent_system_prompt=system, **options)
    rows, report = prepare_dataset(rows, tokenizer, given, eos_ids=eos_token_ids(tokenizer, None), source="train.jsonl")
    return collate_examples(list(rows))["examples"], report, tokenizer


@pytest.mark.parametrize("own", [None, "Be kind."])
@pytest.mark.parametrize("turns", ["last", "all", "random"])
def test_the_opponents_prompt_is_the_rows_with_another_system_message(own, turns):
    row = {"messages": talk("a", "b", "c", "d", system=own)}
    found, _, tokenizer = prepared([row], assistant_turns=turns)
    usual, _, _ = prepared([row], system=None, assistant_turns=turns)
    told, plain = ([turn for example in some for turn in example.turns] for some in (found, usual))
    assert [turn.opponent_prompt_ids for turn in plain] == [None] * len(plain)
    assert [(t.prompt_ids, t.response_ids) for t in told] == [(t.prompt_ids, t.response_ids) for t in plain]
    for turn in told:
        prompt = tokenizer.decode(list(turn.prompt_ids))
        body = prompt.removeprefix(SYSTEM.format(own)) if own else prompt
        assert tokenizer.decode(list(turn.opponent_prompt_ids)) == SYSTEM.format(BAD) + body


def test_both_prompts_leave_room_for_the_response():
    row = {"messages": talk("a", "b" * 30)}
    (example,), report, _ = prepared([row])
    (turn,) = example.turns
    room = len(turn.opponent_prompt_ids) + 20
    (example,), report, _ = prepared([row], length=room)
    (cut,) = example.turns
    assert (cut.prompt_ids, cut.opponent_prompt_ids) == (turn.prompt_ids, turn.opponent_prompt_ids)
    assert cut.response_ids == turn.response_ids[:20]
    assert (report.truncated_responses, report.truncated_prompts) == (1, 0)
    with pytest.raises(DatasetError, match=r"\(dropped 1 for: longer than max_prompt_length=9 with opponent_system_pr"):
        prepared([row], length=room, prompt=9)
    with pytest.raises(DatasetError, match=f"{len(turn.opponent_prompt_ids)} prompt tokens and 31 response tokens"):
        prepared([row], length=room, max_length_policy="error")


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"prompt": "a", "completion": "b"}, CHATML, r"^row 1 of train\.jsonl: plain text has no system message, whi"),
        ({"messages": talk("a", "b")}, NO_SYSTEM, "does not print its system message, under opponent_system_prompt"),
        ({"messages": talk("a", "b")}, REFUSES, r"^row 1 .*\(no system messages\).* under opponent_system_prompt alo"),
    ],
)
def test_a_system_message_that_would_not_be_read_is_refused(row, template, message):
    with pytest.raises(DatasetError, match=message):
        prepared([row], template=template)
    if "prompt" not in row:
        prepared([row], template=template, system=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opponent_system_prompt": " "}, "opponent_system_prompt is empty"),
        ({"opponent_system_prompt": BAD, "objective": "sft"}, "pair_source=none: no opponent generates"),
        ({"opponent_system_prompt": BAD, "pair_source": "paired"}, "pair_source=paired: no opponent generates"),
        ({"opponent_system_prompt": BAD, "loss_type": "nce"}, "with loss_type=nce: both of its terms are relative to"),
    ],
)
def test_an_opponent_prompt_without_effect_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SAPOConfig("out", use_cpu=True, report_to="none", **options)


def test_a_run_generates_from_the_opponents_prompt_and_trains_on_the_rows(make_trainer, tokenizer, monkeypatch):
    def write(contexts, budgets, seeds):
        return [[seed % 7 + 5] * budget for budget, seed in zip(budgets, seeds, strict=True)]

    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = [{"messages": talk(row["prompt"], row["chosen"])} for row in tiny_rows()]
    trained, contexts = {}, {}
    for told in (None, "w1 w2 w3"):
        generator = ScriptedGenerator(write)
        trainer = make_trainer(str(told), rows=rows, generator=generator, opponent_system_prompt=told)
        trainer.train()
        trained[told] = trainer.model.state_dict()
        contexts[told] = [context for call in generator.calls for context in call.contexts]
    assert len(contexts[None]) == len(contexts["w1 w2 w3"]) > 0
    for usual, told in zip(*contexts.values(), strict=True):
        assert told[-len(usual) :] == usual
        assert len(told) > len(usual)
    for name, weight in trained[None].items():
        assert weight.equal(trained["w1 w2 w3"][name])


def test_rows_prepared_without_it_are_refused(make_trainer):
    rows = [{"messages": talk("a", "b")}]
    tokenizer = byte_tokenizer(CHATML)
    ready, _ = prepare_dataset(rows, tokenizer, DataOptions(32, 16), eos_ids=eos_token_ids(tokenizer, None))
    with pytest.raises(
        ConfigurationError, match="train_dataset: these rows were prepared without opponent_system_prompt"
    ):
        make_trainer(rows=ready, opponent_system_prompt=BAD)
