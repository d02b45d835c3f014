"""`sapo evaluate`: parse, find the models, run the suite, write results.json, print the table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
from rich.console import Console
from transformers.utils import logging

from sapo.errors import ConfigurationError
from sapo.evaluation import alpaca_eval, harness, local, mt_bench, results, task_files
from sapo.evaluation.judge import JudgeOptions
from sapo.evaluation.session import EvaluateOptions, Session
from sapo.evaluation.targets import find_targets
from sapo.runs.reading import is_run

SUITES = ("leaderboard", "ifeval", "mt_bench", "alpaca_eval", "local")


def run_evaluate(arguments: Sequence[str]) -> None:
    """Evaluate models on one suite.

    Raises:
        SapoError: what is wrong, in one line; what was finished is kept.
    """
    options = parse(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    suite, run, settings = _suite(options)
    session = Session(options, find_targets(options.models, start=options.start), say)
    found = run(session)
    whole = results.as_json(suite, settings(session), session.targets, session.fingerprints, found)
    file = results.write(session.folder, suite, whole)
    results.show(console, suite, session.targets, found)
    say(f"Results: {file}")


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
    file = Path(suite)
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigurationError(f"--suite {suite}: there are {', '.join(SUITES)}, or a task file (.yaml).")
    if not file.is_file():
        raise ConfigurationError(f"--suite {suite}: no such file.")
    tasks = task_files.load_task_file(file, options.limit)
    return file.stem, lambda session: task_files.run(session, tasks), task_files.settings


def parse(arguments: Sequence[str]) -> EvaluateOptions:
    """Flags to options.

    Raises:
        ConfigurationError: an unknown option, or a value out of range.
    """
    parser = _parser()
    given = parser.parse_args(list(arguments))
    values = vars(given)
    for name in ("limit", "batch_size", "max_new_tokens", "max_judge_calls", "judge_workers", "judge_retries"):
        least = 0 if name in ("max_judge_calls", "judge_retries") else 1
        if values[name] is not None and values[name] < least:
            raise ConfigurationError(f"{name}={values[name]}: must be {least} or more.")
    for name in ("judge_timeout", "judge_calls_per_minute"):
        if values[name] is not None and values[name] <= 0:
            raise ConfigurationError(f"{name}={values[name]}: must be above 0.")
    if given.judge_base_url and not given.judge_base_url.startswith(("http://", "https://")):
        raise ConfigurationError(f"judge_base_url={given.judge_base_url}: must begin with http:// or https://.")
    judge = None
    if given.judge_model:
        judge = JudgeOptions(
            model=given.judge_model,
            base_url=given.judge_base_url,
            key_env=given.judge_key_env,
            max_calls=given.max_judge_calls,
            workers=given.judge_workers,
            timeout=given.judge_timeout,
            retries=given.judge_retries,
            calls_per_minute=given.judge_calls_per_minute,
            input_price=given.judge_input_price,
            output_price=given.judge_output_price,
        )
    if values["output_dir"] is None:
        # Where the run's model card looks for it.
        alone = Path(given.models[0]) if len(given.models) == 1 else Path()
        values["output_dir"] = str((alone if is_run(alone) else Path()) / "evaluation")
    own = {name: value for name, value in values.items() if not name.startswith(("judge_", "max_judge"))}
    return EvaluateOptions(**own, judge=judge, judge_prompt=given.judge_prompt, judge_orders=given.judge_orders)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"sapo evaluate: {message}.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sapo evaluate", allow_abbrev=False, description="Measure models; see docs/evaluation.md.")
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="model folder, hub id, adapter, or run folder (policy and opponent)")
    add("--suite", required=True, help=f"{', '.join(SUITES)}, or a task file (.yaml)")
    add("--start", help="the model before training, to compare with; a run folder names its own")
    add(
        "--output_dir",
        help="results.json, answers, verdicts; finished parts are used again; default: evaluation/, in the run folder "
        "if one is measured alone",
    )
    add("--limit", type=int, help="examples of each task; local: 200 if not given")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--batch_size", type=int, default=8)
    add("--chat_template", metavar="FILE", help="Jinja file, in place of the model's own template")
    add("--max_new_tokens", type=int, help="of a response; local 256, mt_bench 1024, alpaca_eval 2048")
    add("--temperature", type=float, help="of responses; local 0.7, alpaca_eval 0.7, mt_bench by category")
    add("--top_k", type=int, help="local 50, else all")
    add("--top_p", type=float, help="local 0.95, else 1")
    group = parser.add_argument_group("local")
    group.add_argument("--dataset_name", help="held-out rows: file, folder or hub id, as for sapo train")
    group.add_argument("--dataset_split", default="train", help="of a folder or hub id; a part such as train[:10%%]")
    group.add_argument("--max_length", type=int, default=2048, help="tokens of prompt and response together")
    group = parser.add_argument_group("leaderboard and ifeval (lm-evaluation-harness)")
    group.add_argument("--tasks", nargs="+", help="some of the suite's tasks; there is no average then")
    group.add_argument("--task_data", metavar="FOLDER", help="local data: FOLDER/gsm8k/test.jsonl, ...")
    group.add_argument("--apply_chat_template", choices=["auto", "true", "false"], default="auto")
    group = parser.add_argument_group("mt_bench and alpaca_eval")
    group.add_argument("--mt_bench_dir", metavar="FOLDER", help="questions, judge prompts, reference answers")
    group.add_argument("--alpaca_eval_data", metavar="FILE", help="instructions with the baseline's outputs")
    group.add_argument("--judge_model", help="name of the judge at the endpoint")
    group.add_argument("--judge_base_url", metavar="URL", help="OpenAI-compatible endpoint; OpenAI's own if not given")
    group.add_argument("--judge_key_env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key")
    group.add_argument("--judge_prompt", metavar="FILE", help="alpaca_eval: prompt in place of this package's own")
    group.add_argument("--judge_orders", choices=["both", "one"], default="both", help="positions: swap, or draw")
    group.add_argument("--max_judge_calls", type=int, help="requests sent at most, repeated ones included")
    group.add_argument("--judge_workers", type=int, default=8, help="requests under way at once")
    group.add_argument("--judge_timeout", type=float, default=120.0, help="seconds")
    group.add_argument("--judge_retries", type=int, default=6, help="attempts after the first")
    group.add_argument("--judge_calls_per_minute", type=float, help="rate at most")
    group.add_argument("--judge_input_price", type=float, metavar="DOLLARS", help="a million tokens, for the estimate")
    group.add_argument("--judge_output_price", type=float, metavar="DOLLARS", help="a million tokens, for the estimate")
    return parser
