"""What the README tells a newcomer to type works, with a tiny model in the place of theirs."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import sapo
from sapo.commands.main import main
from sapo.commands.recipes import find_recipe
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
SMALL = ["--max_steps", "1", "--max_length", "32", "--max_prompt_length", "16", "--segment_length", "4", "--use_cpu"]


def commands():
    text = "".join(block for kind, block in BLOCKS if not kind).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [line.removeprefix(".venv/bin/") for line in lines if line.startswith((".venv/bin/sapo ", "sapo "))]


@pytest.fixture
def newcomer(tmp_path, monkeypatch, tokenizer):
    """A folder with a model and a file of conversations, which is where the commands are typed."""
    tokenizer.chat_template = TEMPLATE
    tiny_llama().save_pretrained(tmp_path / "my-sft-model")
    tokenizer.save_pretrained(tmp_path / "my-sft-model")
    tokenizer.chat_template = None
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5 w6 w7 w8"}]
    (tmp_path / "my.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_type():
    assert len(commands()) >= 2
    assert sum(kind == "python" for kind, _ in BLOCKS) == 1


def interrupted(server):
    """A live page is served until Ctrl-C: here it comes at once."""
    raise KeyboardInterrupt


def test_every_command_runs(newcomer, monkeypatch, capsys):
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", interrupted)
    for command in commands():
        arguments = shlex.split(command)[1:]
        # The published model's configuration is in the tests, not on this machine's way to the hub.
        config = ["--model_config", str(ROOT / "tests/configs/llama-3-8b.json")]
        small = {"train": SMALL, "data": ["--max_length", "32"], "estimate": config}.get(arguments[0], [])
        assert main([*arguments, *small]) == 0, capsys.readouterr().err
    recipe = yaml.safe_load((newcomer / "runs/mine/recipe.yaml").read_text())
    assert recipe["model_name_or_path"] == "my-sft-model"
    assert (newcomer / "runs/mine/opponent/model.safetensors").is_file()


def test_the_python_example_runs(newcomer, monkeypatch):
    (example,) = (block for kind, block in BLOCKS if kind == "python")
    config = sapo.SAPOConfig

    def small(**options):
        return config(**options, max_steps=1, max_length=32, use_cpu=True, report_to="none", disable_tqdm=True)

    monkeypatch.setattr(sapo, "SAPOConfig", small, raising=False)
    monkeypatch.setattr(sapo, "SAPOTrainer", sapo.SAPOTrainer, raising=False)
    exec(compile(example, "README.md", "exec"), {})
    assert (newcomer / "runs/mine/model.safetensors").is_file()


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for recipe in re.findall(r"(?:--config |`)(presets/[\w-]+)", README):
        assert find_recipe(recipe).is_file(), recipe
