"""The local suite: held-out rows, no network, minutes on a CPU."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.data.examples import Turn, collate_examples
from sapo.data.loading import load_rows
from sapo.data.prepare import prepare_dataset
from sapo.errors import ConfigurationError
from sapo.evaluation.generate import generator_of
from sapo.evaluation.results import SuiteResult
from sapo.evaluation.session import Session
from sapo.evaluation.targets import LoadedModel, Target
from sapo.generation.sampling import Sampling
from sapo.measures.measure import LocalOptions, Measured, measure, row_values, summarize
from sapo.measures.retention import spread
from sapo.runs.files import facts_digest
from sapo.runs.reading import recipe_option
from sapo.text.numbers import duration_text

ROWS = 200
"""Held-out rows that are measured unless `--limit` says otherwise."""
MAX_NEW_TOKENS = 256
"""Maximum tokens of a sampled response."""


@dataclass(frozen=True)
class _Data:
    rows: list[int]
    turns: list[Turn]
    notes: list[str]


def settings(session: Session) -> dict[str, Any]:
    """Settings that the results depend on, besides the model."""
    options = session.options
    sampling = options.sampling(Sampling())
    return {
        "dataset_name": _dataset(session),
        "dataset_split": options.dataset_split,
        "rows": options.limit or ROWS,
        "max_length": options.max_length,
        "max_new_tokens": options.max_new_tokens or MAX_NEW_TOKENS,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": options.seed,
    }


def run(session: Session) -> dict[str, SuiteResult]:
    """Measure every model; the opponent of a run first, since the policy is compared with its samples."""
    _dataset(session)
    results: dict[str, SuiteResult] = {}
    opponents: dict[str, dict[int, Measured]] = {}
    for target in sorted(session.targets, key=lambda one: one.role != "opponent"):
        faced = opponents.get(target.run or "") if target.role == "policy" else None
        found, data, loaded = _measure(session, target, faced)
        if target.role == "opponent" and target.run is not None:
            opponents[target.run] = {one.row: one for one in found}
        results[target.name] = _result(session, found, data, loaded)
    return {target.name: results[target.name] for target in session.targets}


def _measure(
    session: Session, target: Target, opponent: dict[int, Measured] | None
) -> tuple[list[Measured], _Data, LoadedModel]:
    loaded = session.load(target)
    data = _held_out(session, target, loaded)
    options = LocalOptions(
        max_new_tokens=session.options.max_new_tokens or MAX_NEW_TOKENS,
        max_length=loaded.max_length(session.options.max_length),
        batch_size=session.options.batch_size,
        seed=session.options.seed,
    )
    generator = generator_of(loaded, session.options.sampling(Sampling()), options.batch_size)
    parts = session.parts("local", f"{target.slug}.jsonl")
    keys = [_key(session, target, options, data, place, opponent) for place in range(len(data.rows))]
    todo, done, began = sum(key not in parts for key in keys), 0, time.monotonic()

    def compute(missing: list[int]) -> list[dict[str, Any]]:
        nonlocal done
        done += len(missing)
        rows = [data.rows[place] for place in missing]
        measured = measure(
            lambda: nullcontext(loaded.model),
            generator,
            rows,
            [data.turns[place] for place in missing],
            options,
            pad_token_id=loaded.pad_token_id,
            opponent=None if opponent is None else [opponent[row].own for row in rows],
        )
        return [{"measured": one.as_dict()} for one in measured]

    def say(so_far: int) -> None:
        left = duration_text((time.monotonic() - began) / done * (todo - done))
        session.say(f"{target.name}: {so_far} of {len(keys)} rows{f', {left} left' if done < todo else ''}")

    if todo:
        session.say(f"{target.name}: {todo} rows, each scored and answered once")
    # A CPU takes a minute for this many rows: somebody is waiting for a sign of life.
    records = parts.complete(keys, (2 if session.device == "cpu" else 4) * options.batch_size, compute, say)
    return [Measured.of(record["measured"]) for record in records], data, loaded


def _key(
    session: Session,
    target: Target,
    options: LocalOptions,
    data: _Data,
    place: int,
    opponent: dict[int, Measured] | None,
) -> str:
    row, turn, sampling = data.rows[place], data.turns[place], session.options.sampling(Sampling())
    return facts_digest(
        suite="local",
        **session.identity(target),
        row=row,
        prompt=list(turn.prompt_ids),
        response=list(turn.response_ids),
        sampling=[sampling.temperature, sampling.top_k, sampling.top_p],
        max_new_tokens=options.max_new_tokens,
        max_length=options.max_length,
        seed=options.seed,
        opponent=None if opponent is None else list(opponent[row].own),
    )


def _held_out(session: Session, target: Target, loaded: LoadedModel) -> _Data:
    name, options = _dataset(session), session.options
    length = loaded.max_length(options.max_length)
    prepared, report = prepare_dataset(
        load_rows(name, split=options.dataset_split),
        loaded.tokenizer,
        loaded.data_options(options.max_length),
        eos_ids=loaded.eos_ids,
        source=name,
    )
    wanted = min(options.limit or ROWS, len(prepared))
    # Evenly spread: files are often sorted by topic.
    examples = collate_examples([prepared[place] for place in spread(wanted, len(prepared))])["examples"]
    notes = [line for line in report.lines()[1:] if not line.startswith(("truncated", "warning: "))]
    if report.truncated_prompts or report.truncated_responses:
        notes.append(
            f"Of {len(prepared)} rows, {report.truncated_prompts} prompts and {report.truncated_responses} responses "
            f"were truncated to {length} tokens; a truncated response has no EOS token."
        )
    if wanted < len(prepared):
        notes.append(f"{wanted} of {len(prepared)} rows, evenly spread (--limit).")
    return _Data([one.row for one in examples], [one.turns[-1] for one in examples], notes)


def _result(session: Session, found: list[Measured], data: _Data, loaded: LoadedModel) -> SuiteResult:
    budget = session.options.max_new_tokens or MAX_NEW_TOKENS
    measures = summarize(
        found,
        [turn.response_ids for turn in data.turns],
        loaded.eos_ids,
        max_new_tokens=budget,
        seed=session.options.seed,
    )
    items: dict[str, dict[str, float]] = {}
    for one in found:
        for name, value in row_values(one, loaded.eos_ids).items():
            items.setdefault(name, {})[str(one.row)] = value
    notes = list(data.notes)
    length = loaded.max_length(session.options.max_length)
    crowded = sum(len(turn.prompt_ids) + budget > length for turn in data.turns)
    if crowded:
        notes.append(
            f"{crowded} prompts leave fewer than max_new_tokens={budget} tokens: their samples were truncated earlier."
        )
    weights = {"nll": {str(one.row): float(one.data_tokens) for one in found}}
    return SuiteResult(measures, items, weights, notes)


def _dataset(session: Session) -> str:
    if session.options.dataset_name:
        return session.options.dataset_name
    for target in session.targets:
        if target.run is not None:
            named = recipe_option(Path(target.run), "eval_dataset_name")
            if named is not None:
                return named
    raise ConfigurationError(
        "suite local requires held-out rows: set --dataset_name to a file, a folder or a Hub id with rows that the "
        "model was not trained on."
    )
