"""AlpacaEval 2: a judge says which of two answers is better, and how sure it is.

Source: Dubois et al. 2024 (arXiv 2404.04475). Instructions with the baseline's answers are a file of that project that
the user supplies.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.data.loading import load_rows
from sapo.errors import ConfigurationError, DatasetError, EvaluationError
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
from sapo.evaluation.length_control import DEPARTURES, length_adjusted_win_rate
from sapo.evaluation.results import SuiteResult
from sapo.evaluation.session import Session
from sapo.evaluation.store import write_result
from sapo.evaluation.targets import Target
from sapo.generation.sampling import Sampling
from sapo.measures.intervals import Estimate, bootstrap_ratio
from sapo.runs.files import facts_digest
from sapo.seeds import derive_seed

MAX_NEW_TOKENS = 2048
"""Maximum tokens of a model's answer."""
SAMPLING = Sampling(0.7, 0, 1.0)
"""Of a model's answers."""
ANSWERS = ("alpaca_eval", "model_outputs")
"""Folder of the answers."""
TOP_LOGPROBS = 5
FIRST, SECOND = "m", "M"
"""What the judge answers for the first and for the second of the two, as in the published prompt."""

OWN_PROMPT = (
    (
        "system",
        "You compare two answers to one instruction and tell which of them a person who gave the instruction would "
        "rather have received. Your whole reply is one letter.",
    ),
    (
        "user",
        "Instruction:\n<<<\n{instruction}\n>>>\n\nAnswer m:\n<<<\n{output_1}\n>>>\n\nAnswer M:\n<<<\n"
        "{output_2}\n>>>\n\nLook at whether each answer does what was asked, is correct, and is "
        "helpful. Neither its length nor its place is a merit. Reply with m if answer m is better and with M if "
        "answer M is better, and with nothing else.",
    ),
)
_PLACE = re.compile(r"\{(instruction|output_1|output_2)\}")
_PART_OF_CHAT = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True)
class Instruction:
    """One row of the evaluation set.

    Attributes:
        text: the instruction.
        baseline: the answer that a model's own is compared with.
        generator: model that gave it.
        dataset: where the instruction comes from, for the table by source.
    """

    text: str
    baseline: str
    generator: str
    dataset: str


def load_instructions(file: Path, limit: int | None = None) -> list[Instruction]:
    """Rows with `instruction` and the baseline's `output`, in AlpacaEval's format; others are refused."""
    found = []
    for number, row in enumerate(list(load_rows(file))[:limit], 1):
        for name in ("instruction", "output"):
            if not isinstance(row.get(name), str):
                raise DatasetError(f'{file}, row {number}: has no "{name}"; rows need instruction and output.')
        found.append(
            Instruction(row["instruction"], row["output"], row.get("generator") or "baseline", row.get("dataset") or "")
        )
    return found


def load_prompt(file: Path | None) -> tuple[tuple[str, str], ...]:
    """The judge's prompt: this package's own, or one in the published form (ChatML, or plain text for one message)."""
    if file is None:
        return OWN_PROMPT
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--judge_prompt {file}: cannot be read ({error}).") from error
    missing = {"instruction", "output_1", "output_2"} - set(_PLACE.findall(text))
    if missing:
        raise ConfigurationError(f"--judge_prompt {file}: has no place {{{sorted(missing)[0]}}}.")
    parts = tuple((role, content.strip()) for role, content in _PART_OF_CHAT.findall(text))
    return parts or (("user", text.strip()),)


def comparison(
    prompt: Sequence[tuple[str, str]], instruction: Instruction, answer: str, *, model_first: bool
) -> JudgeRequest:
    """The request that compares a model's answer with the baseline's."""
    first, second = (answer, instruction.baseline) if model_first else (instruction.baseline, answer)
    fill = {"instruction": instruction.text, "output_1": first, "output_2": second}
    messages = tuple((role, _PLACE.sub(lambda found: fill[found[1]], content)) for role, content in prompt)
    order = "model first" if model_first else "baseline first"
    return JudgeRequest(
        messages, max_tokens=1, temperature=1.0, top_logprobs=TOP_LOGPROBS, label=f"{instruction.text[:40]!r}, {order}"
    )


def preference(verdict: Mapping[str, Any], *, model_first: bool) -> float | None:
    """Probability that the model's answer is the better one, from the log-probabilities of the first token.

    None where neither letter is the most probable token: the judge begins to reason, or says something else.
    """
    chances = {FIRST: 0.0, SECOND: 0.0}
    other = 0.0
    for token, logprob in verdict.get("top_logprobs") or ():
        letter = token.strip()
        if letter in chances:
            chances[letter] += math.exp(logprob)
        else:
            other = max(other, math.exp(logprob))
    total = sum(chances.values())
    if total <= other:
        return None
    return chances[FIRST if model_first else SECOND] / total


def settings(session: Session) -> dict[str, Any]:
    """What the numbers depend on, besides the model."""
    options = session.options
    return {
        **judge_settings(session),
        "alpaca_eval_data": options.alpaca_eval_data,
        "judge_prompt": options.judge_prompt or "of this package",
        "judge_orders": options.judge_orders,
        "limit": options.limit,
        "max_new_tokens": options.max_new_tokens or MAX_NEW_TOKENS,
        "temperature": options.sampling(SAMPLING).temperature,
        "seed": options.seed,
    }


def run(session: Session) -> dict[str, SuiteResult]:
    """Answer with every model, then compare every answer with the baseline's; answers and verdicts are kept."""
    require_judge(session)
    options = session.options
    if options.alpaca_eval_data is None:
        raise ConfigurationError(
            "suite alpaca_eval needs --alpaca_eval_data FILE: rows with instruction and the baseline's output, such as "
            "AlpacaEval's alpaca_eval_gpt4_baseline.json."
        )
    instructions = load_instructions(Path(options.alpaca_eval_data), options.limit)
    prompt = load_prompt(Path(options.judge_prompt) if options.judge_prompt else None)
    return answer_and_judge(
        session,
        lambda target: _answers(session, target, instructions),
        lambda judge, target, answers: _compare(session, judge, target, instructions, prompt, answers),
    )


def _answers(session: Session, target: Target, instructions: Sequence[Instruction]) -> list[dict[str, Any]]:
    options = session.options
    budget = options.max_new_tokens or MAX_NEW_TOKENS
    sampling = options.sampling(SAMPLING)
    keys = [
        facts_digest(
            suite="alpaca_eval",
            **session.identity(target),
            instruction=one.text,
            place=place,
            sampling=[sampling.temperature, sampling.top_k, sampling.top_p],
            max_new_tokens=budget,
            seed=options.seed,
        )
        for place, one in enumerate(instructions)
    ]

    def compute(missing: list[int]) -> list[dict[str, Any]]:
        loaded = session.load(target)
        asked = [instructions[place] for place in missing]
        prompts = [chat_ids(loaded, target.path, [{"role": "user", "content": one.text}]) for one in asked]
        seeds = [derive_seed(options.seed, "alpaca_eval", place) for place in missing]
        found = replies(loaded, prompts, seeds, sampling, max_new_tokens=budget, batch_size=options.batch_size)
        return [
            {
                "instruction": one.text,
                "output": reply.text.strip(),
                "generator": target.slug,
                "dataset": one.dataset,
                "finish": reply.finish,
            }
            for one, reply in zip(asked, found, strict=True)
        ]

    return session.parts(*ANSWERS, f"{target.slug}.jsonl").complete(
        keys, 4 * options.batch_size, compute, lambda done: session.say(f"{target.name}: {done} of {len(keys)} answers")
    )


def _compare(
    session: Session,
    judge: Judge,
    target: Target,
    instructions: Sequence[Instruction],
    prompt: Sequence[tuple[str, str]],
    answers: Sequence[Mapping[str, Any]],
) -> SuiteResult:
    file = session.folder.joinpath(*ANSWERS, f"{target.slug}.jsonl")
    empty = empty_answers(target.name, [answer["output"] for answer in answers], file)
    asked = [
        (place, model_first, comparison(prompt, one, answers[place]["output"], model_first=model_first))
        for place, one in enumerate(instructions)
        for model_first in _orders(session, place)
    ]
    verdicts = ask(session, judge, [request for _, _, request in asked])
    if verdicts and all(verdict.get("top_logprobs") is None for verdict in verdicts.values()):
        raise EvaluationError(
            f"the judge {judge.options.model} gives no log-probabilities, by which AlpacaEval weighs its verdicts. "
            "Use an endpoint that supports top_logprobs."
        )
    found: dict[int, list[float | None]] = {}
    for place, model_first, request in asked:
        verdict = verdicts.get(request.key(judge.options))
        if verdict is not None:
            found.setdefault(place, []).append(preference(verdict, model_first=model_first))
    unparsable = sum(one is None for each in found.values() for one in each)
    wins = {
        place: sum(one for one in each if one is not None) / len(each)
        for place, each in found.items()
        if len(each) == len(_orders(session, place)) and None not in each
    }
    _write_annotations(session, target, judge, instructions, answers, wins)
    result = _summary(instructions, answers, wins, session.options.seed)
    if unparsable:
        result.notes.append(
            f"{unparsable} verdicts name neither answer; their {len(found) - len(wins)} instructions are left out, "
            "never guessed."
        )
    result.notes += [*empty, *finish_notes([answer["finish"] for answer in answers]), *judge_notes(judge)]
    if session.options.judge_prompt is None:
        result.notes.append("Judged with this package's own prompt; --judge_prompt FILE takes the published one.")
    result.notes.append(DEPARTURES)
    return result


def _orders(session: Session, place: int) -> tuple[bool, ...]:
    """Whether the model's answer comes first: both ways, or one drawn for each instruction as published."""
    if session.options.judge_orders == "both":
        return (True, False)
    return (random.Random(derive_seed(session.options.seed, "order", place)).random() < 0.5,)


def _summary(
    instructions: Sequence[Instruction], answers: Sequence[Mapping[str, Any]], wins: Mapping[int, float], seed: int
) -> SuiteResult:
    result = SuiteResult()
    places = sorted(wins)
    won = [wins[place] for place in places]
    estimates: dict[str, Estimate | None] = {
        "win_rate": bootstrap_ratio(won, seed=seed),
        "discrete_win_rate": bootstrap_ratio([(one > 0.5) + (one == 0.5) / 2 for one in won], seed=seed),
        "length_adjusted_win_rate": length_adjusted_win_rate(
            won,
            [len(answers[place]["output"]) for place in places],
            [len(instructions[place].baseline) for place in places],
            seed=seed,
        ),
        "length": bootstrap_ratio([len(answer["output"]) for answer in answers], seed=seed),
        "length_baseline": bootstrap_ratio([len(one.baseline) for one in instructions], seed=seed),
    }
    result.measures = {name: one for name, one in estimates.items() if one is not None}
    result.items["win_rate"] = {str(place): wins[place] for place in places}
    return result


def _write_annotations(
    session: Session,
    target: Target,
    judge: Judge,
    instructions: Sequence[Instruction],
    answers: Sequence[Mapping[str, Any]],
    wins: Mapping[int, float],
) -> None:
    """One JSON in AlpacaEval's format: preference 1 for the baseline, 2 for the model, and in between."""
    rows = [
        {
            "instruction": one.text,
            "output_1": one.baseline,
            "generator_1": one.generator,
            "dataset": one.dataset,
            "output_2": answers[place]["output"],
            "generator_2": target.slug,
            "annotator": judge.options.model,
            "preference": 1 + wins[place] if place in wins else None,
        }
        for place, one in enumerate(instructions)
    ]
    name = f"{file_name(judge.options.model)}-{target.slug}.json"
    write_result(
        session.folder / "alpaca_eval" / "annotations" / name, json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    )
