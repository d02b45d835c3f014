"""The local suite: held-out rows, no network, minutes on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.data.examples import DataOptions, Turn, collate_examples
from sapo.data.loading import load_rows
from sapo.data.prepare import prepare_dataset
from sapo.errors import ConfigurationError
from sapo.evaluation.generate import generator_of, in_use
from sapo.evaluation.results import SuiteResult
from sapo.evaluation.session import Session, chunks
from sapo.evaluation.targets import LoadedModel, Target
from sapo.generation.sampling import Sampling
from sapo.measures.measure import LocalOptions, Measured, measure, summarize, wins
from sapo.measures.text import ends_in_loop, seq_rep
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
    options, sampling = session.options, _sampling(session)
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
    """Measure every model; the opponent of a run first, since the policy is compared with its samples.

    Raises:
        ConfigurationError: dataset_name is not set.
        DatasetError, TokenizerError, ModelError: the rows or a model cannot be used.
    """
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
        max_length=min(session.options.max_length, loaded.positions or session.options.max_length),
        batch_size=session.options.batch_size,
        seed=session.options.seed,
    )
    parts = session.parts("local", f"{target.slug}.jsonl")
    generator = generator_of(loaded, _sampling(session), options.batch_size)
    found: list[Measured] = []
    keys = [_key(session, target, options, data, place, opponent) for place in range(len(data.rows))]
    todo, done, began = sum(key not in parts for key in keys), 0, time.monotonic()
    # A CPU takes a minute for this many rows: somebody is waiting for a sign of life.
    for span in chunks((2 if session.device == "cpu" else 4) * options.batch_size, len(keys)):
        missing = [place for place in span if keys[place] not in parts]
        if missing:
            turns = [data.turns[place] for place in missing]
            rows = [data.rows[place] for place in missing]
            others = None if opponent is None else [opponent[row].own for row in rows]
            measured = measure(
                lambda: in_use(loaded),
                generator,
                rows,
                turns,
                options,
                pad_token_id=loaded.pad_token_id,
                opponent=others,
            )
            for place, one in zip(missing, measured, strict=True):
                parts.add(keys[place], {"measured": one.as_dict()})
            done += len(missing)
            left = duration_text((time.monotonic() - began) / done * (todo - done))
            session.say(f"{target.name}: {span.stop} of {len(keys)} rows{f', {left} left' if done < todo else ''}")
        found += [Measured.of((parts.get(keys[place]) or {})["measured"]) for place in span]
    return found, data, loaded


def _key(
    session: Session,
    target: Target,
    options: LocalOptions,
    data: _Data,
    place: int,
    opponent: dict[int, Measured] | None,
) -> str:
    row, turn, sampling = data.rows[place], data.turns[place], _sampling(session)
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
    length = min(options.max_length, loaded.positions or options.max_length)
    prepared, report = prepare_dataset(
        load_rows(name, split=options.dataset_split),
        loaded.tokenizer,
        DataOptions(length, max(1, length - length // 4), embeddings=loaded.embeddings),
        eos_ids=loaded.eos_ids,
        source=name,
    )
    wanted = min(options.limit or ROWS, len(prepared))
    # Evenly spread: files are often sorted by topic.
    places = [place * len(prepared) // wanted for place in range(wanted)]
    examples = collate_examples([prepared[place] for place in places])["examples"]
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
    names = ("nll", "ended", "length", "seq_rep_4", "loops", "prefers_data_to_own", "gap_to_own")
    items: dict[str, dict[str, float]] = {name: {} for name in names}
    for one in found:
        row = str(one.row)
        items["nll"][row] = -one.data_logp
        items["prefers_data_to_own"][row] = wins(one.data_logp - one.own_logp)
        if one.own:
            items["gap_to_own"][row] = one.data_logp / one.data_tokens - one.own_logp / len(one.own)
        ended = bool(one.own) and one.own[-1] in loaded.eos_ids
        bare = one.own[:-1] if ended else one.own
        items["ended"][row] = float(ended)
        items["length"][row] = float(len(one.own))
        items["loops"][row] = float(ends_in_loop(bare))
        repeated = seq_rep(bare)
        if repeated is not None:
            items["seq_rep_4"][row] = repeated
    notes = list(data.notes)
    crowded = sum(
        len(turn.prompt_ids) + budget > min(session.options.max_length, loaded.positions or session.options.max_length)
        for turn in data.turns
    )
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


def _sampling(session: Session) -> Sampling:
    options, usual = session.options, Sampling()
    return Sampling(
        usual.temperature if options.temperature is None else options.temperature,
        usual.top_k if options.top_k is None else options.top_k,
        usual.top_p if options.top_p is None else options.top_p,
    )
