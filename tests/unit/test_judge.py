import json
import time

import pytest

from sapo.errors import ConfigurationError, EvaluationError
from sapo.evaluation.judge import Judge, JudgeOptions, JudgeRequest
from sapo.evaluation.store import FinishedParts
from tests.judge_server import KEY, serving


def requests(count, start=0):
    return [
        JudgeRequest((("system", "Judge."), ("user", f"question {number}")), max_tokens=50, label=f"question {number}")
        for number in range(start, start + count)
    ]


def judge(server, folder, say=lambda line: None, **options):
    settings = {"model": "judge", "base_url": server.url, "first_wait": 0.01, "timeout": 0.7, "workers": 4} | options
    return Judge(JudgeOptions(**settings), FinishedParts(folder / "judge.jsonl"), say)


def rate(body):
    return f"Rating: [[{1 + int(body['messages'][-1]['content'].split()[-1]) % 10}]]"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_verdicts_are_kept_and_not_asked_for_again(tmp_path):
    with serving(rate) as server:
        first = judge(server, tmp_path).ask(requests(6))
        second = judge(server, tmp_path)
        assert second.ask(requests(8)) | first == second.ask(requests(8))
    assert len(server.requests) == 8
    assert set(server.answered.values()) == {1}
    assert second.tally.reused == 6 + 8


def test_no_fault_loses_a_verdict_or_asks_twice_for_one(tmp_path):
    faults = [None, 429, 500, "slow", "broken", "cut", "refuse", "html", "other", 503, 429, "broken", "cut"]
    with serving(rate, lambda number, body: faults[number] if number < len(faults) else None) as server:
        asked = judge(server, tmp_path)
        found = asked.ask(requests(20))
    assert {record["text"] for record in found.values()} == {f"Rating: [[{n}]]" for n in range(1, 11)}
    assert len(found) == 20
    assert len(server.answered) == 20
    assert set(server.answered.values()) == {1}
    assert asked.tally.sent == len(server.requests) == 20 + len(faults) - 1
    assert asked.tally.repeated == len(faults) - 1
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 20


def test_why_a_question_is_asked_again_is_said_once(tmp_path):
    said = []
    with serving(rate, lambda number, body: "slow" if number in (0, 2) else 503 if number == 4 else None) as server:
        judge(server, tmp_path, said.append, workers=1).ask(requests(6))
    assert len(said) == 2
    assert "no answer in 0.7 s" in said[0]
    assert "--judge_timeout" in said[0]
    assert "503" in said[1]


def test_long_judging_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("sapo.evaluation.judge._SECONDS_A_LINE", 0.0)
    said = []
    with serving(rate) as server:
        judge(server, tmp_path, said.append, workers=2).ask(requests(5))
    assert said[-1] == "5 of 5 verdicts"


def test_same_question_twice_is_asked_once(tmp_path):
    with serving(rate) as server:
        found = judge(server, tmp_path).ask(requests(3) * 2)
    assert len(found) == len(server.requests) == 3


def test_budget_is_never_exceeded_and_the_rest_can_follow(tmp_path):
    with serving(rate, lambda number, body: 500 if number in (1, 4) else None) as server:
        short = judge(server, tmp_path, max_calls=7)
        assert any("does not reach" in line for line in short.estimate(requests(12)))
        found = short.ask(requests(12))
        assert len(server.requests) == 7
        assert len(found) < 12
        assert short.tally.left == 12 - len(found)
        rest = judge(server, tmp_path)
        assert len(rest.ask(requests(12))) == 12
    assert set(server.answered.values()) == {1}


def test_budget_of_nothing_asks_nothing(tmp_path):
    with serving(rate) as server:
        assert judge(server, tmp_path, max_calls=0).ask(requests(2)) == {}
    assert server.requests == []


def test_wrong_key_costs_one_call_and_never_shows_the_key(tmp_path):
    with serving(rate, lambda number, body: 401) as server:
        asked = judge(server, tmp_path)
        with pytest.raises(EvaluationError, match="OPENAI_API_KEY") as caught:
            asked.ask(requests(5))
    assert len(server.requests) == 1
    assert KEY not in str(caught.value)
    assert KEY[-4:] not in str(caught.value)
    assert server.keys == [f"Bearer {KEY}"]


def test_unknown_model_is_one_line(tmp_path):
    with serving(rate, lambda number, body: 404) as server:
        asked = judge(server, tmp_path)
        with pytest.raises(EvaluationError, match="--judge_model") as caught:
            asked.ask(requests(5))
    assert len(server.requests) == 1
    assert "\n" not in str(caught.value)


def test_unreachable_judge_is_one_line_and_earlier_verdicts_stay(tmp_path):
    with serving(rate) as server:
        judge(server, tmp_path).ask(requests(3))
    gone = judge(server, tmp_path, retries=1)
    with pytest.raises(EvaluationError, match=r"did not answer in 2 attempts.*3 verdicts are kept") as caught:
        gone.ask(requests(5))
    assert "\n" not in str(caught.value)


def test_judge_that_fails_midway_keeps_what_it_said(tmp_path):
    with serving(rate, lambda number, body: 500 if number >= 4 else None) as server:
        with pytest.raises(EvaluationError, match="4 verdicts are kept"):
            judge(server, tmp_path, retries=1, workers=1).ask(requests(9))
        server.faults = lambda number, body: None
        assert len(judge(server, tmp_path).ask(requests(9))) == 9
    assert set(server.answered.values()) == {1}


def test_question_refused_for_good_does_not_stop_the_others(tmp_path):
    def faults(number, body):
        return 400 if body["messages"][-1]["content"] == "question 3" else None

    with serving(rate, faults) as server:
        asked = judge(server, tmp_path)
        assert len(asked.ask(requests(6))) == 5
    assert list(asked.tally.refused) == ["question 3"]
    assert asked.tally.left == 0
    assert len(server.requests) == 6


def test_line_cut_by_a_crash_is_asked_again(tmp_path):
    with serving(rate) as server:
        judge(server, tmp_path).ask(requests(3))
        file = tmp_path / "judge.jsonl"
        whole = file.read_bytes()
        file.write_bytes(whole[:-20])
        assert len(judge(server, tmp_path).ask(requests(3))) == 3
    assert len(server.requests) == 4
    assert len(file.read_text().splitlines()) == 3


def test_damage_inside_the_file_is_refused(tmp_path):
    (tmp_path / "judge.jsonl").write_text("{\n" + json.dumps({"part": "a"}) + "\n")
    with pytest.raises(EvaluationError, match="line 1"):
        FinishedParts(tmp_path / "judge.jsonl")


def test_rate_is_kept(tmp_path):
    with serving(rate) as server:
        asked = judge(server, tmp_path, calls_per_minute=600)
        began = time.monotonic()
        asked.ask(requests(5))
    assert time.monotonic() - began >= 0.4


def test_retry_after_holds_every_worker_back(tmp_path):
    times = []

    def faults(number, body):
        times.append(time.monotonic())
        return 429 if number == 1 else None

    with serving(rate, faults) as server:
        judge(server, tmp_path, workers=1).ask(requests(3))
    assert times[2] - times[1] >= 0.04


def test_estimate_names_calls_tokens_and_cost_before_any_call(tmp_path):
    with serving(rate) as server:
        asked = judge(server, tmp_path, input_price=10.0, output_price=30.0)
        (line,) = asked.estimate(requests(4))
    assert server.requests == []
    assert "4 calls (0 of 4 verdicts are there already)" in line
    assert "$0.01" in line


def test_no_key_for_the_default_endpoint_is_refused_before_any_call(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        Judge(JudgeOptions(model="judge"), FinishedParts(tmp_path / "judge.jsonl"), lambda line: None)


def test_verdict_by_another_judge_does_not_count(tmp_path):
    with serving(rate) as server:
        judge(server, tmp_path).ask(requests(2))
        judge(server, tmp_path, model="other judge").ask(requests(2))
    assert len(server.requests) == 4
