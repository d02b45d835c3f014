"""lm-evaluation-harness offline: its tasks on local files, and checks of everything a task requires."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sapo.errors import DatasetError, EvaluationError, brief, require
from sapo.evaluation.store import write_result

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_NEEDED = {"ifeval": ("langdetect", "immutabledict", "nltk")}
"""Packages that tasks import only when they score."""
_HARNESS_TOKENS = 256
"""The harness's default maximum of generated tokens."""


def require_packages(tasks: Sequence[str]) -> None:
    """Refuse tasks whose packages or data for scoring are not installed."""
    wanted = ["lm_eval", *(package for task in tasks for package in _NEEDED.get(task, ()))]
    require(", ".join(tasks), *wanted, error=EvaluationError)
    if "ifeval" in tasks:
        from nltk.tokenize.punkt import PunktTokenizer

        try:
            PunktTokenizer("english")
        except LookupError:
            raise EvaluationError(
                "IFEval requires NLTK's punkt_tab, which is not installed: "
                "python -m nltk.downloader punkt_tab, or unpack it as tokenizers/punkt_tab in "
                "the folder NLTK_DATA."
            ) from None


def builtin_tasks() -> TaskManager:
    """All tasks that come with the harness; takes seconds."""
    from lm_eval.tasks import TaskManager

    with harness_quiet():
        return TaskManager()


def mmlu_subjects(known: TaskManager) -> list[str]:
    """The 57 tasks of the group, so that an interruption costs one subject and not all."""
    return sorted(
        name
        for name in known.all_subtasks
        if (file := known.task_index[name].yaml_path) is not None and file.parts[-3:-1] == ("mmlu", "default")
    )


def task_manager(known: TaskManager, tasks: Sequence[str], data: Path | None, folder: Path) -> TaskManager:
    """The harness's tasks, reading local files instead of the Hub where there are any.

    Args:
        known: from `builtin_tasks`.
        tasks: leaf tasks that will be run.
        data: folder with one folder per task with local files, see `local_files`; None for none.
        folder: where the task files for the harness are written; `lm-eval --include_path` takes it too.
    """
    from lm_eval.tasks import TaskManager

    unknown = [task for task in tasks if task not in known.all_subtasks]
    if unknown:
        raise EvaluationError(f"lm-evaluation-harness has no task {unknown[0]}; lm-eval ls tasks lists them.")
    if data is None:
        return known
    if not data.is_dir():
        raise DatasetError(f"--task_data {data}: no such folder.")
    written = False
    for task in tasks:
        home = data / task
        if not home.is_dir():
            continue
        builtin = known.task_index[task].yaml_path
        files = local_files(home, test_split(builtin))
        kind = {_SUFFIXES[file.suffix] for file in files.values()}
        if len(kind) > 1:
            raise DatasetError(f"{home}: its splits have different file types ({', '.join(sorted(kind))}). Use one.")
        override = {
            "include": str(builtin),
            "task": task,
            "dataset_path": kind.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file.resolve()) for split, file in files.items()}},
        }
        text = yaml.safe_dump(override, sort_keys=False)
        write_result(folder / f"{task}.yaml", text)
        written = True
    if not written:
        raise DatasetError(f"--task_data {data}: has no folder named after one of {', '.join(tasks)}.")
    with harness_quiet():
        return TaskManager(include_path=str(folder))


def test_split(builtin: Path) -> str:
    """The split that a task is scored on."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(builtin, resolve_func=False, recursive=True)
    return str(config.get("test_split") or config.get("validation_split") or "test")


def local_files(home: Path, split: str) -> dict[str, Path]:
    """Files of a task by split: `train.jsonl`, `test.jsonl`, ...; a single file is the split that is scored."""
    files = [file for file in sorted(home.iterdir()) if file.suffix in _SUFFIXES]
    if not files:
        raise DatasetError(f"{home}: contains no .jsonl, .json or .parquet file.")
    if len(files) == 1:
        return {split: files[0]}
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise DatasetError(f"{home}: two files for the split {file.stem}. Keep one.")
        found[file.stem] = file
    if split not in found:
        raise DatasetError(f"{home}: this task is scored on the split {split}; name the file {split}.jsonl.")
    return found


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """Facts about a task before it runs: what identifies its version and data, and the maximum tokens it generates, or
    0.
    """

    identity: str
    generates: int


def load_all(manager: TaskManager, tasks: Sequence[str]) -> dict[str, TaskFacts]:
    """Load the data of every task, to find missing data before a model is loaded."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    found: dict[str, TaskFacts] = {}
    for task in tasks:
        try:
            with harness_quiet():
                loaded = manager.load([task])["tasks"][task]
        except (
            OSError,
            ValueError,
            RuntimeError,
            KeyError,
            HfHubHTTPError,
            datasets.exceptions.DatasetsError,
        ) as error:
            raise DatasetError(
                f"{task}: its data could not be loaded ({brief(error, 200)}). Offline, put its files into "
                f"FOLDER/{task} and set --task_data FOLDER."
            ) from error
        splits: dict[str, Any] = loaded.dataset or {}
        prints = [f"{name}:{rows._fingerprint}:{len(rows)}" for name, rows in sorted(splits.items())]
        asked = (loaded.config.generation_kwargs or {}).get("max_gen_toks", _HARNESS_TOKENS)
        generates = int(asked) if loaded.OUTPUT_TYPE == "generate_until" else 0
        found[task] = TaskFacts(f"{loaded.VERSION} {' '.join(prints)}", generates)
    return found


@contextmanager
def harness_quiet() -> Iterator[None]:
    """Silence the harness's own output."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "eval_logger")]
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.handlers = [logging.NullHandler()]
    try:
        yield
    finally:
        for logger, level, propagate, own in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers = own
