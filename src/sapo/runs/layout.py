"""Names of the files and folders in a run folder, without imports, for a fast start of the command line."""

from __future__ import annotations

METRICS_FILE = "metrics.jsonl"
"""One line a log: metrics by name, and `step`."""
LOCK_FILE = ".lock"
"""Whose folder it is, while a run goes on: host, process and since when."""
CONFIG_FILE = "sapo_config.yaml"
"""Every option with the run's value."""
RECIPE_FILE = "recipe.yaml"
"""The options set by the user; reproduces the run."""
RUN_FILE = "run.json"
"""Model, data, machine and versions."""
PAIRS_FILE = "pairs.jsonl"
"""Pairs with their texts, for the report."""
REPORT_FILE = "report.html"
REPORT_FILES = (PAIRS_FILE, RUN_FILE, REPORT_FILE)
TRACE_FILE = "trace-{process}.jsonl"
"""Pairs that each optimizer step trained on."""
BAD_PAIRS_FILE = "bad_pairs-{process}.jsonl"
"""Pairs of steps with a non-finite loss or gradient."""

RETENTION_PART = "retention"
"""With `eval_retention`: the start on fixed replies, as `retention.safetensors`."""
SELF_REPLAY_FILE = "self_replay.json"
"""With `replay_share`: prompts and the start's replies that are replayed, as token ids."""
REPLIES_PATTERN = "replies-*.json"
"""Replies that the start generated once."""

OPPONENT_FOLDER = "opponent"
STATE_FILE = "sapo_state.json"
MANIFEST_FILE = "sapo_manifest.json"
"""In a checkpoint: the facts of its run; SHA-256 and size of its files."""

CARD_FILE = "README.md"
CURVES_FILE = "curves.svg"
"""The model card and its image."""
EVALUATION_FILES = ("results.json", "evaluation/results.json")
"""Results of `sapo evaluate`."""

ROUND_FOLDER = "round-{number}"
"""With `num_rounds`: one run folder per round."""
ROUND_PAIRS_FILE = "pairs.parquet"
ROUND_EVAL_PAIRS_FILE = "eval_pairs.parquet"
ROUND_FILE = "round.json"
"""Written at the end of a round: statistics and cost of its pairs."""
