"""Names of the files and folders in a run folder. Nothing else: it is imported by what must start fast."""

from __future__ import annotations

METRICS_FILE = "metrics.jsonl"
"""One line a log: metrics by name, and `step`."""
LOCK_FILE = ".lock"
"""Whose folder it is, while a run goes on: host, process and since when."""
CONFIG_FILE = "sapo_config.yaml"
"""Every option with the value that the run used."""
RECIPE_FILE = "recipe.yaml"
"""What was asked for; gives the same run again."""
RUN_FILE = "run.json"
"""Model, data, machine and versions."""
PAIRS_FILE = "pairs.jsonl"
"""Pairs kept for the report, with their texts."""
REPORT_FILE = "report.html"
REPORT_FILES = (PAIRS_FILE, RUN_FILE, REPORT_FILE)
TRACE_FILE = "trace-{process}.jsonl"
"""Which pairs each optimizer step was trained on."""
BAD_PAIRS_FILE = "bad_pairs-{process}.jsonl"
"""Pairs of steps whose loss or gradient was not finite."""

OPPONENT_FOLDER = "opponent"
STATE_FILE = "sapo_state.json"
MANIFEST_FILE = "sapo_manifest.json"
"""Of a checkpoint: the facts of its run; SHA-256 and size of its files."""

CARD_FILE = "README.md"
CURVES_FILE = "curves.svg"
"""The model card and its picture."""
EVALUATION_FILES = ("results.json", "evaluation/results.json")
"""Where the results of `sapo evaluate` are looked for."""

ROUND_FOLDER = "round-{number}"
"""With `num_rounds`: a run folder for each round."""
ROUND_PAIRS_FILE = "pairs.parquet"
ROUND_EVAL_PAIRS_FILE = "eval_pairs.parquet"
ROUND_FILE = "round.json"
"""Written when the training of a round has ended: what its pairs were, and what they cost."""
