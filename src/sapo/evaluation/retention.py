"""The retention suite: how far a model has moved from its start, on replies that the start generated once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.data.loading import load_rows
from sapo.data.unanswered import encode_prompts, general_prompts
from sapo.errors import ConfigurationError, EvaluationError
from sapo.evaluation.generate import generator_of
from sapo.evaluation.results import SuiteResult
from sapo.evaluation.session import Session
from sapo.evaluation.store import FinishedParts
from sapo.evaluation.targets import LoadedModel, Target
from sapo.measures.retention import (
    REPLY_SAMPLING,
    REPLY_TOKENS,
    Forced,
    ForcedScore,
    StartStates,
    fixed_head,
    generate_replies,
    score_forced,
    spread,
    states_of,
    summarize_retention,
)
from sapo.measures.text import reply_values
from sapo.runs.files import facts_digest
from sapo.runs.reading import recipe_option
from sapo.runs.reply_cache import start_replies
from sapo.weights.digest import weights_digest

TASK_ROWS = 200
"""Prompts of the task unless `--limit` says otherwise."""


def settings(session: Session) -> dict[str, Any]:
    """Settings that the results depend on, besides the model."""
    options = session.options
    return {
        "prompts": options.prompts or "shipped",
        "dataset_name": _dataset(session),
        "dataset_split": options.dataset_split,
        "rows": options.limit,
        "max_length": options.max_length,
        "max_new_tokens": _reply_tokens(session),
        "temperature": REPLY_SAMPLING.temperature,
    }


@dataclass
class _Start:
    """The start's replies by group, and its states on them once they are needed."""

    forced: dict[str, list[Forced]]
    vocabulary: int
    states: dict[str, StartStates]


def run(session: Session) -> dict[str, SuiteResult]:
    """Measure every model against the start, which is measured first."""
    first = next((target for target in session.targets if target.role == "start"), None)
    if first is None:
        raise ConfigurationError(
            "suite retention compares with the model before training. Name it with --start, or evaluate a run folder "
            "whose start is on this machine."
        )
    loaded = session.load(first)
    limit, dataset = session.options.limit, _dataset(session)
    general = _prompts(session, loaded, session.options.prompts)
    forced = {"general": _start_replies(session, loaded, "general", general, limit or len(general))}
    if dataset is not None:
        task = _prompts(session, loaded, dataset)
        forced["task"] = _start_replies(session, loaded, "task", task, limit or TASK_ROWS)
    start = _Start(forced, loaded.model.config.get_text_config().vocab_size, {})
    order = sorted(session.targets, key=lambda target: target is not first)
    results = {target.name: _measure(session, target, first, start) for target in order}
    return {target.name: results[target.name] for target in session.targets}


def _measure(session: Session, target: Target, first: Target, start: _Start) -> SuiteResult:
    parts = session.parts("retention", f"{target.slug}.jsonl")
    key = _key(session, target, first, start.forced)
    if key not in parts:
        _keep_states(session, first, start)
        _compute(session, target, start, parts, key)
        session.say(f"{target.name}: {sum(map(len, start.forced.values()))} replies of the start")
    record = parts[key]
    scores = {name: [ForcedScore(*one) for one in rows] for name, rows in record["scores"].items()}
    return _result(session, scores, [reply_values(tokens, record["eos"]) for tokens in record["samples"]])


def _key(session: Session, target: Target, first: Target, forced: dict[str, list[Forced]]) -> str:
    rows = {name: [[one.prompt_ids, one.reply_ids] for one in group] for name, group in forced.items()}
    return facts_digest(
        suite="retention", **session.identity(target), start=session.identity(first), rows=rows,
        limits=[_reply_tokens(session), session.options.max_length],
    )  # fmt: skip


def _keep_states(session: Session, first: Target, start: _Start) -> None:
    if start.states:
        return
    loaded = session.load(first)
    head = copy.deepcopy(fixed_head(loaded.model))
    for name, rows in start.forced.items():
        states = states_of(loaded.model, rows, pad_token_id=loaded.pad_token_id, batch_size=session.options.batch_size)
        start.states[name] = StartStates(states, head)


def _compute(session: Session, target: Target, start: _Start, parts: FinishedParts, key: str) -> None:
    loaded, size = session.load(target), session.options.batch_size
    vocabulary = loaded.model.config.get_text_config().vocab_size
    if vocabulary != start.vocabulary:
        raise EvaluationError(
            f"{target.name} has a vocabulary of {vocabulary} tokens and the start one of {start.vocabulary}: their "
            "distributions cannot be compared. Evaluate a model that was trained from this start."
        )
    scores = {
        name: score_forced(loaded.model, rows, start.states[name], pad_token_id=loaded.pad_token_id, batch_size=size)
        for name, rows in start.forced.items()
    }
    if target.role == "start":
        samples = [list(one.reply_ids) for one in start.forced["general"]]
    else:
        samples = _replies(session, loaded, [one.prompt_ids for one in start.forced["general"]])
    parts.add(
        key,
        {
            "scores": {name: [[one.logp, one.kl, one.tokens] for one in rows] for name, rows in scores.items()},
            "samples": samples,
            "eos": sorted(loaded.eos_ids),
        },
    )


def _replies(session: Session, loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    generator = generator_of(loaded, REPLY_SAMPLING, max(16, session.options.batch_size))
    length = loaded.max_length(session.options.max_length)
    return generate_replies(generator, prompts, max_new_tokens=_reply_tokens(session), max_length=length)


def _start_replies(
    session: Session, loaded: LoadedModel, kind: str, prompts: Sequence[Sequence[int]], wanted: int
) -> list[Forced]:
    """The start's replies to `wanted` of the prompts, from the cache of an earlier run or evaluation if it has them."""

    def generate(fitting: list[tuple[int, ...]]) -> list[list[int]]:
        session.say(f"The start replies to {len(fitting)} {kind} prompts, once for this model")
        return _replies(session, loaded, fitting)

    kept = start_replies(
        session.folder / "retention",
        [prompts[place] for place in spread(wanted, len(prompts))],
        generate,
        model=weights_digest(loaded.model),
        eos_ids=loaded.eos_ids,
        max_new_tokens=_reply_tokens(session),
        max_length=loaded.max_length(session.options.max_length),
    )
    return [Forced(prompt, tuple(reply)) for prompt, reply in kept]


def _prompts(session: Session, loaded: LoadedModel, name: str | None) -> list[tuple[int, ...]]:
    """The prompts of the rows in a file, as the training makes them; None for the shipped ones."""
    options = loaded.data_options(session.options.max_length)
    if name is None:
        return general_prompts(loaded.tokenizer, loaded.eos_ids, options)
    rows = load_rows(name, split=session.options.dataset_split)
    return encode_prompts(rows, loaded.tokenizer, options, eos_ids=loaded.eos_ids, source=name)[1]


def _reply_tokens(session: Session) -> int:
    return session.options.max_new_tokens or REPLY_TOKENS


def _dataset(session: Session) -> str | None:
    """Rows whose prompts are the task's: those named, else those that the run was trained on, if they are there."""
    if session.options.dataset_name:
        return session.options.dataset_name
    for target in session.targets:
        named = None if target.run is None else recipe_option(Path(target.run), "dataset_name")
        if named is not None and Path(named).exists():
            return named
    return None


def _result(session: Session, scores: dict[str, list[ForcedScore]], samples: Sequence[dict[str, float]]) -> SuiteResult:
    measures = summarize_retention(scores, samples, seed=session.options.seed)
    items: dict[str, dict[str, float]] = {}
    weights: dict[str, dict[str, float]] = {}
    for group, found in scores.items():
        rows = {str(place): one for place, one in enumerate(found)}
        items[f"kl_{group}"] = {place: one.kl or 0.0 for place, one in rows.items()}
        items[f"nll_{group}"] = {place: -one.logp for place, one in rows.items()}
        tokens = {place: float(one.tokens) for place, one in rows.items()}
        weights |= {f"kl_{group}": tokens, f"nll_{group}": tokens}
    for place, values in enumerate(samples):
        for name, value in values.items():
            items.setdefault(name, {})[str(place)] = value
    notes = [
        "kl_*: KL(start ‖ model) per token over the full vocabulary, on replies of the start; ended, length and loops: "
        f"of the model's own replies to the same prompts, at temperature 1 and at most {_reply_tokens(session)} tokens."
    ]
    if "task" not in scores:
        notes.append("No kl_task: name rows of the task with --dataset_name.")
    return SuiteResult(measures, items, weights, notes)
