"""Which tokens of a conversation are a prompt and which are trained on, with the tokenizer of a real chat model.

SAPO_TEST_REAL_MODEL names the model's folder, or several separated by ":"; `make test-real` sets it.
"""

import os
import random
from itertools import chain
from pathlib import Path

import pytest

from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.prepare import prepare_dataset
from sapo.demo.house_style import training_rows
from sapo.weights.description import load_generation_config, load_tokenizer

MODELS = [name for name in os.environ.get("SAPO_TEST_REAL_MODEL", "").split(os.pathsep) if name]

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MODELS, reason="SAPO_TEST_REAL_MODEL names no model folder"),
    pytest.mark.parametrize("model", MODELS, ids=[Path(name).name for name in MODELS]),
]

ODD = (
    "Ends in a space ", "  begins with two", "line one\nline two\n\nline four", "tab\tand naïve café", "日本語と中国語",
    "emoji 🙂🙃", "1234567890", "for i in range(3):\n    print(i)\n", "a" * 40, "...", "<b>html</b> & more",
    "\u202eodd",
)  # fmt: skip
SYSTEM = {"role": "system", "content": "You answer briefly."}


def talks():
    """The shop's conversations, alone and one after another, and texts that tokenizers find odd; own rows."""
    rng = random.Random(0)
    shop = [row.messages() for row in training_rows(60)]
    long = [list(chain(*rng.sample(shop, turns))) for turns in (2, 3, 4) for _ in range(6)]
    odd = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(ODD, reversed(ODD), strict=True)
    ]
    plain = [*shop, *long, *odd]
    return [*plain, *([SYSTEM, *talk] for talk in plain[::3])]


@pytest.mark.parametrize("turns", ["last", "random", "all"])
def test_tokens_are_those_of_the_template(model, turns):
    tokenizer = load_tokenizer(model)
    eos_ids = eos_token_ids(tokenizer, load_generation_config(model).eos_token_id)
    assert len(eos_ids) > 0
    rows = talks()
    options = DataOptions(max_length=4096, max_prompt_length=4096, assistant_turns=turns)
    prepared, _ = prepare_dataset(
        [{"messages": talk} for talk in rows], tokenizer=tokenizer, options=options, eos_ids=eos_ids
    )
    checked = 0
    for record in prepared:
        (example,) = collate_examples([record])["examples"]
        talk = rows[example.row]
        replies = [place for place, message in enumerate(talk) if message["role"] == "assistant"]
        if turns == "last":
            assert [turn.index for turn in example.turns] == [len(replies) - 1]
        for turn in example.turns:
            place = replies[turn.index]
            before = tokenizer.apply_chat_template(talk[:place], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(talk[: place + 1], return_dict=False)
            prompt, reply = list(turn.prompt_ids), list(turn.response_ids)
            assert prompt == before
            if talk[place]["content"][0].isspace():
                # Its first white space would merge with the end of the prompt, which generation has as it is.
                assert tokenizer.decode(whole).startswith(tokenizer.decode(prompt + reply))
            else:
                assert whole[: len(prompt + reply)] == prompt + reply
                # What the template writes after the EOS token is not trained on, and is white space.
                assert tokenizer.decode(whole[len(prompt + reply) :]).strip() == ""
            assert [token in eos_ids for token in reply] == [False] * (len(reply) - 1) + [True]
            assert prompt[:2] != [tokenizer.bos_token_id] * 2
            assert tokenizer.decode(reply[:-1]).strip() == talk[place]["content"].strip()
            checked += 1
    replies = sum(message["role"] == "assistant" for talk in rows for message in talk)
    assert checked == (len(rows) if turns == "last" else replies)
