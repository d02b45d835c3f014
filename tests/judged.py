"""Files for the judged suites: questions, prompts and references of MT-Bench, a baseline of AlpacaEval; own text."""

import json

from tests.tiny import WORDS, write_rows

JUDGE_PROMPT = (
    "<|im_start|>system\nRank.\n<|im_end|>\n<|im_start|>user\n"
    '{"instruction": "{instruction}", "m": "{output_1}", "M": "{output_2}"}\n<|im_end|>\n'
)
"""A prompt of AlpacaEval's judge, in the published form."""


def write_mt_bench(folder):
    """Six questions of two turns, the judge's four prompts, references for the questions that have one."""
    folder.mkdir(parents=True)
    categories = ["writing", "math", "coding", "roleplay"]
    questions = [
        {"question_id": 81 + n, "category": categories[n % 4], "turns": [f"w{n} w1", f"w{n + 1}"]} for n in range(6)
    ]
    references = [
        {"question_id": q["question_id"], "choices": [{"turns": ["w5", "w6"]}]}
        for q in questions
        if q["category"] in ("math", "coding")
    ]
    plain = {"system_prompt": "Rate.", "prompt_template": "Q {question} A {answer}"}
    two = {"system_prompt": "Rate.", "prompt_template": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}"}
    with_reference = {"system_prompt": "Rate.", "prompt_template": "Q {question} R {ref_answer_1} A {answer}"}
    two_with = {
        "system_prompt": "Rate.",
        "prompt_template": "R {ref_answer_1} {ref_answer_2} Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    }
    prompts = [
        {"name": "single-v1", **plain},
        {"name": "single-v1-multi-turn", **two},
        {"name": "single-math-v1", **with_reference},
        {"name": "single-math-v1-multi-turn", **two_with},
    ]
    for name, rows in (
        ("question.jsonl", questions),
        ("judge_prompts.jsonl", prompts),
        ("reference_answer_gpt-4.jsonl", references),
    ):
        write_rows(folder / name, rows)
    return folder


def write_baseline(file):
    """Twelve instructions with the baseline's answers."""
    rows = [
        {"instruction": f"w{n} w{n + 1}", "output": " ".join(WORDS[: 3 + n % 4]), "generator": "base", "dataset": "own"}
        for n in range(12)
    ]
    file.write_text(json.dumps(rows))
    return file
