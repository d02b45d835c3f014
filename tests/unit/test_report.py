import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
import yaml

from sapo.commands.main import main
from sapo.errors import ConfigurationError
from sapo.preference.pairs import Pair
from sapo.preference.segments import Segment
from sapo.report.charts import CHARTS, POINTS, axes, thin
from sapo.report.page import report_data, script_json, write_report
from sapo.report.pair_texts import pack, shorten
from sapo.report.serve import make_server
from sapo.report.summary import sentences, unjudged, warnings
from sapo.runs.metrics import METRICS
from sapo.runs.origin import command_line, commit_of
from sapo.runs.reading import read_run, short_names
from sapo.training.recorder import snapshot_steps, texts_of
from tests.reports import HOSTILE, kept_pair, write_run
from tests.tiny import byte_tokenizer


def titles(folder):
    return [warn.title for warn in warnings(read_run(folder))]


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_snapshots_are_evenly_spaced_and_bounded():
    for max_steps in (1, 3, 24, 1000, 10_007):
        for pairs in (12, 50, 200):
            steps = snapshot_steps(max_steps, pairs)
            assert {0, max_steps} <= steps
            assert 4 * len(steps) + 4 * (len(steps) - 1) <= pairs
    assert snapshot_steps(240, 200) == set(range(0, 241, 10))
    assert snapshot_steps(1000, 0) == set()


def test_the_parts_of_a_response_join_to_its_text():
    tokenizer = byte_tokenizer()
    text = "naïve 🙂 日本語 done"
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    rng = random.Random(1)
    for _ in range(50):
        start, stop = sorted(rng.sample(range(len(ids) + 1), 2))
        pair = Pair(0, 0, ids[:6], ids, ids[::-1], Segment(start, stop), Segment(start, stop))
        found = texts_of(pair, tokenizer)
        assert "".join([found["prompt"], *found["chosen"]]) == tokenizer.decode([*ids[:6], *ids])


def test_thinning_keeps_every_peak():
    rows = [{"step": step, "loss": 100.0 if step == 777 else 1.0} for step in range(1, 5001)]
    series = thin(rows, ["loss", "absent"])
    assert len(series["steps"]) <= POINTS
    assert series["steps"][-1] == 5000
    assert max(series["series"]["loss"]["high"]) == 100.0
    assert "absent" not in series["series"]
    short = thin(rows[:POINTS], ["loss"])
    assert short["series"]["loss"] == {"mean": [1.0] * POINTS}


def test_a_value_that_is_not_finite_is_a_gap_and_one_that_was_not_measured_is_none():
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}]
    assert thin(rows, ["loss"])["series"]["loss"]["mean"] == [None, 1.0]
    rows = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": 1.0}]
    assert thin(rows, ["loss"])["series"]["loss"] == {"mean": [2.0, 1.0], "at": [0, 2]}


def test_each_text_is_kept_once_and_never_cut_in_silence():
    rng = random.Random(0)
    pairs = [kept_pair(step, 0, rng, words=400) for step in range(20)]
    whole = pack(pairs, budget=10**9)
    assert whole["limit"] is None
    assert len(whole["texts"]) == len({t for p in pairs for t in (p["prompt"], *p["chosen"], *p["rejected"])})
    small = pack(pairs, budget=40_000)
    assert sum(map(len, small["texts"])) < 40_000 + 80 * len(small["texts"])
    cut = [text for text in small["texts"] if "characters omitted" in text]
    assert cut
    assert small["limit"] is not None
    text = "a" * 500 + "b" * 500
    kept = shorten(text, 100)
    assert kept.startswith("a" * 50 + "\n[900 characters omitted")
    assert kept.endswith("\n" + "b" * 50)


def test_nothing_in_the_data_can_end_its_block():
    text = script_json({"x": HOSTILE})
    assert not re.search(r"[<>&]", text)
    assert json.loads(text) == {"x": HOSTILE}


def test_a_page_holds_everything_and_asks_for_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    write_report(run / "report.html", [run])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert "default-src 'none'" in page
    assert "connect-src 'none'" in page
    data = data_of(page)
    assert data["runs"][0]["name"] == "run"
    differing = {option["name"]: option["value"] for option in data["runs"][0]["options"] if option["differs"]}
    assert differing["beta"] == 0.25
    assert "temperature" not in differing
    assert not list(run.glob(".*.partial"))


def test_a_long_run_makes_a_small_page(tmp_path):
    rng = random.Random(0)
    pairs = [kept_pair(50 * i, i, rng, words=500) for i in range(200)]
    run = write_run(tmp_path / "run", steps=10_000, pairs=pairs)
    write_report(run / "report.html", [run])
    assert (run / "pairs.jsonl").stat().st_size > 1_000_000
    assert (run / "report.html").stat().st_size < 1_000_000


def test_several_runs_stand_side_by_side(tmp_path):
    runs = [write_run(tmp_path / group / "run") for group in "ab"]
    names = [run["name"] for run in report_data(runs)["runs"]]
    assert names == ["a/run", "b/run"]
    assert short_names([runs[0], runs[0], runs[1]]) == ["a/run", "a/run (2)", "b/run"]
    assert short_names([runs[0].parent, runs[1]]) == ["a", "run"]


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path):
    run = write_run(tmp_path / "run", steps=5)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert [row["step"] for row in read_run(run).train] == [1, 2, 3, 4, 5]


def test_a_run_whose_process_is_gone_broke_off_and_one_that_goes_on_again_has_not_ended(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert read_run(folder).end
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 101, "loss": 0.5}), ""]))
    assert not read_run(folder).end
    with subprocess.Popen(["true"]) as gone:
        pass
    for process, broke in ((os.getpid(), False), (gone.pid, True)):
        (folder / ".lock").write_text(json.dumps({"host": socket.gethostname(), "process": process}))
        assert any(warn.title == "The run broke off" for warn in warnings(read_run(folder))) == broke
        assert ("broke off after step 101" in sentences(read_run(folder))[0]) == broke
    (folder / ".lock").write_text("")
    assert not read_run(folder).broke_off


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigurationError, match=r"contains no metrics\.jsonl"):
        read_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "Use the output folder of a run" in capsys.readouterr().err


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    assert [run["name"] for run in data_of((tmp_path / "both.html").read_text())["runs"]] == ["one", "two"]


def test_iterations_are_overlaid_in_their_order(tmp_path, capsys):
    for number in (0, 2, 10):
        write_run(tmp_path / f"spin/round-{number}", steps=5)
    assert main(["report", str(tmp_path / "spin")]) == 0
    data = data_of((tmp_path / "spin/report.html").read_text())
    assert [run["name"] for run in data["runs"]] == ["round-0", "round-2", "round-10"]


def test_every_chart_has_metrics_and_every_metric_its_chart():
    assert all(chart.metrics for chart in CHARTS)
    assert {metric.curve.chart for metric in METRICS if metric.curve.chart} == {
        chart.title for chart in CHARTS if not chart.local
    }


def test_a_calm_run_gives_no_warning(tmp_path):
    assert titles(write_run(tmp_path / "run")) == []


@pytest.mark.parametrize(
    ("title", "changed"),
    [
        (
            "The chosen responses became less likely",
            {"self_play/chosen_logp_change_per_token": lambda step: -0.002 * step},
        ),
        ("More and more pairs are identical", {"self_play/identical_fraction": lambda step: step / 100}),
        ("The rejected responses become shorter", {"self_play/rejected_length": lambda step: 200.0 - step}),
        ("The rejected responses become longer", {"self_play/rejected_length": lambda step: 200.0 + step}),
        ("The pairs have become easy", {"rewards/accuracies": lambda step: 1.0}),
        ("The loss is not finite", {"loss": lambda step: float("nan") if step > 50 else 1.0}),
        ("Steps without a finite loss or gradient", {"nonfinite_step_fraction": lambda step: float(step == 50)}),
    ],
)
def test_what_goes_wrong_is_warned_of(title, changed, tmp_path):
    assert titles(write_run(tmp_path / "run", **changed)) == [title]


@pytest.mark.parametrize(
    ("steps", "said"), [(0, "Nothing was"), (1, "One log line"), (4, "No problems found in"), (2000, "")]
)
def test_few_pairs_are_not_called_free_of_problems(steps, said, tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=steps))
    assert unjudged(run).find(said) in range(20)
    assert bool(unjudged(run)) == bool(said)
    if steps == 1:
        assert any(text == "The loss was 0.303 at the only log line." for text in sentences(run))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({}, "Set chosen_nll_weight"), ({"chosen_nll_weight": 10.0}, "Raise chosen_nll_weight above 10")],
)
def test_advice_that_was_taken_is_not_given_again(changed, said, tmp_path):
    folder = write_run(tmp_path / "run", **{"self_play/chosen_logp_change_per_token": lambda step: -0.02 * step})
    file = folder / "sapo_config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changed))
    (text,) = [one.text for one in warnings(read_run(folder)) if one.title.startswith("The chosen")]
    assert said in text


def test_an_evaluation_loss_past_its_best_is_warned_of(tmp_path):
    run = write_run(tmp_path / "run", evaluations=[(20, 0.6), (40, 0.5), (60, 0.7)])
    assert titles(run) == ["The evaluation loss is past its minimum"]


def test_the_summary_says_where_the_margin_came_from(tmp_path):
    both = {"rewards/chosen": lambda step: -0.01 * step, "rewards/rejected": lambda step: -0.02 * step}
    text = " ".join(sentences(read_run(write_run(tmp_path / "sank", **both))))
    assert "both became less likely, the rejected responses more so" in text
    assert "some/model (7.24 B parameters) was trained for 100 steps" in text
    text = " ".join(sentences(read_run(write_run(tmp_path / "apart"))))
    assert "the chosen responses became more likely and the rejected ones less likely" in text


@pytest.fixture
def served(tmp_path):
    run = write_run(tmp_path / "run", steps=5)
    with make_server([run], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield run, server.server_address
        server.shutdown()
        thread.join()


def get(address, path="/", **headers):
    request = urllib.request.Request(f"http://{address[0]}:{address[1]}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def test_the_live_page_is_for_this_machine_alone_and_follows_the_run(served):
    run, address = served
    assert address[0] == "127.0.0.1"
    assert "connect-src 'self'" in get(address)
    first = json.loads(get(address, "/data.json"))
    assert json.loads(get(address, "/data.json"))["version"] == first["version"]
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "loss": 0.25}\n')
    second = json.loads(get(address, "/data.json"))
    assert second["version"] > first["version"]
    assert second["runs"][0]["train"]["steps"][-1] == 6


@pytest.mark.parametrize(("path", "host", "status"), [("/", "evil.example", 403), ("/../run.json", None, 404)])
def test_the_live_page_gives_nothing_else_away(path, host, status, served):
    headers = {"Host": host} if host else {}
    with pytest.raises(urllib.error.HTTPError) as error:
        get(served[1], path, **headers)
    assert error.value.code == status
    error.value.close()


def test_a_run_that_is_moved_or_a_browser_that_leaves_does_not_disturb_the_server(served, capfd):
    run, address = served
    run.rename(run.with_name("moved"))
    with pytest.raises(urllib.error.HTTPError) as error:
        get(address, "/data.json")
    assert error.value.code == 503
    assert "no such folder" in error.value.read().decode()
    error.value.close()
    run.with_name("moved").rename(run)
    for _ in range(5):
        with socket.create_connection(address) as browser:
            browser.send(f"GET / HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n\r\n".encode())
            # It is reset at once.
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert json.loads(get(address, "/data.json"))["runs"]
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_is_told(served, tmp_path):
    with pytest.raises(ConfigurationError, match="is in use"):
        make_server([served[0]], served[1][1])


def test_report_and_comparison_start_without_torch(tmp_path):
    runs = [str(write_run(tmp_path / name, steps=20)) for name in ("one", "two")]
    program = (
        "import sys; from sapo.commands.main import main\n"
        f"statuses = [main(['report', {runs[0]!r}]), main(['compare', *{runs!r}])]\n"
        "import sapo.report.serve, sapo.report.svg, sapo.runs.files, sapo.runs.layout, sapo.runs.reading\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'{statuses} {heavy}' if heavy or any(statuses) else 0)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_command_line_is_kept_without_its_secrets():
    typed = ["/opt/env/bin/sapo", "train", "--hub_token", "hf_abc", "--beta", "0.1", "--hub-token=hf_def", "a b"]
    assert command_line(typed) == "sapo train --hub_token ... --beta 0.1 --hub-token=... 'a b'"


def test_the_commit_is_read_without_git(tmp_path):
    assert commit_of(tmp_path) is None
    head = tmp_path / "repo/.git/HEAD"
    head.parent.mkdir(parents=True)
    head.write_text("ref: refs/heads/main\n")
    (head.parent / "packed-refs").write_text("# pack-refs\n" + "a" * 40 + " refs/heads/main\n")
    deep = tmp_path / "repo/a/b"
    deep.mkdir(parents=True)
    assert commit_of(deep) == "a" * 40
    head.write_text("b" * 40 + "\n")
    assert commit_of(deep) == "b" * 40


def test_curves_have_epochs_hours_and_tokens(tmp_path):
    found = axes(read_run(write_run(tmp_path / "run", steps=1000)), points=100)
    assert {name: len(values) for name, values in found.items()} == {"epoch": 100, "hours": 100, "tokens": 100}
    assert found["hours"][-1] == pytest.approx(0.5)
    assert found["tokens"][-1] == pytest.approx(4.0)
