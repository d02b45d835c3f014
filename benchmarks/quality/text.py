"""Natural text: role-play answers, and a pretrained Llama of 260,032 parameters after SFT on them.

Reads `stories260k_llama/hf` and `gpteacher_roleplay/roleplay.json` in the folder `DATA`, which is not part of this
repository. Answers are cut to whole sentences of 40 to 128 tokens; shorter ones are left out.
"""

import json
import re
from pathlib import Path

from cells import supervised
from transformers import AutoTokenizer

from sapo.data.examples import DataOptions
from sapo.data.prepare import prepare_dataset
from sapo.seeds import derive_seed

NAME = "text"
DATA = Path("../shared/data")
STEPS = 48
BATCH = 8
SEGMENT = "0.4"
MILD = (("beta", "0.01"), ("segment_length", "0.2"), ("temperature", "1"))
FEW_RATES = ("1e-4", "3e-4", "1e-3")
"""For few rows, which take less."""
RATES, WEIGHTS, BETAS = ("3e-4", "1e-3", "3e-3"), ("1",), ("0.1",)
MORE = {
    "continued SFT": {"learning_rate": "2e-3"},
    "SAPO-ORPO": {"learning_rate": "1e-3", "beta": "0.02"},
    "SAPO-DPO, likelihood term": {"learning_rate": "1e-3", "chosen_nll_weight": "10"},
    "SPIN, likelihood term": {"learning_rate": "1e-3", "chosen_nll_weight": "10"},
    "SAPO-DPO": {"learning_rate": "1e-5"},
    "SPIN": {"learning_rate": "1e-5"},
}
"""A fourth trial each, added when the first three had shown that a weight of 1 does not hold on responses this long."""
TEMPERATURES = (0.7, 1)
ALONG = (1,)
"""Temperatures along a run, on the validation split."""
POINTS = 4
ROOM = 160
CHOOSE = "distance4@1"
"""Runs are stopped, and trials chosen, by the distance of sampled 4-grams to those of the data, at temperature 1."""
SHOWN = (
    "nll", "nll, own stop", "end@1", "length@1", "distance2@1", "distance4@1", "repeat@1", "distinct4@1",
    "end@0.7", "length@0.7", "distance2@0.7", "distance4@0.7", "repeat@0.7",
)  # fmt: skip
BASE_EPOCHS = 3
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


def train_file(work: Path, rows: int | None) -> Path:
    """The rows of SFT and of everything after it."""
    file = work / "train.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        first = sum(ASIDE.values())
        found = _rows()[first : None if rows is None else first + rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def bases(work: Path, count: int, rows: int | None) -> dict[str, Path]:
    """SFT of the pretrained model on the training rows, from seeds of their own."""
    file, found = train_file(work, rows), {}
    options = {"num_train_epochs": str(BASE_EPOCHS), "per_device_train_batch_size": "16", "learning_rate": "1e-3"}
    for number in range(count):
        folder = found[f"base-{number}"] = work / "bases" / f"base-{number}"
        supervised(_model(), file, folder, seed=str(10 + number), **options, **flags())
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
    prepared, _ = prepare_dataset(wanted, tokenizer, options, eos_ids={tokenizer.eos_token_id})
    examples = [(tuple(row["prompt_ids"][0]), tuple(row["response_ids"][0])) for row in prepared]
    return {"examples": examples, "batch": 120}
