"""What toys hide: a real chat model through every command. `make test-real` makes the model and runs this.

SAPO_TEST_REAL_MODEL names the model's folder; SAPO_TEST_REAL_RESULTS, if set, a folder for times and memory as JSON.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sapo.errors import EvaluationError
from sapo.evaluation.harness_data import require_packages
from tests.shared_data import DATA
from tests.tiny import write_rows

MODEL = os.environ.get("SAPO_TEST_REAL_MODEL", "")
RESULTS = os.environ.get("SAPO_TEST_REAL_RESULTS")

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not Path(MODEL, "config.json").is_file(), reason="SAPO_TEST_REAL_MODEL names no model folder"),
]

TOPICS = ("rivers", "bread", "maps", "violins", "bees", "bridges", "clocks", "glass", "tea", "comets")
SMALL = (
    "--use_cpu", "--report_to", "none", "--max_length", "160", "--segment_length", "16", "--save_strategy", "steps",
    "--per_device_train_batch_size", "2", "--logging_steps", "1", "--report_pairs", "0", "--chosen_probe_size", "0",
    "--gradient_checkpointing", "false", "--save_total_limit", "2",
)  # fmt: skip
LORA = ("--use_peft", "--lora_target_modules", "all-linear", "--learning_rate", "1e-4")
FORMS = {
    "lora-dpo-float32": (*LORA, "--objective", "dpo"),
    "lora-orpo-bfloat16": (*LORA, "--objective", "orpo", "--bf16", "true"),
    "full-dpo-bfloat16": ("--objective", "dpo", "--bf16", "true", "--learning_rate", "1e-6"),
    "full-orpo-float32": ("--objective", "orpo", "--learning_rate", "1e-6"),
}


def rows(count=24, seed=0):
    """Questions with answers of one to three sentences, own text."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        one, other = rng.sample(TOPICS, 2)
        facts = [f"{one.capitalize()} reward patience.", f"People write about {one} and {other}.", "Start small."]
        answer = " ".join(facts[: rng.randint(1, 3)])
        made.append({"messages": [{"role": "user", "content": f"Tell me about {one}."},
                                  {"role": "assistant", "content": answer}]})  # fmt: skip
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, seed in (("train", 0), ("test", 1)):
        write_rows(folder / f"{name}.jsonl", rows(seed=seed))
    return folder


def sapo(*arguments, expect=0):
    """Run a command in a process of its own; its output, wall seconds, CPU seconds and peak memory in GB."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([sys.executable, "-m", "sapo", *map(str, arguments)], stdout=out, stderr=errors)
        # Not child.wait(): what it used is told once, to whoever waits for it.
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), errors.seek(0)
        said, complaints = out.read(), errors.read()
    assert child.returncode == expect, said[-2000:] + complaints[-4000:]
    return said, {"wall_s": round(time.monotonic() - started, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1),
                  "peak_gb": round(used.ru_maxrss / 2**20, 2)}  # fmt: skip


def note(name, figures):
    print(name, figures)
    if RESULTS:
        folder = Path(RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


def train(form, data, out, *more, expect=0):
    given = ("--model_name_or_path", MODEL, "--dataset_name", data / "train.jsonl", "--output_dir", out)
    return sapo("train", *given, *SMALL, *FORMS[form], *more, expect=expect)[1]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    (file,) = [run / name for name in ("model.safetensors", "adapter_model.safetensors") if (run / name).is_file()]
    return file.read_bytes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def trained(form, data, runs):
    """The run of `form`: of an earlier test, or made now."""
    if not (runs / form / "metrics.jsonl").is_file():
        train(form, data, runs / form, "--max_steps", "3", "--save_steps", "1")
    return runs / form


@pytest.mark.parametrize("form", FORMS)
def test_trains(form, data, runs):
    figures = train(form, data, runs / form, "--max_steps", "3", "--save_steps", "1")
    lines = [line for line in metrics(runs / form) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    if "dpo" in form:
        # The policy has not moved yet: it is the reference.
        assert abs(lines[0]["rewards/margins"]) < (1e-5 if "float32" in form else 0.05)
    figures["loss"] = [line["loss"] for line in lines]
    figures["step_s"] = [line["time/step"] for line in lines if "time/step" in line]
    note(f"train-{form}", figures)


@pytest.mark.parametrize("form", ["lora-dpo-float32", "full-orpo-float32"])
def test_resumes_bit_for_bit_after_a_kill(form, data, runs, start):
    whole, killed = trained(form, data, runs), runs / f"{form}-killed"
    given = ("--model_name_or_path", MODEL, "--dataset_name", data / "train.jsonl", "--output_dir", killed)
    command = ("train", *given, *SMALL, *FORMS[form], "--max_steps", "3", "--save_steps", "1")
    child = start([sys.executable, "-m", "sapo", *map(str, command)], stdout=subprocess.DEVNULL)
    while child.poll() is None and not (killed / "checkpoint-1").is_dir():
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    note(f"resume-{form}", train(form, data, killed, "--max_steps", "3", "--save_steps", "1",
                                 "--resume_from_checkpoint", "auto"))  # fmt: skip
    assert weights(killed) == weights(whole)
    assert [line["loss"] for line in metrics(killed) if "loss" in line] == [
        line["loss"] for line in metrics(whole) if "loss" in line
    ]


def test_generates_pairs(data, runs):
    file = runs / "pairs.parquet"
    given = ("--model_name_or_path", MODEL, "--dataset_name", data / "test.jsonl")
    lengths = ("--max_length", "160", "--segment_length", "16", "--use_cpu")
    note("generate", sapo("generate", *given, *lengths, "--output_file", file)[1])
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    assert len(table) > 12
    assert {"prompt", "chosen", "rejected"} <= set(table.column_names)


QUESTION = "What is the capital of France?"


def replies(target):
    """Greedy replies of every model that `sapo chat` talks to, by name."""
    asked = ("--prompt", QUESTION, "--temperature", "0", "--max_new_tokens", "24")
    said, figures = sapo("chat", target, *asked)
    found = re.findall(r"^([\w-]+)> (.*?)(?: \[cut after 24 tokens\])?$", said, re.MULTILINE)
    return dict(found), figures


def test_chats_with_every_model_of_a_run(data, runs):
    """Three unguarded steps are enough to turn this reply, whose first token has a probability of 0.16."""
    said, figures = replies(trained("lora-dpo-float32", data, runs))
    assert list(said) == ["start", "opponent", "policy"]
    assert "Paris" in said["start"]
    assert all(said.values())
    note("chat", figures | {"replies": said})


def test_evaluates_on_local_measures(data, runs):
    run = trained("lora-dpo-float32", data, runs)
    rows = ("--suite", "local", "--dataset_name", data / "test.jsonl", "--limit", "6")
    _, figures = sapo("evaluate", run, *rows, "--max_new_tokens", "24", "--output_dir", runs / "evaluation")
    results = json.loads((runs / "evaluation" / "results.json").read_text())
    figures["local"] = results["suites"]["local"]["models"]
    note("evaluate-local", figures)


@pytest.mark.parametrize("form", ["lora-dpo-float32", "full-orpo-float32"])
def test_exported_model_answers_in_plain_transformers(form, data, runs):
    """The command compares replies and log-probabilities itself; here a fresh process loads the folder without sapo.

    In float32: the first token of this reply has close rivals, and rounding to bfloat16 or q8_0 can turn it.
    """
    run, out = trained(form, data, runs), runs / f"exported-{form}"
    said, figures = sapo("export", run, out, "--dtype", "float32", "--ollama")
    assert "Check:" in said
    asked = (
        "import sys; from transformers import pipeline; "
        "pipe = pipeline('text-generation', model=sys.argv[1], device='cpu'); "
        f"talk = [{{'role': 'user', 'content': {QUESTION!r}}}]; "
        "print(pipe(talk, max_new_tokens=24, do_sample=False)[0]['generated_text'][-1]['content'])"
    )
    done = subprocess.run([sys.executable, "-c", asked, str(out)], capture_output=True, text=True, check=True)
    said, _ = replies(run)
    assert done.stdout.strip().startswith(said["policy"])
    assert (out / "Modelfile").is_file()
    note(f"export-{form}", figures)


def test_ifeval_on_forty_prompts(data, runs):
    if not (DATA / "ifeval").is_dir():
        pytest.skip("SAPO_TEST_DATA has no ifeval")
    try:
        require_packages(["ifeval"])
    except EvaluationError as error:
        pytest.skip(str(error))
    run, out = trained("lora-dpo-float32", data, runs), runs / "ifeval"
    given = ("--suite", "ifeval", "--task_data", DATA, "--limit", "40", "--max_new_tokens", "128")
    _, figures = sapo("evaluate", run, *given, "--device", "cpu", "--batch_size", "8", "--output_dir", out)
    models = json.loads((out / "results.json").read_text())["suites"]["ifeval"]["models"]
    assert len(models) == 3  # start, policy and opponent
    figures["ifeval"] = {
        model: {name: one["value"] for name, one in found["measures"].items()} for model, found in models.items()
    }
    assert all(0 <= share <= 1 for found in figures["ifeval"].values() for share in found.values())
    note("evaluate-ifeval", figures)


def test_report_opens_in_a_browser(data, runs):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    run = runs / "reported"
    figures = train("lora-dpo-float32", data, run, "--max_steps", "2", "--report_pairs", "12", "--save_steps", "2")
    complaints, requests = [], []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_context(offline=True).new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((run / "report.html").as_uri())
        page.locator("html[data-ready=true]").wait_for(state="attached")
        assert page.locator("[role=option]").count() > 0
        browser.close()
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
    note("report", figures)


def test_a_new_template_grows_it(data, runs):
    """Tokens that the tokenizer lacks: rows are added for them, and trained under LoRA."""
    known = len(AutoTokenizer.from_pretrained(MODEL))
    template = runs / "own.jinja"
    template.write_text(
        "{#- added_tokens: <|turn|> <|over|> -#}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|over|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    run = runs / "template"
    figures = train("lora-dpo-float32", data, run, "--max_steps", "1", "--chat_template_path", template)
    indices = json.loads((run / "adapter_config.json").read_text())["trainable_token_indices"]
    assert indices == {"embed_tokens": [known, known + 1]}
    note("template", figures)
