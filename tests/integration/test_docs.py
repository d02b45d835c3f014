"""What README and docs tell people to type works, with a tiny model in the place of theirs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

import sapo
from sapo.commands.catalog import COMMANDS
from sapo.commands.main import main
from sapo.commands.parser import parse_command
from sapo.commands.recipes import FOLDER, find_recipe
from sapo.demo.run import ARMS
from sapo.hub import publish
from sapo.options import accepted
from tests.integration import pages
from tests.integration.pages import DOCS, PAGES, ROOT
from tests.integration.test_hub import Hub
from tests.judge_server import arithmetic, serving
from tests.reports import write_run
from tests.tiny import save_tiny
from tests.vllm_servers import StandIn

NAMED = [page for page in PAGES if pages.commands(page)]
WITH_PYTHON = [page for page in PAGES if any(block.kind == "python" for block in pages.blocks(page))]


def name_of(page):
    return str(page.relative_to(ROOT))


def known_words():
    """Options and flags of all commands."""
    flags = {name for command in COMMANDS.values() for name in command.flags}
    return {one.name for one in accepted()} | flags


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory, tokenizer):
    """Runs that pages take for granted: of a full model, and of an adapter."""
    folder = tmp_path_factory.mktemp("pages")
    pages.furnish(folder, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, more in (("mine", []), ("lora", ["--use_peft"])):
            mine = "sapo train --config guarded-dpo --model_name_or_path my-sft-model --dataset_name my.jsonl"
            assert main([*pages.sized(mine), "--output_dir", f"runs/{name}", *more]) == 0
    return folder / "runs"


@pytest.fixture
def reader(tmp_path, monkeypatch, tokenizer):
    """The folder in which commands are typed."""
    pages.furnish(tmp_path, tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay_out_runs(folder, finished, commands):
    """Put there the runs that the commands read and do not make."""
    made = set()
    for command in commands:
        written = re.findall(r"--output_dir (runs/[\w-]+)", command)
        read = set(re.findall(r"runs/[\w-]+", command)) - set(written)
        for run in sorted(read - made - {"runs/demo"}):
            if not (folder / run).exists():
                shutil.copytree(finished / ("lora" if run == "runs/lora" else "mine"), folder / run)
        made |= {*written, *read}
    if "runs/demo" in made:
        # As the demo leaves them, which tests/integration/test_demo.py runs.
        for arm in ARMS:
            write_run(folder / "runs/demo" / re.sub(r"\W+", "-", arm.lower()).strip("-"), steps=4)


def interrupted(server):
    """A live page is served until Ctrl-C: here it comes at once."""
    raise KeyboardInterrupt


def check_parsed(command):
    """The command's flags and values are accepted."""
    arguments = shlex.split(pages.substituted(pages.without_variables(command)))[1:]
    name = next(name for name in COMMANDS if arguments[: len(name.split())] == name.split())
    parsed = parse_command(COMMANDS[name], arguments[len(name.split()) :])
    if COMMANDS[name].takes_options:
        parsed.values()


@pytest.fixture
def services(reader, monkeypatch):
    """What stands in for services: of vLLM servers and of a judge the URLs, on demand; of the hub, a hub in memory."""
    hub = Hub()
    monkeypatch.setattr(publish, "HfApi", hub.client)
    with ExitStack() as stack:

        def start(commands):
            found = {}
            if any("--vllm_server_url" in command for command in commands):
                servers = [StandIn(reader / "tiny-model") for _ in range(2)]
                for server in servers:
                    stack.callback(server.stop)
                found["servers"] = [server.url for server in servers]
            if any("--judge_model" in command for command in commands):
                found["judge"] = stack.enter_context(serving(arithmetic)).url
            return found

        yield start


@pytest.mark.parametrize("page", NAMED, ids=name_of)
def test_every_command_of_a_page_runs(page, reader, services, finished_runs, monkeypatch, capsys):
    own = [one for one in pages.commands(page) if pages.without_variables(one).startswith("sapo ")]
    run = [command for command in own if not pages.only_parsed(command)]
    lay_out_runs(reader, finished_runs, run)
    found = services(run)
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", interrupted)
    for command in pages.commands(page):
        if command.startswith("export "):
            monkeypatch.setenv(*command.removeprefix("export ").split("=", 1))
        if command not in own:
            continue
        if command not in run or "--accelerate_config" in command:
            check_parsed(command)
        if command in run:
            assert main(pages.sized(command, **found)) == 0, f"{command}\n{capsys.readouterr().err}"


def test_completion_is_evaluated_by_a_shell():
    lines = {line for page in PAGES for line in pages.commands(page) if line.startswith("eval ")}
    for line in lines:
        typed = f'sapo() {{ {shlex.quote(sys.executable)} -m sapo "$@"; }}; {line}; complete -p sapo'
        assert "sapo" in subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_trls_commands_run(reader, tokenizer):
    """SFT of a base model with the template of another, and DPO on pairs that `sapo generate` wrote."""
    save_tiny(reader / "tiny-base", tokenizer=tokenizer)
    (reader / "data").mkdir()
    shutil.copy(reader / "my.jsonl", reader / "data")
    shutil.copy(FOLDER / "trl-sft.yaml", reader)
    elsewhere = pages.commands(DOCS / "guides/elsewhere.md")
    (pairs,) = [one for one in elsewhere if one.startswith("sapo generate")]
    assert main(pages.sized(pairs)) == 0
    (reader / "pairs").mkdir()
    (reader / "round-0.parquet").rename(reader / "pairs/round-0.parquet")
    small = "--use_cpu --bf16 false --max_steps 1 --max_length 32 --report_to none --per_device_train_batch_size 2"
    trl = [sys.executable, "-c", "import sys; from trl.cli import main; sys.argv[0] = 'trl'; main()"]
    run = [one for one in [*pages.commands(DOCS / "tutorial.md"), *elsewhere] if one.startswith("trl ")]
    assert [one.split()[1] for one in run] == ["sft", "dpo"]
    for line in run:
        line = line.replace("HuggingFaceTB/SmolLM2-135M ", "tiny-base ")
        words = shlex.split(f"{pages.substituted(line)} {small}")[1:]
        done = subprocess.run([*trl, *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = [words[at + 1] for at, word in enumerate(words) if word == "--output_dir"]
        assert (reader / folder / "model.safetensors").is_file()


@pytest.mark.parametrize("page", NAMED, ids=name_of)
def test_every_other_command_is_accounted_for(page):
    for command in pages.commands(page):
        if not pages.without_variables(command).startswith("sapo "):
            assert pages.foreign(command), f"{page.name}: {command}"


def test_every_exception_is_used_and_its_reason_exists():
    everything = [command for page in PAGES for command in pages.commands(page)]
    for part, reason in (pages.PARSED | pages.FOREIGN).items():
        assert any(part in command for command in everything), f"no page has {part}"
        for file in re.findall(r"(?:tests/)?[\w/]*test_\w+\.py", reason):
            assert list(ROOT.glob(f"**/{file}")), file


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_every_python_block_runs(page, reader, finished_runs, monkeypatch):
    shutil.copytree(finished_runs, reader / "runs")
    config, scope = sapo.SAPOConfig, {}

    def small(**options):
        if options.get("output_dir") == "runs/mine":
            shutil.rmtree(reader / "runs/mine")
        return config(**options | {"max_steps": 1, "max_length": 32, "use_cpu": True, "disable_tqdm": True})

    monkeypatch.setattr(sapo, "SAPOConfig", small, raising=False)
    monkeypatch.setattr(sapo, "SAPOTrainer", sapo.SAPOTrainer, raising=False)
    shutil.copy(FOLDER / "templates" / "chatml.jinja", reader)
    for block in pages.blocks(page):
        if block.kind == "python":
            exec(compile(pages.substituted(block.text), str(page), "exec"), scope)
    assert (reader / "runs/mine/model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_that_a_page_names_exists(page):
    known = known_words() | {"debug", "help", "version"}
    for command in pages.commands(page):
        if pages.without_variables(command).startswith("sapo "):
            for name in re.findall(r"--(\w+)", command):
                assert name in known, f"{page.name}: --{name}"
    for block in pages.blocks(page):
        if block.kind == "yaml" and "tasks:" not in block.text:
            for name in yaml.safe_load(block.text):
                assert name in known, f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    made = {"configuration.md"}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file.startswith(("https://", "http://")) or not file:
            continue
        if Path(file).name in made:
            assert not anchor or anchor in known_words(), target
            continue
        assert (page.parent / file).exists(), target
    for recipe in re.findall(r"--config ([\w-]+(?:/[\w-]+)?)(?=[\s`])", text):
        if recipe not in ("recipe", "runs/mine", "NAME", "FILE"):
            assert find_recipe(recipe).is_file(), recipe


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_test_and_benchmark_that_a_page_names_is_there(page):
    for file in re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py\b", page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_shows_the_words_of_the_tests(page):
    assert not re.search(r"\bw1 w2\b", page.read_text(encoding="utf-8"))


def test_vllm_by_hand_is_started_as_sapo_serve_would():
    from sapo.commands.arguments import parse
    from sapo.commands.serve import servers_for

    (by_hand,) = [command for command in pages.commands(DOCS / "engines.md") if "api_server" in command]
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


def test_the_notebook_runs_from_top_to_bottom(capsys, monkeypatch):
    # A notebook has IPython; the package does not need it.
    display = types.ModuleType("IPython.display")
    display.HTML = str
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
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
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    page = (site / "configuration/index.html").read_text()
    missing = [one.name for one in accepted() if f'<code id="{one.name}">' not in page]
    assert missing == []
