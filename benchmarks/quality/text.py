"""Natural text: role-play answers, and a pretrained Llama of 260,032 parameters after SFT on them.

Reads `stories260k_llama/hf` and `gpteacher_roleplay/roleplay.json` in the folder `DATA`, which is not part of this
repository. Answers are cut to whole sentences of 40 to 128 tokens; shorter ones are left out.
"""

import contextlib
import json
import re
from pathlib import Path

from transformers import AutoTokenizer

from sapo.cli import main
from sapo.data import DataOptions, prepare_dataset
from sapo.segments import derive_seed

NAME = "text"
DATA = Path("../shared/data")
STEPS = 36
BATCH = 8
SEGMENT = "0.4"
RATES, WEIGHTS, BETAS = ("1e-4", "3e-4", "1e-3"), ("1",), ("0.1",)
TEMPERATURES = (0.7, 1)
ROOM = 160
CHOOSE, BEST = "distance4@1", min
"""Trials are chosen by the distance of sampled 4-grams to those of the data, at temperature 1."""
SHOWN = ("nll", "end@1", "length@1", "distance2@1", "distance4@1", "repeat@1", "end@0.7", "length@0.7", "distance4@0.7")
BASE_STEPS = 400
SHORTEST, LONGEST, LONGEST_PROMPT = 40, 128, 96
ASIDE = {"test": 240, "validation": 120}
ROWS = {"test": 160, "validation": 120}
"""Of the rows put aside for each split, so many are measured: on a CPU more would take too long."""


def _model() -> Path:
    return DATA / "stories260k_llama" / "hf"


def _rows() -> list[dict[str, str]]:
    """Distinct questions with their cut answers, in an order that depends on the text alone."""
    tokenizer = AutoTokenizer.from_pretrained(_model())
    found = {}
    for row in json.loads((DATA / "gpteacher_roleplay" / "roleplay.json").read_text()):
        prompt = "\n".join(part for part in (row["instruction"], row["input"]) if part.strip()) + "\n\n"
        answer = ""
        for sentence in re.findall(r"[^.!?]+[.!?]+[\"”')]*\s*", row["output"].replace("\n", " ")):
            if len(tokenizer(answer + sentence, add_special_tokens=False)["input_ids"]) >= LONGEST:
                break
            answer += sentence
        answer = answer.strip()
        length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        if length < SHORTEST or len(tokenizer(prompt)["input_ids"]) > LONGEST_PROMPT:
            continue
        found.setdefault(prompt, {"prompt": prompt, "completion": answer})
    return sorted(found.values(), key=lambda row: derive_seed("quality", row["prompt"].replace("/", "|")))


def train_file(work: Path) -> Path:
    """The rows of SFT and of everything after it."""
    file = work / "train.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = sum(ASIDE.values())
        rows = _rows()[aside:]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def bases(work: Path, count: int) -> dict[str, Path]:
    """SFT of the pretrained model on the training rows, from seeds of their own."""
    found = {}
    for number in range(count):
        folder = work / "bases" / f"base-{number}"
        if not (folder / "recipe.yaml").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            options = {
                "model_name_or_path": str(_model()), "dataset_name": str(train_file(work)), "output_dir": str(folder),
                "objective": "sft", "learning_rate": "1e-3", "max_steps": str(BASE_STEPS), "seed": str(10 + number),
                "per_device_train_batch_size": "16", "save_strategy": "no", "use_cpu": "true", "report_to": "none",
                "gradient_checkpointing": "false", "dtype": "float32", "overwrite_output_dir": "true",
                "logging_steps": "50", **flags(),
            }  # fmt: skip
            arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
            with (work / "bases" / f"base-{number}.log").open("a") as log, contextlib.redirect_stdout(log):
                if main(["train", *arguments]) != 0:
                    raise SystemExit(f"{folder}: sapo train failed")
        found[f"base-{number}"] = folder
    return found


def flags() -> dict[str, str]:
    """What all cells have in common; several steps' segments are written at once, for speed."""
    return {"max_length": str(LONGEST_PROMPT + ROOM), "tail_margin": "0", "steps_per_generation": "4"}


def split(name: str) -> dict:
    """Held-out rows as arguments of `measures.measure`."""
    tokenizer = AutoTokenizer.from_pretrained(_model())
    rows = _rows()
    first = 0 if name == "test" else ASIDE["test"]
    options = DataOptions(max_length=LONGEST_PROMPT + ROOM, max_prompt_length=LONGEST_PROMPT)
    wanted = rows[first : first + ROWS[name]]
    prepared, _ = prepare_dataset(wanted, tokenizer, options, end_ids={tokenizer.eos_token_id})
    examples = [(tuple(row["prompt_ids"][0]), tuple(row["response_ids"][0])) for row in prepared]
    return {"examples": examples, "batch": 120}
