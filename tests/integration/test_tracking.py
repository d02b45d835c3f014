"""Tables of pairs in trackers: trackio as it is, the others as far as what they are handed."""

import json
import sqlite3
import sys
from types import ModuleType, SimpleNamespace

import pytest

from sapo.training.tracking import COLUMNS, log_pairs, pair_table
from tests.reports import kept_pair

ROWS = [{**kept_pair(3, row, __import__("random").Random(0)), "margin": None} for row in (1, 2)]


def test_a_table_shows_the_segment_and_leaves_gaps_where_nothing_is_known():
    first = dict(zip(COLUMNS, pair_table(ROWS)[0], strict=True))
    before, segment, after = ROWS[0]["rejected"]
    assert first["rejected"] == f"{before}⟦{segment}⟧{after}"
    assert first["margin"] is None
    assert first["step"] == 3


def test_each_tracker_that_is_asked_for_gets_the_table_and_no_other(monkeypatch):
    seen = []
    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    wandb.Table = lambda columns, data: SimpleNamespace(columns=columns, data=data)
    wandb.log = lambda values: seen.append(("wandb", values["pairs"].columns, values["train/global_step"]))
    mlflow.log_table = lambda data, artifact_file: seen.append(("mlflow", list(data), artifact_file))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    log_pairs(["tensorboard", "wandb"], ROWS, 3)
    log_pairs(["mlflow"], ROWS, 3)
    log_pairs([], ROWS, 3)
    assert seen == [("wandb", COLUMNS, 3), ("mlflow", COLUMNS, "pairs/step-000003.json")]


def test_trackio_holds_curves_and_pairs_of_a_run(make_trainer, tmp_path, monkeypatch):
    """In a folder of its own, with the network out of reach."""
    pytest.importorskip("trackio", reason="needs trackio: pip install sapo-llm[tracking]")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import subprocess

    script = f"""
from sapo import SAPOConfig, SAPOTrainer
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer

args = SAPOConfig(output_dir={str(tmp_path / "run")!r}, report_to="trackio", project="mine", run_name="one",
    max_steps=4, logging_steps=1, per_device_train_batch_size=2, segment_length=4, max_length=32, use_cpu=True,
    save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, report_pairs=20)
SAPOTrainer(tiny_llama(), args, tiny_rows(), processing_class=tiny_tokenizer()).train()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (database,) = (tmp_path / "trackio").rglob("mine.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("select metrics from metrics order by id")]
    connection.close()
    assert [row["train/loss"] for row in logged if "train/loss" in row]
    tables = [row["pairs"] for row in logged if "pairs" in row]
    assert len(tables) == 3
    assert "⟦" in json.dumps(tables[-1], ensure_ascii=False)
