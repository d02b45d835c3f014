"""`sapo evaluate`: parse, find the models, run the suite, write results.json, print the table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from sapo.commands.catalog import SUITES
from sapo.commands.inputs import quiet_libraries
from sapo.commands.parser import Parsed
from sapo.errors import ConfigurationError, nearest
from sapo.evaluation import alpaca_eval, harness, local, mt_bench, results, retention, table, task_files
from sapo.evaluation.judge import JudgeOptions
from sapo.evaluation.session import EvaluateOptions, Session
from sapo.evaluation.targets import find_targets
from sapo.runs.reading import is_run
from sapo.text.terminal import say


def run_evaluate(given: Parsed, begin: Callable[[], None]) -> None:
    """Evaluate models on one suite.

    Args:
        given: the command line.
        begin: called when the first model is ready.

    Raises:
        SapoError: what is wrong, in one line; what was finished is kept.
    """
    options = options_of(given)
    quiet_libraries()
    logging.set_verbosity_error()
    console = Console()
    suite, run, settings = _suite(options)
    session = Session(options, find_targets(options.models, start=options.start), partial(say, console), begin)
    found = run(session)
    whole = results.as_json(settings(session), session.targets, session.fingerprints, found)
    file = results.write(session.folder, suite, whole)
    table.show(console, suite, session.targets, found)
    say(console, f"Results: {file}")


def _suite(
    options: EvaluateOptions,
) -> tuple[str, Callable[[Session], dict[str, results.SuiteResult]], Callable[[Session], dict[str, Any]]]:
    """Name, run and settings of the suite that was asked for."""
    suite = options.suite
    match suite:
        case "leaderboard" | "ifeval":
            return suite, lambda session: harness.run(session, suite), lambda session: harness.settings(session, suite)
        case "mt_bench":
            return suite, mt_bench.run, mt_bench.settings
        case "alpaca_eval":
            return suite, alpaca_eval.run, alpaca_eval.settings
        case "local":
            return suite, local.run, local.settings
        case "retention":
            return suite, retention.run, retention.settings
    file = Path(suite)
    if file.suffix not in (".yaml", ".yml"):
        listed = f"there are {', '.join(SUITES)}, or a task file (.yaml){nearest(suite, SUITES)}"
        raise ConfigurationError(f"--suite {suite}: {listed}.")
    if not file.is_file():
        raise ConfigurationError(f"--suite {suite}: no such file.")
    tasks = task_files.load_task_file(file, options.limit)
    return file.stem, lambda session: task_files.run(session, tasks), task_files.settings


def options_of(given: Parsed) -> EvaluateOptions:
    """The options of the command.

    Raises:
        ConfigurationError: a value out of range.
    """
    own, values = given.own, dict(vars(given.own))
    of_judge = {
        name: values.pop(name)
        for name in list(values)
        if name.startswith(("judge_", "max_judge_")) and name not in ("judge_prompt", "judge_orders")
    }
    judge = JudgeOptions(**{name.replace("judge_", ""): value for name, value in of_judge.items()})
    if values["output_dir"] is None:
        # Where the run's model card looks for it.
        alone = Path(own.models[0]) if len(own.models) == 1 else Path()
        values["output_dir"] = str((alone if is_run(alone) else Path()) / "evaluation")
    return EvaluateOptions(**values, judge=judge if judge.model else None)
