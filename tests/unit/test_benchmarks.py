import importlib.util
import json
import math
import sys

import numpy as np
import pytest

from sapo.errors import ConfigurationError, DatasetError, EvaluationError, ModelError
from sapo.evaluation import harness, mt_bench
from sapo.evaluation.alpaca_eval import OWN_PROMPT, Instruction, comparison, load_instructions, load_prompt, preference
from sapo.evaluation.harness_data import local_files, require_packages
from sapo.evaluation.length_control import length_adjusted_win_rate
from sapo.evaluation.results import SuiteResult, changes
from sapo.evaluation.targets import find_targets, fingerprint
from sapo.measures.intervals import Estimate
from tests.shared_data import DATA, needs_data
from tests.tiny import write_rows

# ---- MT-Bench ----


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ("Good. Rating: [[8]]", 8),
        ("Rating: [[7.5]] out of [[10]]", 7.5),
        ("Rating: [6]", 6),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ("Rating: 8", None),
        ("[[A]]", None),
        ("", None),
    ],
)
def test_rating_is_read_and_never_guessed(verdict, score):
    assert mt_bench.rating(verdict) == score


@needs_data
def test_published_files_fill_every_place_of_their_prompts():
    files = mt_bench.load_files(DATA / "mt_bench")
    assert len(files.questions) == 80
    with_reference = 0
    for question in files.questions:
        for turn in (1, 2):
            (_, system), (_, user) = mt_bench.grading(files, question, ["{question_2}", "{answer}"], turn).messages
            assert (
                system
                == files.prompts[mt_bench.PROMPTS[(turn, question["category"] in mt_bench.WITH_REFERENCE)]][
                    "system_prompt"
                ]
            )
            # What an answer says is no place to fill.
            assert "{question_2}" in user
            assert question["turns"][turn - 1] in user
            with_reference += "Reference" in user
    assert with_reference == 60
    assert sum(mt_bench.TEMPERATURES[q["category"]] == 0.7 for q in files.questions) == 20


def test_missing_reference_answers_are_noticed(tmp_path):
    (tmp_path / "question.jsonl").write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["a", "b"]}))
    prompts = [{"name": name, "system_prompt": "", "prompt_template": ""} for name in mt_bench.PROMPTS.values()]
    write_rows(tmp_path / "judge_prompts.jsonl", prompts)
    with pytest.raises(DatasetError, match="no reference answer to question 1"):
        mt_bench.load_files(tmp_path)


# ---- AlpacaEval ----


def test_preference_is_the_share_of_the_two_letters():
    verdict = {"top_logprobs": [["m", math.log(0.6)], ["M", math.log(0.2)], ["x", math.log(0.1)]]}
    assert preference(verdict, model_first=True) == pytest.approx(0.75)
    assert preference(verdict, model_first=False) == pytest.approx(0.25)
    assert preference({"top_logprobs": [["x", -0.1]]}, model_first=True) is None
    assert preference({"top_logprobs": None}, model_first=True) is None
    assert preference({"top_logprobs": [["M", -3.0]]}, model_first=True) == 0


def test_answers_cannot_fill_places_of_the_prompt():
    one = Instruction("say {output_2}", "{instruction}", "base", "")
    first, second = (
        comparison(OWN_PROMPT, one, "{output_1}", model_first=order).messages[1][1] for order in (True, False)
    )
    assert first.index("{output_1}") < first.index("{instruction}")
    assert second.index("{instruction}") < second.index("{output_1}")
    assert "say {output_2}" in first


def test_prompt_without_a_place_is_refused(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("{instruction} {output_1}")
    with pytest.raises(ConfigurationError, match="output_2"):
        load_prompt(file)


def test_instructions_without_output_are_refused(tmp_path):
    file = tmp_path / "set.json"
    file.write_text(json.dumps([{"instruction": "a"}]))
    with pytest.raises(DatasetError, match='row 1: has no "output"'):
        load_instructions(file)


def test_length_adjustment_recovers_a_preference_that_length_has_bought():
    rng = np.random.default_rng(0)
    difference = rng.normal(300, 200, size=2000)
    # At equal length the model wins 40 %; longer answers are liked better.
    chance = 1 / (1 + np.exp(-(math.log(0.4 / 0.6) + 1.5 * np.tanh(difference / difference.std(ddof=1)))))
    lengths, baseline = (1000 + difference).round().astype(int).tolist(), [1000] * 2000
    adjusted = length_adjusted_win_rate(chance.tolist(), lengths, baseline)
    assert chance.mean() > 0.6
    assert adjusted.value == pytest.approx(0.4, abs=0.01)
    assert adjusted.low < 0.4 < adjusted.high or adjusted.stderr < 0.01


def test_length_adjustment_of_a_sweep_is_finite():
    adjusted = length_adjusted_win_rate([1.0] * 30, list(range(30)), [10] * 30)
    assert 0.9 < adjusted.value <= 1
    assert math.isfinite(adjusted.stderr)
    assert length_adjusted_win_rate([1.0] * 9, [1] * 9, [1] * 9) is None


# ---- Leaderboard ----


def test_leaderboard_has_the_published_tasks_and_shots():
    shots = {one.name: one.shots for one in harness.LEADERBOARD}
    expected = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}
    assert shots == expected


def records(benchmark, value, tasks=1):
    metrics = dict.fromkeys(benchmark.metrics, value) | {
        f"{name.partition(',')[0]}_stderr,{name.partition(',')[2]}": 0.03 for name in benchmark.metrics
    }
    samples = {name: {"0": 1.0, "1": 0.0} for name in benchmark.metrics}
    return [
        {"task": f"{benchmark.name}_{n}", "metrics": metrics, "samples": samples, "examples": 2} for n in range(tasks)
    ]


def test_average_counts_six_benchmarks_alike_and_mmlu_its_subjects():
    result = SuiteResult()
    for place, one in enumerate(harness.LEADERBOARD):
        harness._add(result, one, records(one, place / 10, tasks=57 if one.name == "mmlu" else 1), seed=0)
    average = harness.average(result, harness.LEADERBOARD)
    assert average.value == pytest.approx(0.25)
    assert result.measures["mmlu"].stderr == pytest.approx(0.03 / math.sqrt(57))
    expected = math.sqrt(5 * 0.03**2 + 0.03**2 / 57) / 6
    assert average.stderr == pytest.approx(expected)
    assert result.measures["gsm8k"].stderr == 0.03


def test_instruction_level_accuracy_has_an_error_over_prompts():
    (benchmark,) = harness.IFEVAL
    found = records(benchmark, 0.5)
    found[0]["samples"]["inst_level_strict_acc,none"] = {"0": [1.0, 0.0], "1": [1.0], "2": [0.0, 0.0, 1.0]}
    result = SuiteResult()
    harness._add(result, benchmark, found, seed=0)
    assert result.measures["instruction strict"].value == 0.5
    assert result.measures["instruction strict"].stderr > 0


def test_local_files_by_split(tmp_path):
    (tmp_path / "only.jsonl").touch()
    (tmp_path / "LICENSE").touch()
    assert local_files(tmp_path, "train") == {"train": tmp_path / "only.jsonl"}
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(DatasetError, match=r"train\.jsonl"):
        local_files(tmp_path, "train")
    assert set(local_files(tmp_path, "test")) == {"only", "test"}


def test_what_a_task_needs_is_named_before_anything_runs(monkeypatch):
    found = importlib.util.find_spec
    missing = lambda name, *rest: None if name in ("lm_eval", "langdetect") else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(
        EvaluationError, match=r'lm_eval, langdetect.* not installed. Run: pip install "sapo-llm\[evaluation\]"'
    ):
        require_packages(["ifeval"])


# ---- Models and results ----


def test_run_folder_without_a_policy_says_so(tmp_path):
    (tmp_path / "sapo_config.yaml").write_text("seed: 0\n")
    with pytest.raises(ModelError, match="has not saved its policy yet"):
        find_targets([str(tmp_path)])


def test_names_of_models_are_unlike_and_a_model_comes_once(tmp_path):
    for name in ("a/model", "b/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    found = find_targets([str(tmp_path / "a/model"), str(tmp_path / "b/model"), str(tmp_path / "a/model")])
    assert [target.name for target in found] == ["model", "model (2)"]
    assert len({target.slug for target in found}) == 2


def test_fingerprint_changes_with_the_weights_and_not_with_the_place(tmp_path):
    prints = []
    for name, weights in (("a", b"1" * 100), ("b", b"1" * 100), ("c", b"2" * 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        prints.append(fingerprint(find_targets([str(tmp_path / name)])[0]))
    assert prints[0] == prints[1] != prints[2]


def test_adapter_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (target,) = find_targets([str(tmp_path)])
    assert target.base == "some/base"


def test_change_is_paired_over_common_examples():
    before = SuiteResult({}, {"score": {"1": 0.0, "2": 1.0, "9": 5.0}})
    after = SuiteResult({"score": Estimate.exact(1.0, 2)}, {"score": {"1": 1.0, "2": 2.0, "3": 7.0}})
    assert changes(after, before)["score"].value == 1.0
    assert changes(after, before)["score"].count == 2


def test_change_of_a_ratio_weighs_examples_and_needs_the_same_tokens():
    before = SuiteResult({}, {"nll": {"1": 10.0, "2": 2.0}}, {"nll": {"1": 9.0, "2": 1.0}})
    after = SuiteResult({}, {"nll": {"1": 1.0, "2": 2.0}}, {"nll": {"1": 9.0, "2": 1.0}})
    assert changes(after, before)["nll"].value == pytest.approx(-0.9)
    other = SuiteResult({}, after.items, {"nll": {"1": 8.0, "2": 1.0}})
    assert changes(other, before) == {}


def test_failing_harness_is_quoted_and_its_noise_is_not(tmp_path, monkeypatch, capfd):
    script = "import sys; sys.stderr.write(sys.argv[1] + 'bar 1\\rbar 2\\nKeyError: no such thing\\n'); sys.exit(3)"
    monkeypatch.setattr(harness.sys, "executable", _python_that_runs(tmp_path, script))
    status, last = harness._run_child(tmp_path / "request.json")
    assert (status, last) == (3, "KeyError: no such thing")
    said = capfd.readouterr().err
    assert "bar 2" in said
    assert "fatal" not in said


def _python_that_runs(folder, script):
    file = folder / "python"
    noise = harness._NOT_AN_ERROR.strip()
    file.write_text(f"#!{sys.executable}\nimport sys\nsys.argv[1:] = [{noise!r} + '\\n']\n{script}\n")
    file.chmod(0o755)
    return str(file)
