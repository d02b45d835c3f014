"""The built-in tasks: short questions with one right answer each, bases built from different seeds."""

import json
from pathlib import Path

from cells import supervised
from transformers import AutoTokenizer

from sapo.demo.build import MODEL_FOLDER, build
from sapo.demo.score import answers
from sapo.demo.tasks import MAX_PROMPT_TOKENS, MAX_REPLY_TOKENS, TRAIN_ROWS, heldout_rows, make_rows, prompt_of

NAME = "toy"
STEPS = 60
BATCH = 32
SEGMENT = "8"
MILD = (("beta", "0.01"), ("segment_length", "4"), ("temperature", "1"))
FEW_RATES = ("1e-4", "3e-4", "1e-3", "2e-3")
"""For few rows, which take less."""
RATES, WEIGHTS, BETAS = ("3e-4", "1e-3", "2e-3", "4e-3"), ("1", "3"), ("0.1", "0.5")
MORE: dict[str, dict[str, str]] = {}
TEMPERATURES = (0, 0.7, 1)
ALONG = (0, 1)
"""Temperatures along a run, on the validation split."""
POINTS = 6
ROOM = MAX_REPLY_TOKENS
CHOOSE = "right@0"
"""Runs are stopped, and trials chosen, by greedy accuracy on the validation split."""
SHOWN = ("right@0", "right@0.7", "right@1", "nll", "nll, own stop", "end@1", "length@1", "distinct4@1")
ROWS = {"validation": 300, "test": 800}
FEW_STEPS = 8


def bases(work: Path, count: int, rows: int | None) -> dict[str, Path]:
    """The shipped checkpoint, and others of the same making; for few rows, those had their brief SFT on these rows."""
    found = {}
    for number in range(count):
        folder = found[f"base-{number}"] = work / "bases" / f"base-{number}"
        if rows is None and number == 0:
            found["base-0"] = MODEL_FOLDER
        elif rows is None and not (folder / "config.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            build(folder, seed=number)
        elif rows is not None:
            pretrained = work.parent / "toy-pretrained" / str(number)
            if not (pretrained / "config.json").is_file():
                pretrained.parent.mkdir(parents=True, exist_ok=True)
                build(pretrained, seed=number, rows=())
            options = {"max_steps": str(FEW_STEPS), "per_device_train_batch_size": str(BATCH), "learning_rate": "1e-3"}
            supervised(pretrained, train_file(work, rows), folder, seed=str(10 + number), **options, **flags())
    return found


def train_file(work: Path, rows: int | None) -> Path:
    """The rows that the bases' brief SFT saw, and no others."""
    file = work / "train.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in TRAIN_ROWS[:rows]))
    return file


def flags() -> dict[str, str]:
    """What all cells have in common."""
    return {"max_length": str(MAX_PROMPT_TOKENS + MAX_REPLY_TOKENS), "tail_margin": "0"}


def split(name: str) -> dict:
    """Held-out rows as arguments of `measures.measure`; none occurs in both splits, nor was looked at before."""
    seen = {prompt_of(row) for row in heldout_rows(1000)}
    validation = make_rows(ROWS["validation"], seed=1014, exclude=seen, heldout=True)
    if name == "validation":
        rows = validation
    else:
        rows = make_rows(ROWS["test"], seed=1015, exclude=seen | {prompt_of(row) for row in validation}, heldout=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    examples = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        examples.append((tuple(prompt), tuple(whole[len(prompt) :])))
    return {"examples": examples, "right": lambda number, reply: answers(rows[number], reply, tokenizer), "batch": 250}
