"""Laws of `sapo compare`: what it says is what the runs left."""

import json
import re
import shutil

import pytest

from sapo.commands.main import main
from sapo.runs.cost import cost_of, time_shares
from sapo.runs.reading import differing_settings, read_run
from tests.tiny import tiny_llama, tiny_rows, write_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    from sapo import SAPOConfig, SAPOTrainer

    folder = tmp_path_factory.mktemp("runs")
    for name, objective in (("one", "sft"), ("two", "orpo")):
        args = SAPOConfig(
            str(folder / name), objective=objective, max_steps=5, logging_steps=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, segment_length=4, max_length=32, use_cpu=True, save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        SAPOTrainer(tiny_llama(), args, tiny_rows(), processing_class=tokenizer).train()
    return folder


def test_settings_that_differ_are_named_and_no_others(runs):
    differing = differing_settings([read_run(runs / name) for name in ("one", "two")])
    assert differing == {"objective": ["sft", "orpo"], "pair_source": ["none", "self_play"]}


def test_every_step_is_counted_once(runs):
    for record in [read_run(runs / name) for name in ("one", "two")]:
        cost = cost_of(record)
        counted = [row["tokens"] for row in record.rows if "tokens" in row]
        assert [row["step"] for row in record.train] == [1, 2, 4, 5]
        assert cost.tokens == sum(counted)
        assert cost.steps == 5
        runtime = next(row["train_runtime"] for row in record.rows if "train_runtime" in row)
        assert 0 < cost.wall_seconds <= runtime
        assert cost.peak_mb > 0


def test_the_parts_of_a_run_and_its_steps_add_up(runs):
    for record in [read_run(runs / name) for name in ("one", "two")]:
        for line in record.train:
            parts = 2 * sum(line[f"time/{name}"] for name in ("generate", "reference", "policy"))
            assert line["time/step"] == pytest.approx(parts + line["time/optimizer"] + line["time/overhead"], rel=1e-6)
        shares = time_shares(record)
        assert list(shares) == ["generation", "reference", "policy", "optimizer", "other"]
        assert sum(shares.values()) == pytest.approx(1)
        runtime = record.rows[-1]["train_runtime"]
        spent = sum(row["time/policy"] * 2 * steps for row, steps in zip(record.train, (1, 1, 2, 1), strict=True))
        assert shares["policy"] == pytest.approx(spent / runtime, rel=1e-3)


def test_the_parts_of_a_step_with_fewer_micro_batches_are_no_longer_than_the_step(runs, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(runs / "two", folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "time/step" in line:
            # As if each step had had one micro-batch instead of the two of `gradient_accumulation_steps`.
            work = line["time/step"] - line["time/optimizer"]
            line |= {f"time/{name}": work / 3 for name in ("generate", "reference", "policy")}
    write_rows(folder / "metrics.jsonl", lines)
    record = read_run(folder)
    assert sum(time_shares(record).values()) == pytest.approx(1)
    assert cost_of(record).generate_seconds < cost_of(record).wall_seconds / 2.9


def test_sft_learns_from_each_token_once_and_pairs_from_more(runs):
    sft, orpo = [read_run(runs / name) for name in ("one", "two")]
    assert cost_of(sft).tokens < cost_of(orpo).tokens


def test_lines_of_an_earlier_start_are_not_counted_twice(runs, tmp_path):
    lines = (runs / "one" / "metrics.jsonl").read_text().splitlines()
    again = tmp_path / "again"
    again.mkdir()
    # A run that ended at step 5 and went on: the line of its first end stays.
    later = json.dumps(json.loads(lines[-2]) | {"step": 6})
    (again / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*lines, later]))
    first, second = read_run(runs / "one"), read_run(again)
    assert cost_of(second).tokens == cost_of(first).tokens + json.loads(lines[-2])["tokens"]


def test_evaluations_stand_in_the_comparison_and_settings_with_their_meaning(runs, capsys):
    measures = {"nll": {"value": 2.5, "stderr": 0.1}, "ended_data": {"value": 1.0, "stderr": None}}
    result = {"role": "policy", "measures": measures, "change_from_start": {"nll": {"value": -0.2, "stderr": 0.05}}}
    start = {"role": "start", "measures": {"nll": {"value": 9.0, "stderr": 0.1}}}
    content = {"suites": {"local": {"models": {"policy": result, "start": start}}}}
    file = runs / "one" / "evaluation" / "results.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    assert main(["compare", str(runs / "one"), str(runs / "two")]) == 0
    shown = capsys.readouterr().out
    file.unlink()
    assert re.search(r"local: nll +2\.50 ±0\.10 +-", shown)
    assert re.search(r"change from its start +-0\.200 ±0\.050", shown)
    assert "ended_data" not in shown
    assert "9.00" not in shown
    assert "objective: Loss on the pairs" in shown
    assert "loss ↓" in shown


def test_runs_of_the_same_settings_are_said_to_be(runs, capsys):
    assert main(["compare", str(runs / "one"), str(runs / "one")]) == 0
    assert "The settings of these runs are the same." in capsys.readouterr().out


def test_one_run_alone_has_no_settings_that_differ(runs, capsys):
    assert main(["compare", str(runs / "one")]) == 0
    assert "settings that differ" not in capsys.readouterr().out


def test_the_command_writes_tables_and_json(runs, tmp_path, capsys):
    files = ["--json", str(tmp_path / "c.json"), "--markdown", str(tmp_path / "c.md")]
    assert main(["compare", str(runs / "one"), str(runs / "two"), *files]) == 0
    shown = capsys.readouterr().out
    assert "objective" in shown
    assert "rewards/margins" in shown
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["two"]["cost"]["steps"] == 5
    assert content["two"]["last"]["loss"] == content["two"]["curves"]["loss"][-1][1]
    assert "| objective | sft | orpo |" in (tmp_path / "c.md").read_text()


def test_what_is_no_run_is_refused_in_one_line(runs, tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "contains no metrics.jsonl" in capsys.readouterr().err
    assert main(["compare", str(runs / "one"), "--metrics", "los"]) == 2
    assert "no run has los; they have" in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "\n" not in capsys.readouterr().err.strip()


def test_long_names_lose_what_is_common_to_all_of_them_and_a_line_says_what_is_meant(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"smollm2-guarded-lr5e-6-seed-{number}" for number in (0, 1)]
    copies = [
        str(shutil.copytree(runs / run, tmp_path / name / "again/run"))
        for name, run in zip(names, ("one", "two"), strict=True)
    ]
    table, file = tmp_path / "table.md", tmp_path / "all.json"
    assert main(["compare", *copies, "--markdown", str(table), "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    full = [f"{name}/again/run" for name in names]
    assert shown.splitlines()[:2] == [f"seed-{number}  is  {name}" for number, name in enumerate(full)]
    assert all(shown.count(name) == 1 for name in full)
    assert "| setting | seed-0 | seed-1 |" in table.read_text()
    assert list(json.loads(file.read_text())) == full
    assert main(["compare", str(runs / "one"), str(runs / "two")]) == 0
    assert " is " not in capsys.readouterr().out
