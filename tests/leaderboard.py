"""Rows of our own in the shapes of the Open LLM Leaderboard's datasets, few-shot splits included, as local files."""

import json
import random
from pathlib import Path

THINGS = {
    "a kettle": "boil water", "a needle": "sew cloth", "a ladder": "reach a roof", "a broom": "sweep a floor",
    "a spade": "dig a hole", "a lamp": "light a room", "a razor": "shave a beard", "a whisk": "beat eggs",
    "an oven": "bake bread", "a pump": "fill a tyre", "a compass": "find north", "an umbrella": "stay dry",
}  # fmt: skip
NAMES = ("Ada", "Bruno", "Cleo", "Dara", "Emil", "Fay")


def _choices(rng, right):
    wrong = rng.sample([use for use in THINGS.values() if use != right], 3)
    place = rng.randrange(4)
    return [*wrong[:place], right, *wrong[place:]], place


def _arc(rng, number):
    thing, use = rng.choice(list(THINGS.items()))
    choices, place = _choices(rng, use)
    return {
        "id": f"own_{number}",
        "question": f"What is {thing} best used for?",
        "choices": {"text": choices, "label": list("ABCD")},
        "answerKey": "ABCD"[place],
    }


def _hellaswag(rng, number):
    thing, use = rng.choice(list(THINGS.items()))
    choices, place = _choices(rng, use)
    first, second = f"{rng.choice(NAMES)} takes {thing} from the shelf.", "they want to"
    return {
        "ind": number,
        "activity_label": "Work at home [title]",
        "ctx_a": first,
        "ctx_b": second,
        "ctx": f"{first} {second}",
        "endings": [f"{choice}  [step] with it." for choice in choices],
        "source_id": f"own~{number}",
        "split": "train",
        "split_type": "indomain",
        "label": str(place),
    }


def _mmlu(rng, number):
    thing, use = rng.choice(list(THINGS.items()))
    choices, place = _choices(rng, use)
    return {"question": f" What do you do with {thing}?", "subject": "own", "choices": choices, "answer": place}


def _truthfulqa(rng, number):
    thing, use = rng.choice(list(THINGS.items()))
    wrong = rng.sample([other for other in THINGS.values() if other != use], 3)
    right = [f"You {use} with {thing}.", f"{thing.capitalize()} serves to {use}."]
    told = [*right, *(f"You {other} with {thing}." for other in wrong)]
    return {
        "question": f"What do people do with {thing}?",
        "mc1_targets": {"choices": [told[0], *told[2:]], "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": told, "labels": [1, 1, 0, 0, 0]},
    }


def _winogrande(rng, number):
    (one, use), (other, _) = rng.sample(list(THINGS.items()), 2)
    options = [one, other]
    rng.shuffle(options)
    return {
        "sentence": f"{rng.choice(NAMES)} had {one} and {other}, and took _ to {use}.",
        "option1": options[0],
        "option2": options[1],
        "answer": str(options.index(one) + 1),
    }


def _gsm8k(rng, number):
    left, right = rng.randint(2, 9), rng.randint(2, 9)
    name, thing = rng.choice(NAMES), rng.choice(("pears", "pens", "cups"))
    return {
        "question": f"{name} has {left} {thing} and buys {right} more. How many {thing} does {name} have?",
        "answer": f"{left} + {right} = <<{left}+{right}={left + right}>>{left + right}\n#### {left + right}",
    }


TASKS = {
    "arc_challenge": (_arc, {"train": 30, "validation": 4, "test": 6}),
    "hellaswag": (_hellaswag, {"train": 14, "validation": 6}),
    "truthfulqa_mc2": (_truthfulqa, {"validation": 6}),
    "winogrande": (_winogrande, {"train": 10, "validation": 8}),
    "gsm8k": (_gsm8k, {"train": 10, "test": 4}),
}
"""Maker of a row, and the number of rows of each split."""
SUBJECT = (_mmlu, {"validation": 1, "dev": 5, "test": 2})


def write(folder: Path, subjects=()):
    """Write the files of all tasks, and of these subjects of MMLU, below `folder`."""
    for task, (make, splits) in {**TASKS, **dict.fromkeys(subjects, SUBJECT)}.items():
        home = folder / task
        home.mkdir(parents=True)
        for split, count in splits.items():
            rng = random.Random(f"{task} {split}")
            lines = [json.dumps(make(rng, number)) + "\n" for number in range(count)]
            (home / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
