import json

import pytest

from sapo.commands.main import main
from sapo.report.page import report_data
from sapo.report.summary import warnings
from sapo.runs.gain_curves import common_gains, distance_at, gain_curve
from sapo.runs.metrics import RETENTION_GENERAL
from sapo.runs.reading import read_run
from tests.tiny import write_rows


def run_of(folder, points, limit=0.1):
    folder.mkdir()
    rows = [{"step": 0, "eval_retention/gain": 0.0, "eval_retention/kl_general": 0.0, "eval_retention/kl_task": 0.0}]
    for step, gain, kl in points:
        rows.append({"step": step, "loss": 1.0})
        rows.append(
            {
                "step": step,
                "eval_retention/gain": gain,
                "eval_retention/kl_general": kl,
                "eval_retention/kl_task": 2 * kl,
            }
        )
    write_rows(folder / "metrics.jsonl", rows)
    (folder / "sapo_config.yaml").write_text(f"retention_kl_limit: {limit}\n")
    return folder


def test_the_start_is_the_origin_of_every_curve(tmp_path):
    curve = gain_curve(read_run(run_of(tmp_path / "a", [(10, 0.1, 0.02), (20, 0.2, 0.06)])), RETENTION_GENERAL)
    assert curve == [(0, 0.0, 0.0), (10, 0.1, 0.02), (20, 0.2, 0.06)]


def test_distance_at_a_gain_lies_on_the_line_between_two_evaluations():
    curve = [(0, 0.0, 0.0), (10, 0.1, 0.02), (20, 0.2, 0.06), (30, 0.15, 0.2), (40, 0.3, 0.3)]
    assert distance_at(curve, 0.05) == pytest.approx(0.01)
    assert distance_at(curve, 0.15) == pytest.approx(0.04)  # where it is first reached, not later
    assert distance_at(curve, 0.2) == pytest.approx(0.06)
    assert distance_at(curve, 0.0) == 0.0
    assert distance_at(curve, 0.31) is None


def test_runs_are_compared_at_gains_that_all_of_them_reach():
    near, far = [(0, 0.0, 0.0), (1, 0.2, 0.1)], [(0, 0.0, 0.0), (1, 0.4, 0.1)]
    assert common_gains([near, far]) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert common_gains([near, [(0, 0.0, 0.0), (1, -0.1, 0.1)]]) == []
    assert common_gains([]) == []


def test_compare_shows_the_distance_at_equal_gain(tmp_path, capsys):
    run_of(tmp_path / "a", [(10, 0.1, 0.02), (20, 0.2, 0.06)])
    run_of(tmp_path / "b", [(10, 0.2, 0.02), (20, 0.4, 0.06)])
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(tmp_path / "c.json")]) == 0
    shown = capsys.readouterr().out
    assert "retention/kl_general, nats per token, at equal gain" in " ".join(shown.split())
    line = next(line for line in shown.splitlines() if "0.2000" in line and "0.4000" not in line)
    assert "0.06" in line
    assert "0.02" in line
    stored = json.loads((tmp_path / "c.json").read_text())
    assert stored["b"]["gain_curves"]["retention/kl_task"][-1] == [20, 0.4, 0.12]


def test_runs_without_the_measure_have_no_such_table(tmp_path, capsys):
    run_of(tmp_path / "a", [])
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert main(["compare", str(tmp_path / "a")]) == 0
    assert "equal gain" not in capsys.readouterr().out


def test_the_report_has_the_curve_and_warns_beyond_the_limit(tmp_path):
    folder = run_of(tmp_path / "a", [(10, 0.1, 0.02), (20, 0.2, 0.16)])
    (run,) = report_data([folder])["runs"]
    assert run["gain"]["general prompts"][-1] == (20, 0.2, 0.16)
    titles = [warn.title for warn in warnings(read_run(folder))]
    assert titles == ["The policy has moved far from its start"]
    calm = run_of(tmp_path / "b", [(10, 0.1, 0.02)])
    assert warnings(read_run(calm)) == []
