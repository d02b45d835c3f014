"""MT-Bench: two-turn answers, each turn graded from 1 to 10 by the judge.

Source: Zheng et al. 2023 (arXiv 2306.05685). Questions, reference answers and judge prompts are files of that project
that the user supplies; their formats, and those of what is written here, are the project's.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.data.loading import load_rows
from sapo.errors import ConfigurationError, DatasetError
from sapo.evaluation.generate import chat_ids, finish_notes, replies
from sapo.evaluation.judge import Judge, JudgeRequest
from sapo.evaluation.judged import (
    answer_and_judge,
    ask,
    empty_answers,
    file_name,
    judge_notes,
    judge_settings,
    require_judge,
)
from sapo.evaluation.results import SuiteResult
from sapo.evaluation.session import Session
from sapo.evaluation.store import write_result
from sapo.evaluation.targets import Target
from sapo.evaluation.verdicts import rating
from sapo.generation.sampling import Sampling
from sapo.measures.intervals import bootstrap_ratio
from sapo.runs.files import facts_digest
from sapo.seeds import derive_seed

MAX_NEW_TOKENS = 1024
"""Maximum tokens of a model's answer, as published."""
ANSWERS = ("mt_bench", "model_answer")
"""Folder of the answers."""
JUDGE_TOKENS = 2048
"""Maximum tokens of the judge's answer."""
WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories graded beside a reference answer."""
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Of the answers, by category, as published; other categories 0.7."""
PROMPTS = {
    (1, False): "single-v1",
    (2, False): "single-v1-multi-turn",
    (1, True): "single-math-v1",
    (2, True): "single-math-v1-multi-turn",
}
"""Judge prompt by turn, and whether there is a reference answer."""

_PLACE = re.compile(r"\{(question|answer|question_1|question_2|answer_1|answer_2|ref_answer_1|ref_answer_2)\}")


@dataclass(frozen=True)
class Files:
    """What the user supplies.

    Attributes:
        questions: each with `question_id`, `category` and two `turns`.
        references: reference answers (two turns) by question id.
        prompts: judge prompts by name.
    """

    questions: list[dict[str, Any]]
    references: dict[Any, Sequence[str]]
    prompts: dict[str, dict[str, Any]]


def load_files(folder: Path, limit: int | None = None) -> Files:
    """Read `question.jsonl`, `judge_prompts.jsonl` and the reference answers; refuse what the benchmark cannot use."""
    questions = [dict(row) for row in load_rows(folder / "question.jsonl")][:limit]
    prompts = {row["name"]: dict(row) for row in load_rows(folder / "judge_prompts.jsonl")}
    missing = [name for name in PROMPTS.values() if name not in prompts]
    if missing:
        raise DatasetError(f"{folder / 'judge_prompts.jsonl'}: has no prompt {missing[0]}.")
    places = [*sorted(folder.glob("reference_answer*.jsonl")), *sorted((folder / "reference_answer").glob("*.jsonl"))]
    references = {row["question_id"]: row["choices"][0]["turns"] for file in places for row in load_rows(file)}
    for question in questions:
        number, turns = question.get("question_id"), question.get("turns")
        if number is None or not isinstance(turns, list) or len(turns) != 2:
            raise DatasetError(f"{folder / 'question.jsonl'}: question {number} must have an id and two turns.")
        if question.get("category") in WITH_REFERENCE and number not in references:
            raise DatasetError(f"{folder}: no reference answer to question {number}, which its category needs.")
    return Files(questions, references, prompts)


def grading(files: Files, question: Mapping[str, Any], turns: Sequence[str], turn: int) -> JudgeRequest:
    """The request that grades one turn of an answer."""
    reference = files.references[question["question_id"]] if question["category"] in WITH_REFERENCE else None
    prompt = files.prompts[PROMPTS[(turn, reference is not None)]]
    fill = {
        "question": question["turns"][0],
        "answer": turns[0],
        "question_1": question["turns"][0],
        "question_2": question["turns"][1],
        "answer_1": turns[0],
        "answer_2": turns[1],
    }
    if reference is not None:
        fill |= {"ref_answer_1": reference[0], "ref_answer_2": reference[1]}
    # In one pass: what an answer says may look like a place to fill.
    text = _PLACE.sub(lambda found: fill.get(found[1], found[0]), prompt["prompt_template"])
    return JudgeRequest(
        (("system", prompt["system_prompt"]), ("user", text)),
        max_tokens=JUDGE_TOKENS,
        label=f"question {question['question_id']}, turn {turn}",
    )


def settings(session: Session) -> dict[str, Any]:
    """What the numbers depend on, besides the model."""
    return {
        **judge_settings(session),
        "mt_bench_dir": session.options.mt_bench_dir,
        "limit": session.options.limit,
        "max_new_tokens": session.options.max_new_tokens or MAX_NEW_TOKENS,
        "temperature": "by category" if session.options.temperature is None else session.options.temperature,
        "seed": session.options.seed,
    }


def run(session: Session) -> dict[str, SuiteResult]:
    """Answer with every model, then grade every answer; answers and verdicts are kept."""
    require_judge(session)
    if session.options.mt_bench_dir is None:
        raise ConfigurationError(
            "suite mt_bench needs --mt_bench_dir FOLDER with question.jsonl, judge_prompts.jsonl and "
            "reference_answer*.jsonl of FastChat's llm_judge."
        )
    files = load_files(Path(session.options.mt_bench_dir), session.options.limit)
    return answer_and_judge(
        session,
        lambda target: _answers(session, target, files),
        lambda judge, target, answers: _grade(session, judge, target, files, answers),
    )


def _answers(session: Session, target: Target, files: Files) -> list[dict[str, Any]]:
    parts = session.parts(*ANSWERS, f"{target.slug}.jsonl")
    budget = session.options.max_new_tokens or MAX_NEW_TOKENS
    questions = files.questions
    keys, temperatures = [], []
    for question in questions:
        usual = TEMPERATURES.get(question.get("category", ""), 0.7)
        temperature = usual if session.options.temperature is None else session.options.temperature
        temperatures.append(temperature)
        keys.append(
            facts_digest(
                suite="mt_bench",
                **session.identity(target),
                question=question["question_id"],
                turns=question["turns"],
                temperature=temperature,
                top=[session.options.top_k, session.options.top_p],
                max_new_tokens=budget,
                seed=session.options.seed,
            )
        )
    for temperature in sorted(set(temperatures)):
        alike = [place for place in range(len(keys)) if temperatures[place] == temperature]

        def compute(
            missing: list[int], alike: list[int] = alike, temperature: float = temperature
        ) -> list[dict[str, Any]]:
            return _two_turns(session, target, [questions[alike[index]] for index in missing], temperature)

        parts.complete(
            [keys[place] for place in alike],
            4 * session.options.batch_size,
            compute,
            lambda _: session.say(f"{target.name}: {len(parts)} of {len(questions)} answers"),
        )
    return [parts[key] for key in keys]


def _two_turns(
    session: Session, target: Target, questions: Sequence[Mapping[str, Any]], temperature: float
) -> list[dict[str, Any]]:
    loaded, options = session.load(target), session.options
    sampling = options.sampling(Sampling(temperature, 0, 1.0))
    budget = options.max_new_tokens or MAX_NEW_TOKENS
    talks: list[list[dict[str, str]]] = [[] for _ in questions]
    finishes: list[list[str]] = [[] for _ in questions]
    for turn in (0, 1):
        for talk, question in zip(talks, questions, strict=True):
            talk.append({"role": "user", "content": question["turns"][turn]})
        prompts = [chat_ids(loaded, target.path, talk) for talk in talks]
        seeds = [derive_seed(options.seed, "mt_bench", str(one["question_id"]), turn) for one in questions]
        found = replies(loaded, prompts, seeds, sampling, max_new_tokens=budget, batch_size=options.batch_size)
        for talk, finish, reply in zip(talks, finishes, found, strict=True):
            talk.append({"role": "assistant", "content": reply.text.strip()})
            finish.append(reply.finish)
    return [
        {
            "question_id": question["question_id"],
            "answer_id": facts_digest(model=target.path, question=question["question_id"])[:22],
            "model_id": target.slug,
            "choices": [{"index": 0, "turns": [talk[1]["content"], talk[3]["content"]]}],
            "tstamp": time.time(),
            "finish": finish,
        }
        for question, talk, finish in zip(questions, talks, finishes, strict=True)
    ]


def _grade(
    session: Session, judge: Judge, target: Target, files: Files, answers: Sequence[Mapping[str, Any]]
) -> SuiteResult:
    file = session.folder.joinpath(*ANSWERS, f"{target.slug}.jsonl")
    texts = [turn for answer in answers for turn in answer["choices"][0]["turns"]]
    empty = empty_answers(target.name, texts, file)
    asked = [
        (place, turn, grading(files, question, answers[place]["choices"][0]["turns"], turn))
        for place, question in enumerate(files.questions)
        for turn in (1, 2)
    ]
    verdicts = ask(session, judge, [request for _, _, request in asked])
    scores: dict[tuple[int, int], float] = {}
    lines, unparsable = [], 0
    for place, turn, request in asked:
        verdict = verdicts.get(request.key(judge.options))
        if verdict is None:
            continue
        score = rating(verdict["text"])
        unparsable += score is None
        if score is not None:
            scores[(place, turn)] = score
        lines.append(_judgment(files.questions[place], target, judge, turn, request, verdict, score))
    folder = session.folder / "mt_bench" / "model_judgment"
    name = f"{file_name(judge.options.model)}_single-{target.slug}.jsonl"
    write_result(folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result = _summary(files, scores, session.options.seed)
    result.notes += [*empty, *finish_notes([finish for answer in answers for finish in answer["finish"]])]
    if unparsable:
        result.notes.append(f"{unparsable} of {len(lines)} verdicts state no rating; they are left out, never guessed.")
    result.notes += judge_notes(judge)
    return result


def _judgment(
    question: Mapping[str, Any],
    target: Target,
    judge: Judge,
    turn: int,
    request: JudgeRequest,
    verdict: Mapping[str, Any],
    score: float | None,
) -> dict[str, Any]:
    """A line in FastChat's format, -1 where there is no rating."""
    with_reference = question["category"] in WITH_REFERENCE
    return {
        "question_id": question["question_id"],
        "model": target.slug,
        "judge": [judge.options.model, PROMPTS[(turn, with_reference)]],
        "user_prompt": request.messages[-1][1],
        "judgment": verdict["text"],
        "score": -1 if score is None else score,
        "turn": turn,
        "tstamp": verdict["tstamp"],
    }


def _summary(files: Files, scores: Mapping[tuple[int, int], float], seed: int) -> SuiteResult:
    result = SuiteResult()

    def add(name: str, chosen: Mapping[tuple[int, int], float]) -> None:
        # Both turns of a question hang together: questions are resampled, not turns.
        by_question: dict[int, list[float]] = {}
        for (place, _), score in chosen.items():
            by_question.setdefault(place, []).append(score)
        estimate = bootstrap_ratio(
            [sum(found) for found in by_question.values()], [len(found) for found in by_question.values()], seed=seed
        )
        if estimate is not None:
            result.measures[name] = estimate
            result.items[name] = {
                str(files.questions[place]["question_id"]): sum(found) / len(found)
                for place, found in by_question.items()
            }

    add("score", scores)
    for turn in (1, 2):
        add(f"turn {turn}", {key: score for key, score in scores.items() if key[1] == turn})
    for category in dict.fromkeys(question["category"] for question in files.questions):
        add(
            category,
            {key: score for key, score in scores.items() if files.questions[key[0]]["category"] == category},
        )
    return result
