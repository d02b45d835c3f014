"""Talking to a model and to a run."""

import io
import json

import pytest
import torch
from rich.console import Console

from sapo.commands.chat import ChatSession
from sapo.commands.chat_models import ChatModel, ChatModels, load_chat_models, prompt_ids, reply
from sapo.commands.main import main
from sapo.generation.sampling import Sampling
from tests.integration.pages import TEMPLATE
from tests.tiny import tiny_llama, tiny_rows

GREEDY = Sampling(0.0, 0, 1.0)


@pytest.fixture
def make_run(make_trainer, tokenizer, tmp_path):
    def make(*, lora):
        tokenizer.chat_template = TEMPLATE
        tiny_llama().save_pretrained(tmp_path / "start")
        tokenizer.save_pretrained(tmp_path / "start")
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
        )
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


def test_a_run_that_started_from_an_adapter_shows_it_as_the_start(make_run, tmp_path, capsys):
    earlier = make_run(lora=True)
    rows = "".join(json.dumps(row) + "\n" for row in tiny_rows())
    (tmp_path / "rows.jsonl").write_text(rows)
    command = ["train", "--model_name_or_path", str(earlier), "--dataset_name", str(tmp_path / "rows.jsonl")]
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
        )
        for name in ("one", "two")
    ]
    assert heard[0] == heard[1] != ""
    assert "".join(pieces).replace(" ", "") == (heard[0] + heard[1]).replace(" ", "")
    assert len(pieces) > 4


def test_the_command_speaks_with_the_models_template(make_run, tmp_path, capsys, monkeypatch):
    make_run(lora=False)
    capsys.readouterr()
    assert main(["chat", str(tmp_path / "start"), "--prompt", "w1", "--max_new_tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("start> ")
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n\n/new\nw3\n"))
    assert main(["chat", str(tmp_path / "run"), "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"{name}> ") for name in ("start", "opponent", "policy")] == [2, 2, 2]


def test_a_tokenizer_without_a_template_is_told_of_plain(tmp_path, tokenizer, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["chat", str(tmp_path / "model"), "--prompt", "w1"]) == 2
    assert "Add --plain" in capsys.readouterr().err
    assert main(["chat", str(tmp_path / "model"), "--prompt", "w1", "--plain", "--max_new_tokens", "3"]) == 0


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
        return f"I am {model.name}"

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
    with pytest.raises(Exception, match=r"has 64 tokens, one takes 64. Start anew with /new"):
        reply(ChatModel("one", tiny_llama()), tokenizer, [5] * 64, GREEDY, max_new_tokens=4, seed=0, write=print)
