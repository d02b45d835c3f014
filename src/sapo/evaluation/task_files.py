"""Custom tasks: a YAML file with JSONL files of prompts and verifiers of responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sapo.data.loading import load_rows
from sapo.errors import ConfigurationError, DatasetError, brief, yaml_fault
from sapo.evaluation.generate import chat_ids, finish_notes, plain_ids, replies
from sapo.evaluation.results import SuiteResult
from sapo.evaluation.session import Session
from sapo.evaluation.targets import LoadedModel, Target
from sapo.evaluation.verifiers import Verifier, make_verifier, missing_field
from sapo.generation.sampling import Sampling
from sapo.measures.intervals import bootstrap_ratio
from sapo.runs.files import facts_digest
from sapo.seeds import derive_seed

_FIELDS = {
    "name",
    "data",
    "verifier",
    "pattern",
    "tolerance",
    "ignore_case",
    "max_new_tokens",
    "temperature",
    "stop",
    "chat",
}


@dataclass(frozen=True)
class Task:
    """One task of a file.

    Attributes:
        name: name of the measure.
        file: file with its rows.
        rows: each with `prompt` or `messages`, and the verifier's fields (`answer`, `pattern`).
        verify: maps response and row to a score in [0, 1].
        max_new_tokens: maximum tokens of a response.
        temperature: sampling temperature; 0 for greedy.
        stop: texts before which a response is truncated.
        chat: whether to apply the chat template; None: if the model has one.
    """

    name: str
    file: Path
    rows: list[Mapping[str, Any]]
    verify: Verifier
    max_new_tokens: int
    temperature: float
    stop: tuple[str, ...]
    chat: bool | None


def load_task_file(file: Path, limit: int | None = None) -> list[Task]:
    """Read a YAML file with a list `tasks`, or a single task, and the first `limit` rows of each; create verifiers."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--suite {file}: cannot be read ({error}).") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigurationError(f"--suite {file}{yaml_fault(error)}.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--suite {file}: not valid YAML ({brief(error)}).") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"--suite {file}: a task file has `tasks:` with a list of tasks.")
    listed = content.get("tasks", [content])
    if not isinstance(listed, list) or not all(isinstance(task, dict) for task in listed) or not listed:
        raise ConfigurationError(f"--suite {file}: tasks must be a list of tasks, each with name, data and verifier.")
    tasks = [_task(task, file, limit) for task in listed]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"--suite {file}: two tasks have the same name.")
    return tasks


def _task(task: Mapping[str, Any], file: Path, limit: int | None) -> Task:
    where = f"{file}, task {task.get('name', '(without name)')}"
    unknown = sorted(map(str, task.keys() - _FIELDS))
    if unknown:
        raise ConfigurationError(f"{where}: unknown option {unknown[0]}; known are {', '.join(sorted(_FIELDS))}.")
    for needed in ("name", "data"):
        if not task.get(needed):
            raise ConfigurationError(f"{where}: {needed} is missing.")
    data = file.parent / str(task["data"])
    rows: list[Any] = [dict(row) for row in load_rows(data)][:limit]
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("prompt"), str) and not isinstance(row.get("messages"), list):
            raise DatasetError(f'{data}, row {number}: needs "prompt" (text) or "messages" (a list).')
        lacking = missing_field(task, row)
        if lacking:
            raise DatasetError(
                f'{data}, row {number}: has no "{lacking}", which the verifier of {task["name"]} requires.'
            )
    stop = task.get("stop", [])
    return Task(
        name=str(task["name"]),
        file=data,
        rows=rows,
        verify=make_verifier(task, where, file.parent),
        max_new_tokens=int(task.get("max_new_tokens", 256)),
        temperature=float(task.get("temperature", 0.0)),
        stop=tuple([stop] if isinstance(stop, str) else stop),
        chat=None if task.get("chat", "auto") == "auto" else bool(task["chat"]),
    )


def settings(session: Session) -> dict[str, Any]:
    """Settings that the results depend on, besides the model and the file."""
    return {"file": session.options.suite, "limit": session.options.limit, "seed": session.options.seed}


def run(session: Session, tasks: list[Task]) -> dict[str, SuiteResult]:
    """Generate and verify every row of every task with every model; responses are kept."""
    results = {}
    for target in session.targets:
        result = SuiteResult()
        for task in tasks:
            _run_task(session, target, task, result)
        results[target.name] = result
    return results


def _run_task(session: Session, target: Target, task: Task, result: SuiteResult) -> None:
    options, name = session.options, task.name
    keys = [
        facts_digest(
            suite="task",
            **session.identity(target),
            prompt=row.get("messages") or row["prompt"],
            row=number,
            max_new_tokens=task.max_new_tokens,
            temperature=task.temperature,
            chat=task.chat,
            seed=options.seed,
        )
        for number, row in enumerate(task.rows)
    ]

    def compute(missing: list[int]) -> list[dict[str, Any]]:
        loaded = session.load(target)
        found = replies(
            loaded,
            [_prompt(loaded, target, task, task.rows[place]) for place in missing],
            [derive_seed(options.seed, "task", place) for place in missing],
            Sampling(task.temperature, 0, 1.0),
            max_new_tokens=task.max_new_tokens,
            batch_size=options.batch_size,
        )
        return [
            {"task": name, "row": place, "response": reply.text, "finish": reply.finish}
            for place, reply in zip(missing, found, strict=True)
        ]

    records = session.parts("tasks", f"{target.slug}.jsonl").complete(
        keys,
        4 * options.batch_size,
        compute,
        lambda done: session.say(f"{target.name}, {name}: {done} of {len(keys)} rows"),
    )
    scores = {
        str(place): task.verify(_truncate(record["response"], task.stop), task.rows[place])
        for place, record in enumerate(records)
    }
    estimate = bootstrap_ratio(list(scores.values()), seed=options.seed)
    if estimate is not None:
        result.measures[name] = estimate
    result.items[name] = scores
    result.notes += [f"{name}: {note}" for note in finish_notes([record["finish"] for record in records])]


def _prompt(loaded: LoadedModel, target: Target, task: Task, row: Mapping[str, Any]) -> list[int]:
    chat = bool(loaded.tokenizer.chat_template) if task.chat is None else task.chat
    if "messages" in row or chat:
        return chat_ids(loaded, target.path, row.get("messages") or [{"role": "user", "content": row["prompt"]}])
    return plain_ids(loaded, row["prompt"])


def _truncate(text: str, stops: tuple[str, ...]) -> str:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
