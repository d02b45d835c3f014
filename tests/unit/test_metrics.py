"""One declaration a metric: what a run logs is declared, what is declared is logged, shown and documented."""

import re

import pytest

from sapo.runs.metrics import COSTS, EVAL, LOCAL, METRICS, TOTALS, compared_metrics, find_metric
from sapo.runs.reading import read_run
from tests.integration.pages import ROOT
from tests.tiny import tiny_rows

PRODUCERS = {
    "preference/pair_loss.py",
    "preference/self_play.py",
    "preference/self_replay.py",
    "runs/metrics.py",
    "training/callbacks.py",
    "training/engine_queue.py",
    "training/engine_weights.py",
    "training/local_eval.py",
    "training/log.py",
    "training/metrics.py",
    "training/trainer.py",
}
"""Where metrics are produced, and where they are declared."""


@pytest.fixture
def logged(make_trainer):
    trainer = make_trainer(
        eval_rows=tiny_rows(4, seed=1), eval_strategy="steps", eval_steps=2, chosen_nll_weight=0.1, eval_local=True,
        eval_local_size=2, eval_local_max_time_fraction=1.0, eval_retention=True, eval_retention_size=2,
        eval_retention_max_time_fraction=1.0,
    )  # fmt: skip
    trainer.train()
    return set(read_run(trainer.run_folder.path).metrics())


def test_what_a_run_logs_is_declared_and_what_is_declared_is_logged(logged):
    local = {name for name in logged if name.startswith(LOCAL)}
    assert len(local) > 2
    assert {name for name in logged - local if find_metric(name) is None} == set()
    holds = {"", "not with SFT", "with self-play", "with evaluation rows", "with `eval_local`"}
    holds.add("with ORPO, SFT or `chosen_nll_weight`")
    assert {metric.name for metric in METRICS if metric.when in holds} <= logged
    assert {EVAL + metric.name for metric in METRICS if metric.curve.eval_legend} <= logged


def test_no_metric_is_declared_twice_and_every_condition_is_known():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert {metric.name for metric in METRICS if metric.when == "with vLLM"} == {
        name for name in names if "engine" in name
    }
    assert TOTALS <= COSTS
    assert all(find_metric(name) is not None for name in compared_metrics())


def test_names_of_metrics_stand_where_they_are_produced_and_nowhere_else():
    declared = "|".join(re.escape(metric.name) for metric in METRICS if "/" in metric.name)
    pattern = re.compile(f"\"({EVAL})?({declared})\"|'({EVAL})?({declared})'")
    source = ROOT / "src/sapo"
    files = {str(file.relative_to(source)): file.read_text(encoding="utf-8") for file in source.rglob("*.py")}
    found = {name for name, text in files.items() if pattern.search(text)}
    assert found <= PRODUCERS


def test_the_documentation_has_the_table_of_the_declarations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from metrics_table import PAGE, with_table

    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run python docs/metrics_table.py"
