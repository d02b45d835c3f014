"""What both judged benchmarks do: answer, make the judge, say what it will cost, tell what it left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sapo.errors import ConfigurationError, EvaluationError
from sapo.evaluation.judge import Judge, JudgeOptions, JudgeRequest
from sapo.evaluation.results import SuiteResult
from sapo.evaluation.session import Session
from sapo.evaluation.targets import Target


def require_judge(session: Session) -> JudgeOptions:
    """The judge that was named."""
    if session.options.judge is None:
        raise ConfigurationError(
            "this suite needs a judge: --judge_model NAME, with --judge_base_url URL for an endpoint other than "
            "OpenAI's, and its key in the environment."
        )
    return session.options.judge


def answer_and_judge(
    session: Session,
    answer: Callable[[Target], list[dict[str, Any]]],
    judged: Callable[[Judge, Target, list[dict[str, Any]]], SuiteResult],
) -> dict[str, SuiteResult]:
    """Answer with every model, then judge the answers of each; verdicts that were given before are kept."""
    options = require_judge(session)
    # First: a missing key or package shows before anything is generated.
    judge = Judge(options, session.parts("judge", f"{file_name(options.model)}.jsonl"), session.say)
    answers = {target.name: answer(target) for target in session.targets}
    session.release()
    results = {}
    for target in session.targets:
        judge.begin()
        results[target.name] = judged(judge, target, answers[target.name])
    return results


def file_name(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "judge"


def ask(session: Session, judge: Judge, requests: Sequence[JudgeRequest]) -> dict[str, dict[str, Any]]:
    """Say what it will cost at most, then ask."""
    for line in judge.estimate(requests):
        session.say(line)
    before = replace(judge.tally)
    answers = judge.ask(requests)
    sent, again = judge.tally.sent - before.sent, judge.tally.repeated - before.repeated
    if sent:
        kept = judge.tally.reused - before.reused
        also = f" {kept} verdicts were there already." if kept else ""
        session.say(f"{sent} requests sent, {again} of them again after a failure.{also}")
    return answers


def empty_answers(name: str, answers: Sequence[str], file: Path) -> list[str]:
    """A note about empty answers, if there are any; where there is nothing else, there is nothing to judge."""
    empty = sum(not answer.strip() for answer in answers)
    if answers and empty == len(answers):
        raise EvaluationError(
            f"{name}: all {empty} answers are empty, so there is nothing to judge; they are kept in {file}. Check "
            "the chat template and the EOS token of the model."
        )
    return [f"{empty} of {len(answers)} answers are empty; they are judged as empty answers."] if empty else []


def judge_notes(judge: Judge) -> list[str]:
    """What a reader has to know of the verdicts."""
    notes, tally = [], judge.tally
    if tally.left:
        notes.append(
            f"{tally.left} verdicts are missing, for max_judge_calls={judge.options.max_calls} is spent: incomplete. "
            "The same command with a larger budget completes them."
        )
    if tally.refused:
        label, reason = next(iter(tally.refused.items()))
        notes.append(f"The judge refuses {len(tally.refused)} questions for good, such as {label}: {reason}")
    return notes


def judge_settings(session: Session) -> dict[str, Any]:
    """Which judge, for results.json; never its key."""
    options = require_judge(session)
    return {"judge_model": options.model, "judge_base_url": options.base_url}
