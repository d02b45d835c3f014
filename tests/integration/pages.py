"""Commands of README and docs: what they say, made small enough for a test.

The pages show real models and real prompts. Here tiny models, and words that these know, stand in for them.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from sapo.commands.catalog import LAUNCHER
from tests.judged import JUDGE_PROMPT, write_baseline, write_mt_bench
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "guides").glob("*.md"))]

TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"

NAMES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "tiny-model",
    "my-sft-model": "tiny-model",
    '"meta-llama/Meta-Llama-3-8B"': '"tiny-model"',
    'model="my-model"': 'model="tiny-model"',
    " heldout.json": " held-out.jsonl",
    " train.json": " my.jsonl",
    "--model_name_or_path MODEL ": "--model_name_or_path tiny-model ",
    "/shared/weights": "weights",
    "Air scatters blue light most.": "w3 w4 w5 w6",
    "The sea reflects its colour.": "w3 w7 w8 w9",
}
"""Models, files and texts on the pages, and what stands in for each."""

VALUES = {
    "--prompt": "w1 w2",
    "--max_length": "32",
    "--max_prompt_length": "16",
    "--max_new_tokens": "4",
    "--max_steps": "1",
    "--segment_length": "4",
    "--lora_r": "2",
    "--limit": "4",
}
"""What replaces the value of a flag that a command gives."""

SIZES = {
    "train": {
        "--max_steps": "1", "--max_length": "32", "--max_prompt_length": "16", "--segment_length": "4",
        "--gradient_accumulation_steps": "1", "--use_cpu": "", "--overwrite_output_dir": "",
    },
    "generate": {"--max_length": "32", "--max_new_tokens": "4", "--use_cpu": ""},
    "data": {"--max_length": "32"},
    "evaluate": {"--limit": "4", "--max_length": "32", "--max_new_tokens": "4"},
    "chat": {"--max_new_tokens": "4"},
    "estimate": {"--model_config": str(ROOT / "tests/configs/llama-3-8b.json")},
}  # fmt: skip
"""Flags that a command gets besides its own."""

PARSED = {
    "sapo demo": "ten seconds even at one step: tests/integration/test_demo.py runs it",
    "--gguf": "needs llama.cpp and the package gguf: tests/integration/test_starts.py, with a converter of its own",
    "sapo serve": "needs vLLM: tests/integration/test_serve.py",
    "vllm_colocate": "needs vLLM: tests/integration/test_vllm_colocate_run.py",
    "--config llama3-8b": "tests/integration/test_published_recipes.py runs the recipe, with a tiny base model",
    "--config mistral-7b": "tests/integration/test_published_recipes.py runs the recipe, with a tiny base model",
    "--report_to": "needs a tracker: tests/integration/test_tracking.py",
    "--suite leaderboard": "needs lm-eval, an extra: tests/integration/test_harness.py",
    "--suite ifeval": "needs lm-eval, an extra: tests/integration/test_harness.py",
}
"""Commands of this package that are parsed and not run, and why. Of several processes one is run."""

FOREIGN = {
    "python -m venv": "makes an environment and installs into it, for minutes; the tests run in one that was made so",
    "python3 -m venv": "likewise",
    "source ": "likewise",
    "pip install": "likewise",
    ".venv-vllm/bin/pip install": "likewise",
    "make ": "likewise; .ci/run runs the targets",
    "trl sft": "test_docs.py runs it (slow: two processes that import trl)",
    "trl dpo": "likewise",
    "vllm serve": "needs vLLM, which has no build for the tests' environment",
    "llama-": "needs llama.cpp, a program that has to be compiled",
    "ollama ": "needs Ollama, a service of the machine",
    "lms ": "needs LM Studio, a desktop program",
    "trackio show": "needs trackio, an extra, and serves a page until it is stopped",
    "lm-eval run": "needs lm-eval, an extra; the other side of a comparison: tests/integration/test_harness.py",
    "python -m vllm": "needs vLLM; test_docs.py compares it with what `sapo serve` starts",
    "python benchmarks/": "minutes to hours; tests/unit/test_benchmarks.py runs their parts",
    "export ": "test_docs.py sets the variable",
    "eval ": "test_docs.py runs it in a shell",
}
"""Beginnings of other commands, and why they are not run."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: the word after the fence, and the text."""

    kind: str
    text: str


def blocks(page):
    """The fenced blocks of a page, indented ones too."""
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [
        Block(kind, "\n".join(line.removeprefix(indent) for line in text.splitlines())) for indent, kind, text in found
    ]


def commands(page):
    """What a page tells people to type: lines of `bash` blocks, and commands in blocks without a language."""
    lines = []
    for block in blocks(page):
        joined = re.sub(r"\\\n\s*", " ", block.text)
        for line in joined.splitlines():
            line = " ".join(re.sub(r"\s#\s.*$", "", line).split()).removeprefix(".venv/bin/")
            if not line or line.startswith("#"):
                continue
            if block.kind in ("bash", "sh") or (not block.kind and re.match(r"([A-Z_]+=\S+ )*sapo ", line)):
                lines.append(line)
    return lines


def without_variables(command):
    """A command without the variables of the environment before it, and without a redirection after it."""
    return re.sub(r" > \S+$", "", re.sub(r"^([A-Z_]+=\S+ )+", "", command))


def substituted(text):
    """The text with tiny models in the place of real ones."""
    for real, tiny in NAMES.items():
        text = text.replace(real, tiny)
    return text


def sized(command, servers=(), judge=None):
    """The arguments of a command of this package, small enough for a test, in one process.

    Args:
        command: as on the page.
        servers: URLs in the place of those of vLLM servers.
        judge: URL in the place of a judge's.
    """
    text = substituted(without_variables(command))
    for flag in ("accelerate_config", *LAUNCHER):
        text = re.sub(rf" --{flag} \S+", "", text) if text.startswith("sapo train") else text
    for given, url in zip(dict.fromkeys(re.findall(r"(?<=--vllm_server_url )\S+", text)), servers, strict=False):
        text = text.replace(given, url)
    arguments = shlex.split(text)[1:]
    if servers and "--vllm_server_url" in arguments and "--generation_backend" not in arguments:
        arguments += ["--generation_backend", "vllm_server"]  # as the page has it in the recipe
    if judge is not None and "--judge_model" in arguments:
        if "--judge_base_url" not in arguments:
            arguments += ["--judge_base_url", ""]
        arguments[arguments.index("--judge_base_url") + 1] = judge
    for at, word in enumerate(arguments[:-1]):
        if word in VALUES:
            arguments[at + 1] = VALUES[word]
    if arguments[0] == "train" and "--resume_from_checkpoint" in arguments:
        # One step more than the run before, which its recipe describes.
        more = {"--max_steps": "2", "--use_cpu": ""}
    else:
        more = dict(SIZES.get(arguments[0], {}))
    if arguments[0] == "generate" and "--segment_length" in arguments:
        del more["--max_new_tokens"]  # a segment has its own number of tokens
    if any(word in ("lora-dpo", "qlora-dpo") for word in arguments) and arguments[0] == "train":
        more |= {"--bf16": "false", "--dtype": "float32", "--lora_r": "2"}
    for flag, value in more.items():
        if flag not in arguments:
            arguments += [flag, value] if value else [flag]
    return arguments


def only_parsed(command):
    """Why a command of this package is not run, or nothing."""
    return next((reason for part, reason in PARSED.items() if part in command), "")


def foreign(command):
    """Why a command that is not one of this package is not run, or nothing."""
    bare = without_variables(command)
    return next(
        (reason for start, reason in FOREIGN.items() if bare.startswith(start) or command.startswith(start)), ""
    )


def furnish(folder, tokenizer):
    """Put into a folder what the pages take for granted: a model, rows, a recipe."""
    tokenizer.chat_template = TEMPLATE
    save_tiny(folder / "tiny-model", tokenizer=tokenizer)
    tokenizer.chat_template = None
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5 w6 w7 w8"}]
    for name in ("my.jsonl", "held-out.jsonl"):
        (folder / name).write_text((json.dumps({"messages": turns}) + "\n") * 8)
    for name in ("llm_judge/data/mt_bench", "DATA/mt_bench"):
        write_mt_bench(folder / name)
    for name in ("alpaca_eval_gpt4_baseline.json", "baseline.json"):
        write_baseline(folder / name)
    (folder / "alpaca_eval_clf.txt").write_text(JUDGE_PROMPT)
    (folder / "chat.jinja").write_text(TEMPLATE)
    recipe = {"model_name_or_path": "tiny-model", "dataset_name": "my.jsonl", "output_dir": "runs/recipe"}
    (folder / "recipe.yaml").write_text("".join(f"{name}: {value}\n" for name, value in recipe.items()))
