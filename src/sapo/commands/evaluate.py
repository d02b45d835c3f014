"""`sapo evaluate`: parse, find the models, run the suite, write results.json, print the table."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from sapo.commands.catalog import SUITES
from sapo.commands.inputs import quiet_libraries
from sapo.commands.parser import Parsed
from sapo.errors import ConfigurationError
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
        close = difflib.get_close_matches(suite, SUITES, n=1)
        nearest = f"; nearest: {close[0]}" if close else ""
        raise ConfigurationError(f"--suite {suite}: there are {', '.join(SUITES)}, or a task file (.yaml){nearest}.")
    if not file.is_file():
        raise ConfigurationError(f"--suite {suite}: no such file.")
    tasks = task_files.load_task_file(file, options.limit)
    return file.stem, lambda session: task_files.run(session, tasks), task_files.settings


def options_of(given: Parsed) -> EvaluateOptions:
    """The options of the command.

    Raises:
        ConfigurationError: a value out of range.
    """
    own = given.own
    values = dict(vars(own))
    for name in ("judge_timeout", "judge_calls_per_minute"):
        if values[name] is not None and values[name] <= 0:
            raise ConfigurationError(f"{name}={values[name]}: must be above 0.")
    if own.judge_base_url and not own.judge_base_url.startswith(("http://", "https://")):
        raise ConfigurationError(f"judge_base_url={own.judge_base_url}: must begin with http:// or https://.")
    judge = None
    if own.judge_model:
        judge = JudgeOptions(
            model=own.judge_model,
            base_url=own.judge_base_url,
            key_env=own.judge_key_env,
            max_calls=own.max_judge_calls,
            workers=own.judge_workers,
            timeout=own.judge_timeout,
            retries=own.judge_retries,
            calls_per_minute=own.judge_calls_per_minute,
            input_price=own.judge_input_price,
            output_price=own.judge_output_price,
        )
    if values["output_dir"] is None:
        # Where the run's model card looks for it.
        alone = Path(own.models[0]) if len(own.models) == 1 else Path()
        values["output_dir"] = str((alone if is_run(alone) else Path()) / "evaluation")
    rest = {name: value for name, value in values.items() if not name.startswith(("judge_", "max_judge"))}
    return EvaluateOptions(**rest, judge=judge, judge_prompt=own.judge_prompt, judge_orders=own.judge_orders)
