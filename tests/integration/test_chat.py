"""Talking to a model and to a run."""

import io
import json
import re
import shutil

import pytest
import torch
from rich.console import Console
from transformers import BloomConfig, BloomForCausalLM

from sapo.commands.chat import ChatSession, _say, _Wrapped
from sapo.commands.chat_models import (
    ChatModel,
    ChatModels,
    ConversationFullError,
    Reply,
    load_chat_models,
    prompt_ids,
    reply,
)
from sapo.commands.main import main
from sapo.errors import TokenizerError
from sapo.evaluation.targets import find_targets
from sapo.generation.sampling import Sampling
from tests.integration.pages import TEMPLATE
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama, write_rows

GREEDY = Sampling(0.0, 0, 1.0)


@pytest.fixture
def make_run(make_trainer, tokenizer, tmp_path):
    def make(*, lora):
        tokenizer.chat_template = TEMPLATE
        save_tiny(tmp_path / "start", tokenizer=tokenizer)
        model = tiny_llama().from_pretrained(tmp_path / "start")
        trainer = make_trainer("run", lora=lora, model=model, learning_rate=0.1, ema_decay=0.9)
        trainer.train()
        trainer.save_model()
        tokenizer.chat_template = None
        return tmp_path / "run"

    return make


def answers(cast, text="w1 w2"):
    ids = prompt_ids(cast.tokenizer, [{"role": "user", "content": text}], plain=False)
    found = {}
    for model in cast.models:
        found[model.name] = reply(
            model, cast.tokenizer, ids, GREEDY, max_new_tokens=12, seed=0, write=lambda piece: None
        ).text
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_answers_as_start_opponent_and_policy(lora, make_run, tmp_path):
    cast = load_chat_models(str(make_run(lora=lora)))
    assert [model.name for model in cast.models] == ["start", "opponent", "policy"]
    assert (len({id(model.model) for model in cast.models}) == 1) == lora
    logits = []
    for model in cast.models:
        with model.active() as model, torch.no_grad():
            logits.append(model(torch.tensor([[5, 6, 7]])).logits)
    with torch.no_grad():
        start = tiny_llama().from_pretrained(tmp_path / "start").eval()(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(logits[0], start)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[1], logits[2], atol=1e-4)
    assert answers(cast) == answers(cast)


def test_a_run_whose_start_is_gone_answers_without_it(make_run, tmp_path, caplog):
    folder = make_run(lora=False)
    shutil.rmtree(tmp_path / "start")
    assert [model.name for model in load_chat_models(str(folder)).models] == ["opponent", "policy"]
    assert "without its start" in caplog.text
    assert [target.role for target in find_targets([str(folder)])] == ["policy", "opponent"]
    assert "is left out. Name it with --start" in caplog.text


def test_a_run_that_started_from_an_adapter_shows_it_as_the_start(make_run, tmp_path, capsys):
    earlier = make_run(lora=True)
    rows = write_rows(tmp_path / "rows.jsonl")
    command = ["train", "--model_name_or_path", str(earlier), "--dataset_name", str(rows)]
    command += ["--output_dir", str(tmp_path / "later"), "--max_steps", "2", "--learning_rate", "0.1", "--use_cpu"]
    command += ["--max_length", "32", "--segment_length", "4", "--report_to", "none"]
    assert main([*command, "--gradient_checkpointing", "false"]) == 0
    before, after = (
        load_chat_models(str(earlier), device="cpu"),
        load_chat_models(str(tmp_path / "later"), device="cpu"),
    )
    assert [model.name for model in after.models] == ["start", "opponent", "policy"]
    inputs = torch.tensor([[5, 6, 7]])

    def logits(model):
        with model.active() as active:
            return active(inputs).logits

    assert torch.equal(logits(after.models[0]), logits(before.models[2]))
    assert not torch.equal(logits(after.models[2]), logits(before.models[2]))


def test_what_is_streamed_is_the_reply_and_a_seed_gives_the_same_draws(tokenizer):
    model = tiny_llama().eval()
    pieces: list[str] = []
    heard = [
        reply(
            ChatModel(name, model),
            tokenizer,
            [5, 6, 7],
            Sampling(1.0, 0, 1.0),
            max_new_tokens=10,
            seed=3,
            write=pieces.append,
        ).text
        for name in ("one", "two")
    ]
    assert heard[0] == heard[1] != ""
    assert "".join(pieces).replace(" ", "") == (heard[0] + heard[1]).replace(" ", "")
    assert len(pieces) > 4


def test_the_flags_alone_decide_how_a_model_replies(tokenizer):
    def said(model):
        one = ChatModel("policy", model)
        given = {"max_new_tokens": 8, "seed": 3, "write": str}
        return [reply(one, tokenizer, prompt_ids(tokenizer, talk, plain=True), Sampling(0.7, 0, 1.0), **given).text
                for talk in ([{"role": "user", "content": "w1 w2"}],)]  # fmt: skip

    model = tiny_llama().eval()
    expected = said(model)
    own = model.generation_config
    own.num_beams, own.repetition_penalty, own.min_new_tokens, own.suppress_tokens = 4, 5.0, 8, [7]
    assert said(model) == expected
    assert model.generation_config is own


def test_the_command_speaks_with_the_models_template(make_run, tmp_path, capsys, monkeypatch):
    make_run(lora=False)
    capsys.readouterr()
    assert main(["chat", str(tmp_path / "start"), "--prompt", "w1", "--max_new_tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("start> ")
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n\n/new\nw3\n"))
    assert main(["chat", str(tmp_path / "run"), "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"{name}> ") for name in ("start", "opponent", "policy")] == [2, 2, 2]


def test_without_a_template_each_line_is_sent_as_it_is(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    command = ["chat", str(tmp_path / "model"), "--prompt", "w1", "--max_new_tokens", "3", "--temperature", "0"]
    assert main(command) == 0
    note, answer = capsys.readouterr().out.splitlines()
    assert "no chat template" in note
    assert main([*command, "--plain"]) == 0
    assert capsys.readouterr().out.strip() == answer.strip()


def test_a_run_without_a_policy_and_a_model_that_is_not_there_are_told(make_trainer, tmp_path, capsys):
    make_trainer("run").train()
    assert main(["chat", str(tmp_path / "run"), "--prompt", "w1"]) == 2
    assert "has not saved its policy yet" in capsys.readouterr().err
    assert main(["chat", str(tmp_path / "nowhere"), "--prompt", "w1"]) == 2
    assert "no such model folder" in capsys.readouterr().err


def test_each_voice_hears_its_own_replies_and_its_text_cannot_drive_the_terminal(tokenizer, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=True, highlight=False)
    tokenizer.chat_template = TEMPLATE
    cast = ChatModels([ChatModel("one", tiny_llama()), ChatModel("two", tiny_llama(seed=1))], tokenizer)
    talk = ChatSession(cast, console, GREEDY, 4, 0, None, plain=False)

    def answer(model, *args, write, **kwargs):
        write("[bold]\x1b[2Jhi")
        return Reply(f"I am {model.name}", "complete")

    monkeypatch.setattr("sapo.commands.chat.reply", answer)
    talk.say("w1")
    talk.say("w2")
    tokenizer.chat_template = None
    assert [message["content"] for message in talk.turns["two"]] == ["w1", "I am two", "w2", "I am two"]
    assert "\x1b[2J" not in out.getvalue()
    assert "[bold]" in out.getvalue()
    talk.say("/system w3")
    assert talk.turns["one"] == [{"role": "system", "content": "w3"}]


def test_a_conversation_that_fills_the_model_is_told(tokenizer):
    with pytest.raises(ConversationFullError, match=r"has 64 tokens, and one takes 64. Start a new one."):
        reply(ChatModel("one", tiny_llama()), tokenizer, [5] * 64, GREEDY, max_new_tokens=4, seed=0, write=print)


@pytest.fixture
def talk(tokenizer):
    tokenizer.chat_template = TEMPLATE
    cast = ChatModels([ChatModel("one", tiny_llama().eval()), ChatModel("two", tiny_llama(seed=1).eval())], tokenizer)
    yield ChatSession(cast, Console(file=io.StringIO(), width=80), GREEDY, 4, 0, None, plain=False)
    tokenizer.chat_template = None


def shown(talk):
    return talk._console.file.getvalue()


def test_ctrl_c_stops_the_reply_and_not_the_talk(talk, monkeypatch):
    generate = type(talk._cast.models[0].model).generate

    def interrupted(self, inputs, *, streamer, **more):
        streamer.put(inputs)
        streamer.put(torch.tensor([5]))
        streamer.put(torch.tensor([6]))
        raise KeyboardInterrupt

    monkeypatch.setattr(type(talk._cast.models[0].model), "generate", interrupted)
    talk.say("w1")
    assert "[stopped]" in shown(talk)
    assert [turn["role"] for turn in talk.turns["one"]] == ["user", "assistant"]
    # The other model had not begun.
    assert talk.turns["two"] == []
    monkeypatch.setattr(type(talk._cast.models[0].model), "generate", generate)
    talk.say("w2")
    assert [turn["role"] for turn in talk.turns["one"]] == ["user", "assistant"] * 2
    assert [turn["role"] for turn in talk.turns["two"]] == ["user", "assistant"]


def test_a_reply_that_is_cut_says_so(talk):
    talk.say("w1")
    assert "[cut after 4 tokens]" in shown(talk)


def test_a_full_conversation_offers_a_new_one_without_leaving(talk, monkeypatch):
    talk.say("w1")
    for turns in talk.turns.values():
        turns[-1]["content"] = " ".join(["w2"] * 60)
    before = {name: list(turns) for name, turns in talk.turns.items()}
    monkeypatch.setattr("builtins.input", lambda question: "n")
    _say(talk, "w3", talk._console)
    assert "Start a new one" in shown(talk)
    assert talk.turns == before
    monkeypatch.setattr("builtins.input", lambda question: "")
    _say(talk, "w3", talk._console)
    assert [turn["role"] for turn in talk.turns["one"]] == ["user", "assistant"]
    assert talk.turns["one"][0]["content"] == "w3"


def test_the_commands_of_a_talk(talk, tmp_path):
    talk.say("/regenerate")
    assert "no reply yet" in shown(talk)
    talk.say("w1")
    first = list(talk.turns["one"])
    talk.say("/temp 5")
    talk.say("/regenerate")
    assert talk.turns["one"][0] == first[0]
    assert len(talk.turns["one"]) == 2
    assert talk.turns["one"] != first
    file = tmp_path / "talk.jsonl"
    talk.say(f"/save {file}")
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert saved == [{"model": name, "messages": turns} for name, turns in talk.turns.items()]
    talk.say(f"/save {file}")
    assert "exists already" in " ".join(shown(talk).split())
    talk.say("/temp hot")
    assert "The temperature is 5" in shown(talk)
    talk.say("/hlep")
    assert "nearest: /help" in shown(talk)
    talk.say("/help")
    assert "/regenerate " in shown(talk)
    talk.say("/new")
    assert talk.turns == {"one": [], "two": []}


def test_no_word_is_broken_at_the_edge():
    out = io.StringIO()
    console = Console(file=out, width=20, force_terminal=True, highlight=False, _environ={"NO_COLOR": "1"})
    wrapped = _Wrapped(console, start=5)
    text = "several words that are longer than one line of this terminal"
    for piece in re.findall("...?", text):
        wrapped.write(piece)
    wrapped.close()
    lines = out.getvalue().splitlines()
    assert " ".join(" ".join(lines).split()) == text
    assert len(lines[0]) <= 15
    assert max(map(len, lines)) <= 20


def test_a_conversation_that_the_template_refuses_is_one_line():
    tokenizer = byte_tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(TokenizerError, match=r"refuses this conversation \(System role not supported\)\. Leave out"):
        prompt_ids(tokenizer, [{"role": "system", "content": "Be kind."}], plain=False)


def test_a_model_without_a_number_of_positions_answers_as_long_as_it_may(tokenizer):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2, eos_token_id=1)
    model = ChatModel("bloom", BloomForCausalLM(config).eval())
    answer = reply(model, tokenizer, [5] * 40, GREEDY, max_new_tokens=5, seed=0, write=lambda piece: None)
    assert len(tokenizer(answer.text)["input_ids"]) <= 5
    assert answer.text
