"""What the documentation tells people to type works, with a tiny model in the place of theirs."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from sapo.commands.catalog import COMMANDS
from sapo.commands.main import main
from sapo.demo.run import ARMS
from sapo.options import accepted
from tests.integration.test_readme import ROOT, SMALL, interrupted, newcomer  # noqa: F401
from tests.reports import write_run

DOCS = ROOT / "docs"
PAGES = [DOCS / name for name in ("index.md", "tutorial.md")] + sorted((DOCS / "guides").glob("*.md"))
SHELL = {
    "make install": "what the tests run in was made by it",
    "sapo train --config llama3-8b": "test_published_recipes.py",
    "sapo train --config mistral-7b": "test_published_recipes.py",
    "trl sft": "trl's command; tests/unit/test_recipes.py reads the recipe",
    "pip install": "installs an extra",
    "vllm serve": "vLLM",
    "llama-": "llama.cpp",
    "ollama ": "Ollama",
    "lms ": "LM Studio",
    "sapo export": "needs llama.cpp; tests/integration/test_starts.py with a converter of its own",
    "trackio show": "serves a page until it is stopped",
    "sapo train --config guarded-dpo --report_to trackio": "test_tracking.py, where trackio is",
    "sapo train --config guarded-dpo --push_to_hub": "test_hub.py, against a hub that is not there",
}
"""Commands in `bash` blocks: not run here, and why."""


def blocks(page, kind):
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    text = "".join(block for name, block in found if name == kind).replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def sized(command):
    """The same command, small enough for a test."""
    arguments = shlex.split(command)
    name = arguments[1]
    if name == "train":
        given = list(SMALL)
        if "--resume_from_checkpoint" in arguments:
            # One step more than the run before.
            return [*arguments[1:], "--max_steps", "2", "--use_cpu"]
        if "lora-dpo" in arguments:
            given += ["--bf16", "false", "--dtype", "float32", "--lora_r", "2"]
        return [*arguments[1:], *given, "--gradient_accumulation_steps", "1", "--overwrite_output_dir"]
    return [*arguments[1:], *{"data": ["--max_length", "32"], "demo": ["--max_steps", "2"]}.get(name, [])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page, newcomer, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", interrupted)
    commands = [command for command in blocks(page, "") if command.startswith("sapo ")]
    if any("runs/demo" in command for command in commands):
        # As the demo leaves them, which tests/integration/test_demo.py runs.
        for arm in ARMS:
            write_run(newcomer / "runs/demo" / re.sub(r"\W+", "-", arm.lower()).strip("-"), steps=4)
    if page.parent == DOCS / "guides" and any("runs/mine" in command for command in commands):
        # Guides take the tutorial's run for granted.
        for name, more in (("mine", []), ("lora", ["--use_peft", "--lora_r", "2"])):
            mine = "sapo train --config guarded-dpo --model_name_or_path my-sft-model --dataset_name my.jsonl"
            assert main([*sized(mine), "--output_dir", f"runs/{name}", *more]) == 0
    for command in commands:
        if command.startswith("sapo demo"):
            continue
        assert main(sized(command)) == 0, f"{command}\n{capsys.readouterr().err}"


def test_every_other_command_is_accounted_for():
    for page in PAGES:
        for command in blocks(page, "bash"):
            assert any(command.startswith(known) for known in SHELL), f"{page.name}: {command}"


def test_every_option_that_a_page_names_exists():
    known = {one.name for one in accepted()}
    flags = {name for command in COMMANDS.values() for name in command.flags} | {"debug", "help", "version"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"--(\w+)", " ".join([*blocks(page, ""), *blocks(page, "bash")])):
            assert name in known | flags, f"{page.name}: --{name}"
        for name in re.findall(r"`(\w+): [^`]+`", text):
            assert name in known | {"README.md"}, f"{page.name}: {name}"


def test_vllm_by_hand_is_started_as_sapo_serve_would():
    from sapo.commands.arguments import parse
    from sapo.commands.serve import servers_for

    (by_hand,) = [block for block in blocks(DOCS / "engines.md", "bash") if "api_server" in block]
    words = shlex.split(by_hand)
    flags = (
        "--model_name_or_path my-sft-model --dataset_name my.jsonl --dtype bfloat16 --use_peft --output_dir run "
        "--generation_backend vllm_server --vllm_server_url http://10.0.0.2:8000"
    )
    run = parse(shlex.split(flags), "sapo serve")
    (server,) = servers_for(run, "python", ["0"])
    given = {name: value for name, value in server.environment.items() if name != "CUDA_VISIBLE_DEVICES"}
    start = words.index("python")
    assert words[start:] == list(server.command)
    assert dict(word.split("=") for word in words[:start]) == given


def test_the_notebook_runs_from_top_to_bottom(capsys):
    cells = json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    scope = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), scope)
    out = capsys.readouterr().out
    assert "rejected " in out
    assert (Path(scope["output"]) / "report.html").is_file()
    assert scope["metrics"][-1]["step"] == 40


def test_the_site_builds_and_has_every_option(tmp_path):
    pytest.importorskip("mkdocs", reason="needs mkdocs: make docs")
    import subprocess

    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    page = (site / "configuration/index.html").read_text()
    missing = [one.name for one in accepted() if f"<code>{one.name}</code>" not in page]
    assert missing == []
