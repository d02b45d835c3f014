"""Open LLM Leaderboard (v1) and IFEval through lm-evaluation-harness, one task at a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sapo.errors import ConfigurationError, EvaluationError
from sapo.evaluation.harness_data import (
    TaskFacts,
    builtin_tasks,
    load_all,
    mmlu_subjects,
    require_packages,
    task_manager,
)
from sapo.evaluation.results import SuiteResult
from sapo.evaluation.session import Session
from sapo.evaluation.store import FinishedParts, write_result
from sapo.evaluation.targets import Target, check_for_other_loaders
from sapo.measures.intervals import Estimate, bootstrap_ratio
from sapo.runs.files import facts_digest
from sapo.text.escape import visible
from sapo.weights.description import load_tokenizer, positions_of, read_config
from sapo.weights.source import read_adapter_config, trained_rows

TASKS_FOLDER = "lm_eval_tasks"
_NOT_AN_ERROR = "fatal: not a git repository (or any of the parent directories): .git\n"
"""Printed when the harness looks for a git commit for its results."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One column of the leaderboard.

    Attributes:
        name: task or group in the harness.
        shots: number of few-shot examples, as published.
        metrics: metric names in the harness, with their names in the table; the first enters the average.
    """

    name: str
    shots: int
    metrics: Mapping[str, str]


LEADERBOARD = (
    Benchmark("arc_challenge", 25, {"acc_norm,none": "arc_challenge"}),
    Benchmark("hellaswag", 10, {"acc_norm,none": "hellaswag"}),
    Benchmark("mmlu", 5, {"acc,none": "mmlu"}),
    Benchmark("truthfulqa_mc2", 0, {"acc,none": "truthfulqa_mc2"}),
    Benchmark("winogrande", 5, {"acc,none": "winogrande"}),
    Benchmark("gsm8k", 5, {"exact_match,strict-match": "gsm8k", "exact_match,flexible-extract": "gsm8k (flexible)"}),
)
"""Tasks, shots and metrics of the Open LLM Leaderboard v1, as in section 4.1 of the paper."""

IFEVAL = (
    Benchmark(
        "ifeval",
        0,
        {
            "prompt_level_strict_acc,none": "prompt strict",
            "inst_level_strict_acc,none": "instruction strict",
            "prompt_level_loose_acc,none": "prompt loose",
            "inst_level_loose_acc,none": "instruction loose",
        },
    ),
)


def settings(session: Session, suite: str) -> dict[str, Any]:
    """Settings that the results depend on, besides the model."""
    import lm_eval

    options = session.options
    return {
        "lm_eval": lm_eval.__version__,
        "tasks": {one.name: one.shots for one in _benchmarks(session, suite)},
        "limit": options.limit,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "apply_chat_template": options.apply_chat_template,
        "task_data": options.task_data,
    }


def run(session: Session, suite: str) -> dict[str, SuiteResult]:
    """Run every task of the suite on every model; finished tasks are not run again. What is missing shows first."""
    benchmarks = _benchmarks(session, suite)
    require_packages([one.name for one in benchmarks])
    known = builtin_tasks()
    leaves = {one.name: mmlu_subjects(known) if one.name == "mmlu" else [one.name] for one in benchmarks}
    everything = [leaf for one in benchmarks for leaf in leaves[one.name]]
    data = Path(session.options.task_data) if session.options.task_data else None
    manager = task_manager(known, everything, data, session.folder / TASKS_FOLDER)
    facts = load_all(manager, everything)
    for target in session.targets:
        check_for_other_loaders(target)
        _require_room(session, target, facts)
        _require_tokens(session, target)
    include = session.folder / TASKS_FOLDER if data is not None else None
    results = {}
    for target in session.targets:
        parts = session.parts("lm_eval", f"{target.slug}.jsonl")
        runner = _Runner(session, target, parts, _chat(session, target, suite), include)
        keys = {leaf: runner.key(leaf, one, facts[leaf].identity) for one in benchmarks for leaf in leaves[one.name]}
        parts = runner.run([(keys[leaf], leaf, one) for one in benchmarks for leaf in leaves[one.name]])
        result, truncated = SuiteResult(), 0
        for one in benchmarks:
            records = [parts.get(keys[leaf]) or {} for leaf in leaves[one.name]]
            truncated += sum(record["truncated"] for record in records)
            _add(result, one, records, session.options.seed)
        if len(benchmarks) == len(LEADERBOARD):
            result.measures["average"] = average(result, benchmarks)
        result.notes += _notes(session, suite, chat=runner.chat, truncated=truncated)
        results[target.name] = result
    return results


def _benchmarks(session: Session, suite: str) -> list[Benchmark]:
    all_of_them = LEADERBOARD if suite == "leaderboard" else IFEVAL
    wanted = session.options.tasks
    if wanted is None:
        return list(all_of_them)
    names = [one.name for one in all_of_them]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ConfigurationError(f"--tasks {unknown[0]}: suite {suite} has {', '.join(names)}.")
    return [one for one in all_of_them if one.name in wanted]


def _require_room(session: Session, target: Target, facts: Mapping[str, TaskFacts]) -> None:
    """Refuse tasks whose responses alone would fill the model's context: the harness would fail in the middle."""
    positions = positions_of(read_config(target.path))
    for task, known in facts.items():
        asked = session.options.max_new_tokens or known.generates
        if known.generates and positions is not None and asked >= positions:
            raise ConfigurationError(
                f"{target.path} has {positions} positions, and {task} generates up to {asked} tokens. Lower that: "
                f"--max_new_tokens {positions // 2}."
            )


def _chat(session: Session, target: Target, suite: str) -> bool:
    """Whether to apply the chat template: not for the leaderboard, as published; for IFEval if there is one."""
    choice = session.options.apply_chat_template
    if choice != "auto":
        return choice == "true"
    if suite == "leaderboard":
        return False
    return bool(session.template or load_tokenizer(_tokenizer(target)).chat_template)


def _tokenizer(target: Target) -> str:
    """Folder or Hub id of the tokenizer: the base model's, unless the adapter was trained with tokens that it lacks."""
    own = target.base is None or trained_rows(read_adapter_config(Path(target.path)))
    return target.path if own else str(target.base)


def _require_tokens(session: Session, target: Target) -> None:
    """The harness loads the model by itself, without rows for new tokens."""
    known = load_tokenizer(_tokenizer(target)).get_vocab()
    missing = [str(token) for token in session.template.tokens if str(token) not in known] if session.template else []
    if missing:
        raise ConfigurationError(
            f"chat_template_path={session.options.chat_template_path}: {target.path} has no token {missing[0]!r}, and "
            "lm-evaluation-harness cannot add it. Use a template whose tokens the model has, such as zephyr."
        )


@dataclass(frozen=True, slots=True)
class _Runner:
    """Runs tasks on one model, in a separate process."""

    session: Session
    target: Target
    parts: FinishedParts
    chat: bool
    include: Path | None

    def key(self, leaf: str, benchmark: Benchmark, identity: str) -> str:
        """Key of one task's result: everything it depends on."""
        import lm_eval

        options = self.session.options
        return facts_digest(
            suite="lm_eval",
            **self.session.identity(self.target),
            task=leaf,
            data=identity,
            shots=benchmark.shots,
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
            chat=self.chat,
            batch_size=options.batch_size,
            version=lm_eval.__version__,
        )

    def run(self, tasks: Sequence[tuple[str, str, Benchmark]]) -> FinishedParts:
        """Run the unfinished ones of (key, task, benchmark); return the file with all results.

        Raises:
            EvaluationError: the harness failed; finished tasks are kept.
        """
        missing = [task for task in tasks if task[0] not in self.parts]
        if not missing:
            return self.parts
        self.session.release()
        self.session.say(f"{self.target.name}: {', '.join(leaf for _, leaf, _ in missing)}")
        request = self._request(missing)
        file = self.parts.file.with_suffix(".request.json")
        write_result(file, json.dumps(request, indent=1) + "\n")
        status, last = _run_child(file)
        parts = FinishedParts(self.parts.file)
        left = [leaf for key, leaf, _ in missing if key not in parts]
        if status or left:
            raise EvaluationError(
                f"lm-evaluation-harness exited with status {status} at {left[0] if left else 'its end'} of "
                f"{self.target.path} ({last}). {len(missing) - len(left)} of {len(missing)} tasks "
                f"are kept in {parts.file}; the same command continues from them."
            )
        file.unlink()
        return parts

    def _request(self, missing: Sequence[tuple[str, str, Benchmark]]) -> dict[str, Any]:
        session, target = self.session, self.target
        options = session.options
        # Set explicitly, because the harness's default may change.
        model_args = {"pretrained": target.base or target.path, "dtype": options.dtype, "trust_remote_code": False}
        if target.base is not None:
            model_args["peft"] = target.path
            if _tokenizer(target) != target.base:
                model_args["tokenizer"] = _tokenizer(target)
        return {
            "model_args": model_args,
            "device": session.device,
            "batch_size": options.batch_size,
            "limit": options.limit,
            "gen_kwargs": {"max_gen_toks": options.max_new_tokens} if options.max_new_tokens else None,
            "chat": self.chat,
            "chat_template": None if session.template is None else session.template.text,
            "include_path": None if self.include is None else str(self.include),
            "parts": str(self.parts.file),
            "positions": positions_of(read_config(target.path)),
            "tasks": [
                {"key": key, "task": leaf, "shots": benchmark.shots, "metrics": list(benchmark.metrics)}
                for key, leaf, benchmark in missing
            ],
        }


def _run_child(request: Path) -> tuple[int, str]:
    """Run the harness on a request and pass its stderr on; return the exit status and the last error line."""
    # A fixed module of this package, with this interpreter.
    command = [sys.executable, "-m", "sapo.evaluation.harness_child", str(request)]
    last = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as child:  # noqa: S603
        if child.stderr is not None:
            # Not line by line: progress bars end in a carriage return.
            for chunk in iter(partial(os.read, child.stderr.fileno(), 2**16), b""):
                text = chunk.decode(errors="replace").replace(_NOT_AN_ERROR, "")
                sys.stderr.write(text)
                last = (text.strip().splitlines() or [last])[-1]
        status = child.wait()
    return status, visible(last)[-200:]


def _add(result: SuiteResult, benchmark: Benchmark, records: Sequence[Mapping[str, Any]], seed: int) -> None:
    for metric, name in benchmark.metrics.items():
        items: dict[str, float] = {}
        found = []
        for record in records:
            own = record["samples"][metric]
            several = any(isinstance(value, list) for value in own.values())
            found.append(_of_instructions(own, seed) if several else _of_task(record, metric))
            if not several:
                items |= {f"{record['task']}/{doc}": value for doc, value in own.items()}
        result.measures[name] = found[0] if len(found) == 1 else _mean(found)
        if items:
            result.items[name] = items


def _of_task(record: Mapping[str, Any], metric: str) -> Estimate:
    """The harness's own value and standard error."""
    base, _, filter_name = metric.partition(",")
    value = float(record["metrics"][metric])
    error = record["metrics"].get(f"{base}_stderr,{filter_name}")
    stderr = float(error) if error is not None and math.isfinite(error) else None
    return Estimate.normal(value, stderr, record["examples"])


def _of_instructions(samples: Mapping[str, Sequence[float]], seed: int) -> Estimate:
    """Fraction of instructions followed; the harness has no standard error for it, so prompts are resampled."""
    estimate = bootstrap_ratio(
        [sum(values) for values in samples.values()], [len(values) for values in samples.values()], seed=seed
    )
    return estimate or Estimate.exact(0.0, 0)


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates."""
    count = len(estimates)
    errors = [one.stderr for one in estimates if one.stderr is not None]
    stderr = math.hypot(*errors) / count if len(errors) == count else None
    return Estimate.normal(sum(one.value for one in estimates) / count, stderr, sum(one.count for one in estimates))


def average(result: SuiteResult, benchmarks: Sequence[Benchmark]) -> Estimate:
    """Unweighted mean of the benchmarks' first metrics."""
    return _mean([result.measures[next(iter(one.metrics.values()))] for one in benchmarks])


def _notes(session: Session, suite: str, *, chat: bool, truncated: int) -> list[str]:
    notes = [f"The chat template was {'' if chat else 'not '}applied."]
    if session.options.limit is not None:
        notes.append(f"--limit {session.options.limit}: not comparable with published numbers.")
    if session.options.max_new_tokens is not None:
        notes.append(f"--max_new_tokens {session.options.max_new_tokens} instead of the task's own limit.")
    if truncated:
        notes.append(
            f"{truncated} requests or batches were longer than the model's context: the harness truncated their start."
        )
    if suite == "leaderboard" and session.options.tasks is not None:
        notes.append("Not all six tasks, so no average.")
    return notes
