"""Open LLM Leaderboard (v1) and IFEval through lm-evaluation-harness, a task at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from sapo.errors import ConfigurationError
from sapo.evaluation.harness_data import (
    LeftTruncations,
    TaskFacts,
    builtin_tasks,
    harness_quiet,
    load_all,
    mmlu_subjects,
    require_packages,
    task_manager,
)
from sapo.evaluation.results import SuiteResult
from sapo.evaluation.session import Session
from sapo.evaluation.store import FinishedParts, part_key
from sapo.evaluation.targets import Target
from sapo.local_measures import Estimate, bootstrap_ratio
from sapo.models import load_tokenizer

TASKS_FOLDER = "lm_eval_tasks"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One column of the leaderboard.

    Attributes:
        name: of the task or group in the harness.
        shots: examples before each question, as published.
        metrics: names in the harness, and how the table calls them.
        main: the one that goes into the average.
    """

    name: str
    shots: int
    metrics: Mapping[str, str]
    main: str


LEADERBOARD = (
    Benchmark("arc_challenge", 25, {"acc_norm,none": "arc_challenge"}, "arc_challenge"),
    Benchmark("hellaswag", 10, {"acc_norm,none": "hellaswag"}, "hellaswag"),
    Benchmark("mmlu", 5, {"acc,none": "mmlu"}, "mmlu"),
    Benchmark("truthfulqa_mc2", 0, {"acc,none": "truthfulqa_mc2"}, "truthfulqa_mc2"),
    Benchmark("winogrande", 5, {"acc,none": "winogrande"}, "winogrande"),
    Benchmark(
        "gsm8k",
        5,
        {"exact_match,strict-match": "gsm8k", "exact_match,flexible-extract": "gsm8k (flexible)"},
        "gsm8k",
    ),
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
        "prompt strict",
    ),
)


def settings(session: Session, suite: str) -> dict[str, Any]:
    """What the numbers depend on, besides the model."""
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
    """Run every task of the suite on every model; finished tasks are not run again.

    Raises:
        EvaluationError, DatasetError: a package or data is missing; known before a model is loaded.
    """
    benchmarks = _benchmarks(session, suite)
    require_packages([one.name for one in benchmarks])
    known = builtin_tasks()
    leaves = {one.name: mmlu_subjects(known) if one.name == "mmlu" else [one.name] for one in benchmarks}
    everything = [leaf for one in benchmarks for leaf in leaves[one.name]]
    data = Path(session.options.task_data) if session.options.task_data else None
    manager = task_manager(known, everything, data, session.folder / TASKS_FOLDER)
    facts = load_all(manager, everything)
    for target in session.targets:
        _require_room(session, target, facts)
    results = {}
    for target in session.targets:
        chat = _chat(session, target, suite)
        parts = session.parts("lm_eval", f"{target.slug}.jsonl")
        runner = _Runner(session, target, manager, parts, chat)
        result = SuiteResult()
        for one in benchmarks:
            records = [runner.record(leaf, one, facts[leaf].identity) for leaf in leaves[one.name]]
            _add(result, one, records, session.options.seed)
        runner.close()
        _average(result, benchmarks)
        result.notes += _notes(session, runner, suite)
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
    """The harness fails in the middle of a task whose responses alone would fill the model's context."""
    config = AutoConfig.from_pretrained(target.base or target.path).get_text_config().to_dict()
    positions = config.get("max_position_embeddings")
    for task, known in facts.items():
        asked = session.options.max_new_tokens or known.generates
        if known.generates and positions is not None and asked >= positions:
            raise ConfigurationError(
                f"{target.path} has {positions} positions, and {task} generates up to {asked} tokens. Lower that: "
                f"--max_new_tokens {positions // 2}."
            )


def _chat(session: Session, target: Target, suite: str) -> bool:
    """Whether prompts go through the chat template: for the leaderboard not, as published; for IFEval if it has one."""
    choice = session.options.apply_chat_template
    if choice != "auto":
        return choice == "true"
    if suite == "leaderboard":
        return False
    tokenizer = load_tokenizer(target.base or target.path)
    return bool(session.template or tokenizer.chat_template)


class _Runner:
    """Runs tasks on one model, which is loaded when the first of them is not there yet."""

    def __init__(self, session: Session, target: Target, manager: Any, parts: FinishedParts, chat: bool) -> None:
        self._session = session
        self._target = target
        self._manager = manager
        self._parts = parts
        self._model: Any = None
        self.chat = chat
        self.truncated = 0

    def record(self, leaf: str, benchmark: Benchmark, identity: str) -> dict[str, Any]:
        """The finished part of one task, run now if it is not there."""
        import lm_eval

        options = self._session.options
        key = part_key(
            suite="lm_eval",
            **self._session.identity(self._target),
            task=leaf,
            data=identity,
            shots=benchmark.shots,
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
            chat=self.chat,
            batch_size=options.batch_size,
            version=lm_eval.__version__,
        )
        record = self._parts.get(key)
        if record is None:
            self._session.say(f"{self._target.name}: {leaf}, {benchmark.shots} shots")
            record = self._parts.add(key, self._run(leaf, benchmark))
        self.truncated += record["truncated"]
        return record

    def _run(self, leaf: str, benchmark: Benchmark) -> dict[str, Any]:
        import lm_eval

        options, cut = self._session.options, LeftTruncations()
        if self._model is None:
            self._session.release()
            self._model = self._load()
        with harness_quiet(cut):
            found: Any = lm_eval.simple_evaluate(
                model=self._model,
                tasks=[leaf],
                num_fewshot=benchmark.shots,
                batch_size=options.batch_size,
                device=self._session.device,
                limit=options.limit,
                log_samples=True,
                gen_kwargs={"max_gen_toks": options.max_new_tokens} if options.max_new_tokens else None,
                apply_chat_template=self.chat,
                task_manager=self._manager,
            )
        metrics = {name: value for name, value in found["results"][leaf].items() if isinstance(value, (int, float))}
        samples: dict[str, dict[str, Any]] = {name: {} for name in benchmark.metrics}
        # What the model said, for comparison with another run of the harness.
        responses = hashlib.sha256()
        for sample in found["samples"][leaf]:
            responses.update(json.dumps(sample["resps"]).encode())
            for name in benchmark.metrics:
                metric, _, filter_name = name.partition(",")
                if sample["filter"] == filter_name:
                    samples[name][str(sample["doc_id"])] = _plain(sample[metric])
        return {
            "task": leaf,
            "metrics": metrics,
            "samples": samples,
            "responses": responses.hexdigest(),
            "examples": int(found["n-samples"][leaf]["effective"]),
            "truncated": cut.count,
        }

    def _load(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        session, target = self._session, self._target
        session.say(f"Loading {target.path}")
        with harness_quiet():
            model: Any = HFLM(
                pretrained=target.base or target.path,
                peft=target.path if target.base else None,
                device=session.device,
                dtype=session.options.dtype,
                batch_size=session.options.batch_size,
            )
        if session.template is not None:
            model.tokenizer.chat_template = session.template
        return model

    def close(self) -> None:
        """Free the model."""
        self._model = None
        self._session.release()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [float(one) for one in value]
    return float(value)


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
    """The harness's own number and standard error."""
    base, _, filter_name = metric.partition(",")
    value = float(record["metrics"][metric])
    error = record["metrics"].get(f"{base}_stderr,{filter_name}")
    stderr = float(error) if error is not None and math.isfinite(error) else None
    low, high = (None, None) if stderr is None else (value - 1.96 * stderr, value + 1.96 * stderr)
    return Estimate(value, stderr, low, high, record["examples"])


def _of_instructions(samples: Mapping[str, Sequence[float]], seed: int) -> Estimate:
    """Share of instructions followed; the harness gives no standard error, so prompts are resampled."""
    estimate = bootstrap_ratio(
        [sum(values) for values in samples.values()], [len(values) for values in samples.values()], seed=seed
    )
    return estimate or Estimate.exact(0.0, 0)


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent numbers, each counting alike."""
    count = len(estimates)
    value = sum(one.value for one in estimates) / count
    errors = [one.stderr for one in estimates]
    if any(error is None for error in errors):
        return Estimate(value, None, None, None, sum(one.count for one in estimates))
    stderr = math.sqrt(sum((error or 0.0) ** 2 for error in errors)) / count
    examples = sum(one.count for one in estimates)
    return Estimate(value, stderr, value - 1.96 * stderr, value + 1.96 * stderr, examples)


def _average(result: SuiteResult, benchmarks: Sequence[Benchmark]) -> None:
    if len(benchmarks) == len(LEADERBOARD):
        result.measures["average"] = _mean([result.measures[one.main] for one in benchmarks])


def _notes(session: Session, runner: _Runner, suite: str) -> list[str]:
    notes = [f"Prompts {'went' if runner.chat else 'did not go'} through the chat template."]
    if session.options.limit is not None:
        notes.append(f"--limit {session.options.limit}: not comparable with published numbers.")
    if session.options.max_new_tokens is not None:
        notes.append(f"--max_new_tokens {session.options.max_new_tokens} in place of what the task asks for.")
    if runner.truncated:
        notes.append(
            f"{runner.truncated} batches held prompts longer than the context: the harness cut them on the left."
        )
    if suite == "leaderboard" and session.options.tasks is not None:
        notes.append("Not all six tasks, so no average.")
    return notes
