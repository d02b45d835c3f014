import json
import math
import re

import pytest
import yaml
from peft import LoraConfig

from sapo import SAPOConfig, SAPOTrainer
from sapo.commands.catalog import COMMANDS
from sapo.commands.evaluate import options_of
from sapo.commands.main import main
from sapo.commands.parser import parse_command
from sapo.evaluation import local
from sapo.generation.decoding import TransformersGenerator
from tests.judge_server import KEY, serving
from tests.judged import JUDGE_PROMPT, write_baseline, write_mt_bench
from tests.tiny import save_tiny, tiny_llama, tiny_rows, tiny_tokenizer, write_rows

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def save_model(folder, *, seed=0, template=TEMPLATE, **overrides):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return save_tiny(folder, seed, tokenizer=tokenizer, **overrides)


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def held_out(tmp_path):
    return write_rows(tmp_path / "held-out.jsonl", tiny_rows(10, seed=3))


@pytest.fixture
def evaluate(tmp_path, capsys):
    def run(*arguments, output_dir="out", expect=0):
        flags = ["--device", "cpu", "--batch_size", "2", "--output_dir", str(tmp_path / output_dir)]
        status = main(["evaluate", *map(str, arguments), *flags])
        said = capsys.readouterr()
        assert status == expect, said.err
        return said.err if expect else said.out

    return run


def results(tmp_path, suite, output_dir="out"):
    return json.loads((tmp_path / output_dir / "results.json").read_text())["suites"][suite]["models"]


# ---- local ----


def test_local_suite_gives_every_measure_with_its_error(evaluate, model, held_out, tmp_path):
    out = evaluate(model, "--suite", "local", "--dataset_name", held_out, "--max_new_tokens", 16)
    measures = results(tmp_path, "local")["model"]["measures"]
    names = {
        "nll",
        "ended",
        "length_ratio",
        "seq_rep_4",
        "loops",
        "distinct_2",
        "ngram_distance_1",
        "prefers_data_to_own",
    }
    assert names <= measures.keys()
    assert all(measures[name]["stderr"] is not None for name in names)
    # An untrained model knows nothing of 63 tokens.
    assert measures["nll"]["value"] == pytest.approx(math.log(63), abs=0.3)
    assert "±" in out


def test_interrupted_evaluation_continues_and_gives_the_same(evaluate, model, held_out, tmp_path, monkeypatch):
    command = (model, "--suite", "local", "--dataset_name", held_out, "--max_new_tokens", 8)
    assert re.search(r"4 of 10 rows, \d+ s left", evaluate(*command, output_dir="whole"))
    calls = []
    generate = TransformersGenerator.generate

    def counted(self, contexts, *rest):
        calls.append(len(contexts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, contexts, *rest)

    monkeypatch.setattr(TransformersGenerator, "generate", counted)
    evaluate(*command, expect=130)
    evaluate(*command)
    assert calls == [4, 4, 4, 2]
    assert results(tmp_path, "local") == results(tmp_path, "local", "whole")
    evaluate(*command)
    assert len(calls) == 4


def test_run_folder_shows_policy_and_opponent_beside_the_start(make_trainer, evaluate, model, held_out, tmp_path):
    trainer = make_trainer("run", max_steps=3, model=tiny_llama())
    trainer.train()
    trainer.save_model()
    trainer.run_folder.write_recipe({"model_name_or_path": str(model)})
    out = evaluate(tmp_path / "run", "--suite", "local", "--dataset_name", held_out, "--max_new_tokens", 8)
    found = results(tmp_path, "local")
    assert list(found) == ["start", "run policy", "run opponent"]
    assert found["run policy"]["measures"]["nll"]["value"] != found["start"]["measures"]["nll"]["value"]
    assert "prefers_data_to_opponent" in found["run policy"]["measures"]
    assert "prefers_data_to_opponent" not in found["run opponent"]["measures"]
    assert "ended" in found["run policy"]["change_from_start"]
    assert "change" in out


def test_run_of_an_adapter_is_measured_over_its_base(evaluate, model, held_out, tmp_path):
    config = SAPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        max_length=32,
        segment_length=4,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = SAPOTrainer(str(model), config, tiny_rows(), peft_config=adapter)
    trainer.train()
    trainer.save_model()
    evaluate(tmp_path / "run", "--start", model, "--suite", "local", "--dataset_name", held_out, "--max_new_tokens", 4)
    found = results(tmp_path, "local")
    assert [found[name]["base"] for name in ("run policy", "run opponent")] == [str(model), str(model)]
    nll = {name: one["measures"]["nll"]["value"] for name, one in found.items()}
    assert len(set(nll.values())) == 3


def test_other_weights_are_another_part(evaluate, model, held_out, tmp_path):
    command = (model, "--suite", "local", "--dataset_name", held_out, "--max_new_tokens", 8)
    evaluate(*command)
    before = results(tmp_path, "local")["model"]["measures"]["nll"]["value"]
    save_model(model, seed=1)
    evaluate(*command)
    assert results(tmp_path, "local")["model"]["measures"]["nll"]["value"] != before


def test_held_out_rows_are_spread_over_the_file(evaluate, model, held_out, tmp_path):
    evaluate(model, "--suite", "local", "--dataset_name", held_out, "--limit", 5, "--max_new_tokens", 4)
    lines = next((tmp_path / "out" / "local").glob("*.jsonl")).read_text().splitlines()
    assert [json.loads(line)["measured"]["row"] for line in lines] == [0, 2, 4, 6, 8]
    assert local.ROWS == 200


# ---- Task files ----


def test_task_file_verifies_what_the_model_says(evaluate, model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    (tmp_path / "verify_words.py").write_text(
        "def any_word(response, row):\n    return bool(response) and 'w' in response\n"
    )
    tasks = [
        {"name": "words", "data": "rows.jsonl", "verifier": "verify_words:any_word", "max_new_tokens": 4},
        {"name": "never", "data": "rows.jsonl", "verifier": "regex", "pattern": "zebra", "max_new_tokens": 4},
    ]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    evaluate(model, "--suite", tmp_path / "mine.yaml")
    measures = results(tmp_path, "mine")["model"]["measures"]
    assert measures["words"]["value"] == 1
    assert measures["never"]["value"] == 0
    lines = next((tmp_path / "out" / "tasks").glob("*.jsonl")).read_text().splitlines()
    # Both tasks ask the same of the model.
    assert len(lines) == 2


# ---- Judged ----


@pytest.fixture
def mt_bench(tmp_path):
    return write_mt_bench(tmp_path / "mt_bench")


def with_reference_better(body):
    text = body["messages"][-1]["content"]
    return "Rating: [[9]]" if "R w5" in text else "Rating: [[4]]"


def test_mt_bench_grades_two_turns_with_references_through_every_fault(
    evaluate, model, mt_bench, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    faults = [None, 500, "broken", "cut"]
    with serving(with_reference_better, lambda n, body: faults[n] if n < len(faults) else None) as server:
        command = (model, "--suite", "mt_bench", "--mt_bench_dir", mt_bench, "--max_new_tokens", 6)
        judge = ("--judge_model", "gpt-x", "--judge_base_url", server.url)
        out = evaluate(*command, *judge)
        evaluate(*command, *judge)
    assert "12 calls (0 of 12 verdicts are there already)" in out
    assert set(server.answered.values()) == {1}
    assert len(server.requests) == 12 + len(faults) - 1
    measures = results(tmp_path, "mt_bench")["model"]["measures"]
    assert measures["math"]["value"] == measures["coding"]["value"] == 9
    assert measures["writing"]["value"] == 4
    assert measures["score"]["value"] == pytest.approx((3 * 9 + 3 * 4) / 6)
    assert measures["turn 1"]["count"] == 6
    (answers,) = (tmp_path / "out" / "mt_bench" / "model_answer").glob("*.jsonl")
    answer = json.loads(answers.read_text().splitlines()[0])
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= answer.keys()
    assert len(answer["choices"][0]["turns"]) == 2
    (verdicts,) = (tmp_path / "out" / "mt_bench" / "model_judgment").glob("*.jsonl")
    lines = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert {(line["question_id"], line["turn"]) for line in lines} == {(q, t) for q in range(81, 87) for t in (1, 2)}
    everything = "".join(file.read_text() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert KEY not in everything + out


def test_unparsable_verdicts_are_counted_and_not_guessed(evaluate, model, mt_bench, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def reply(body):
        return "I would rather not." if "R w5" in body["messages"][-1]["content"] else "[[7]]"

    with serving(reply) as server:
        out = evaluate(
            *(model, "--suite", "mt_bench", "--mt_bench_dir", mt_bench, "--max_new_tokens", 6),
            *("--judge_model", "gpt-x", "--judge_base_url", server.url),
        )
    measures = results(tmp_path, "mt_bench")["model"]["measures"]
    assert measures["score"]["value"] == 7
    assert measures["score"]["count"] == 3
    assert "6 of 12 verdicts state no rating" in out


def test_budget_leaves_a_note_and_the_next_command_completes(evaluate, model, mt_bench, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(with_reference_better) as server:
        command = (model, "--suite", "mt_bench", "--mt_bench_dir", mt_bench, "--max_new_tokens", 6)
        judge = ("--judge_model", "gpt-x", "--judge_base_url", server.url)
        assert "7 verdicts are missing" in evaluate(*command, *judge, "--max_judge_calls", 5)
        assert len(server.requests) == 5
        assert "verdicts are missing" not in evaluate(*command, *judge)
    assert len(server.requests) == 12


def test_budget_is_of_the_command_and_not_of_each_model(evaluate, model, mt_bench, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    other = save_model(tmp_path / "other", seed=1)
    with serving(with_reference_better) as server:
        out = evaluate(
            *(model, other, "--suite", "mt_bench", "--mt_bench_dir", mt_bench, "--max_new_tokens", 6),
            *("--judge_model", "gpt-x", "--judge_base_url", server.url, "--max_judge_calls", 15),
        )
    assert len(server.requests) == 15
    assert "other: 9 verdicts are missing" in out


@pytest.fixture
def instructions(tmp_path):
    return write_baseline(tmp_path / "baseline.json")


def first_is_better(body):
    """A judge that always likes the first answer: all position, no judgement."""
    return "m", {"m": math.log(0.9), "M": math.log(0.1)}


def test_position_swap_cancels_a_judge_that_looks_at_positions_alone(
    evaluate, model, instructions, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(first_is_better) as server:
        out = evaluate(
            *(model, "--suite", "alpaca_eval", "--alpaca_eval_data", instructions, "--max_new_tokens", 6),
            *("--judge_model", "gpt-x", "--judge_base_url", server.url),
        )
    assert len(server.requests) == 24
    assert {request["top_logprobs"] for request in server.requests} == {5}
    measures = results(tmp_path, "alpaca_eval")["model"]["measures"]
    assert measures["win_rate"]["value"] == pytest.approx(0.5)
    assert measures["length_adjusted_win_rate"]["value"] == pytest.approx(0.5)
    assert "length_controlled_win_rate" not in measures
    assert "is not AlpacaEval's length-controlled win rate" in " ".join(out.split())
    (annotations,) = (tmp_path / "out" / "alpaca_eval" / "annotations").glob("*.json")
    assert {row["preference"] for row in json.loads(annotations.read_text())} == {1.5}


def test_published_prompt_form_and_one_order(evaluate, model, instructions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(JUDGE_PROMPT)
    with serving(first_is_better) as server:
        evaluate(
            *(model, "--suite", "alpaca_eval", "--alpaca_eval_data", instructions, "--max_new_tokens", 6),
            *("--judge_model", "gpt-x", "--judge_base_url", server.url),
            *("--judge_prompt", prompt, "--judge_orders", "one"),
        )
    assert len(server.requests) == 12
    assert server.requests[0]["messages"][0] == {"role": "system", "content": "Rank."}
    wins = results(tmp_path, "alpaca_eval")["model"]["measures"]["win_rate"]
    assert 0.1 <= wins["value"] <= 0.9


# ---- What is wrong is said in one line ----


def test_results_of_another_kind_are_not_overwritten(evaluate, model, held_out, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    command = (model, "--suite", "local", "--dataset_name", held_out, "--max_new_tokens", 4)
    one_line(evaluate(*command, expect=2), "is not a results file")
    assert (tmp_path / "out" / "results.json").read_text() == "mine"


def one_line(error, *parts):
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for part in parts:
        assert part in error


def test_unknown_suite(evaluate, model):
    one_line(evaluate(model, "--suite", "leaderbord", expect=2), "leaderboard, ifeval, mt_bench")


def test_no_held_out_rows(evaluate, model):
    one_line(evaluate(model, "--suite", "local", expect=2), "--dataset_name")


def test_no_such_model(evaluate, held_out, tmp_path):
    one_line(evaluate(tmp_path / "none", "--suite", "local", "--dataset_name", held_out, expect=2), "no such model")


@pytest.mark.parametrize("suite", ["local", "mt_bench"])
def test_tokens_beyond_the_embeddings_are_one_line(suite, evaluate, model, held_out, mt_bench, capsys):
    tiny_llama(vocab_size=8).save_pretrained(model)
    capsys.readouterr()
    more = ("--dataset_name", held_out)
    if suite == "mt_bench":
        more = ("--mt_bench_dir", mt_bench, "--judge_model", "j", "--judge_base_url", "http://127.0.0.1:9/v1")
    one_line(evaluate(model, "--suite", suite, *more, expect=2), "8 embeddings")


def test_no_judge(evaluate, model, mt_bench):
    one_line(evaluate(model, "--suite", "mt_bench", "--mt_bench_dir", mt_bench, expect=2), "--judge_model")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--judge_base_url", "localhost:8000"], "http://"),
        (["--limit", "0"], "--limit: 0 is not valid; must be a whole number, 1 or more"),
        (["--judge_timeout", "0"], "above 0"),
        (["--jugde_model", "j"], "--jugde_model"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--chat_template_path", "none.jinja"], "no such file"),
        (["--chat_template", "chat.jinja"], "--chat_template is called --chat_template_path now"),
    ],
)
def test_wrong_flags(evaluate, model, held_out, flags, says):
    one_line(evaluate(model, "--suite", "local", "--dataset_name", held_out, *flags, expect=2), says)


def test_model_without_chat_template(evaluate, mt_bench, tmp_path):
    bare = save_model(tmp_path / "bare", template=None)
    url = ("--judge_model", "j", "--judge_base_url", "http://127.0.0.1:9/v1")
    error = evaluate(bare, "--suite", "mt_bench", "--mt_bench_dir", mt_bench, *url, expect=2)
    one_line(error, "no chat template", "--chat_template_path")


def test_unreachable_judge_keeps_the_answers(evaluate, model, mt_bench, tmp_path):
    url = ("--judge_model", "j", "--judge_base_url", "http://127.0.0.1:9/v1", "--judge_retries", 0)
    command = (model, "--suite", "mt_bench", "--mt_bench_dir", mt_bench, "--max_new_tokens", 4)
    one_line(evaluate(*command, *url, expect=2), "did not answer", "same command continues")
    (answers,) = (tmp_path / "out" / "mt_bench" / "model_answer").glob("*.jsonl")
    assert len(answers.read_text().splitlines()) == 6


def test_nothing_but_empty_answers_are_not_judged(evaluate, mt_bench, tmp_path, monkeypatch):
    silent = save_model(tmp_path / "silent")
    ended = lambda self, contexts, budgets, seeds: [[1] for _ in contexts]  # noqa: E731
    monkeypatch.setattr(TransformersGenerator, "generate", ended)
    with serving(with_reference_better) as server:
        error = evaluate(
            *(silent, "--suite", "mt_bench", "--mt_bench_dir", mt_bench),
            *("--judge_model", "j", "--judge_base_url", server.url),
            expect=2,
        )
    one_line(error, "all 12 answers are empty", "kept in")
    assert server.requests == []


def output_dir(arguments):
    return options_of(parse_command(COMMANDS["evaluate"], arguments)).output_dir


def test_a_run_measured_alone_keeps_its_results_where_its_card_looks(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "sapo_config.yaml").write_text("{}")
    suite = ["--suite", "local"]
    assert output_dir([str(run), *suite]) == str(run / "evaluation")
    assert output_dir([str(run), "other", *suite]) == "evaluation"
    assert output_dir(["model", *suite]) == "evaluation"
    assert output_dir([str(run), "--output_dir", "here", *suite]) == "here"


# ---- retention ----


def test_retention_suite_compares_with_the_start(evaluate, model, held_out, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    shown = evaluate(other, "--suite", "retention", "--start", model, "--dataset_name", held_out, "--limit", 5,
                     "--max_new_tokens", 8, "--max_length", 60)  # fmt: skip
    assert "kl_general" in shown
    assert [shown.count(f" {kind} prompts, once for this model") for kind in ("general", "task")] == [1, 1]
    found = results(tmp_path, "retention")
    start, changed = found["start"]["measures"], found["other"]["measures"]
    assert start["kl_general"]["value"] == start["kl_task"]["value"] == 0
    for name in ("kl_general", "kl_task"):
        one = changed[name]
        assert 0 < one["low"] < one["value"] < one["high"]
    assert {"loops", "ended", "length", "nll_general", "nll_task"} <= set(changed)
    assert found["other"]["change_from_start"]["kl_general"]["value"] == pytest.approx(changed["kl_general"]["value"])


def test_finished_retention_is_not_measured_again_and_batches_change_nothing(evaluate, model, tmp_path, monkeypatch):
    other = save_model(tmp_path / "other", seed=1)
    flags = [other, "--suite", "retention", "--start", model, "--limit", 4, "--max_new_tokens", 8, "--max_length", 60]
    evaluate(*flags)
    first = results(tmp_path, "retention")["other"]["measures"]
    evaluate(*flags, "--batch_size", 4, output_dir="again")
    again = results(tmp_path, "retention", "again")["other"]["measures"]
    assert again["kl_general"]["value"] == pytest.approx(first["kl_general"]["value"], rel=1e-4)
    monkeypatch.setattr("sapo.evaluation.retention.score_forced", None)
    evaluate(*flags)
    assert results(tmp_path, "retention")["other"]["measures"] == first


def test_retention_without_a_start_or_with_another_vocabulary_is_refused(evaluate, model, tmp_path):
    assert "Name it with --start" in evaluate(model, "--suite", "retention", expect=2)
    other = save_model(tmp_path / "other", vocab_size=70)
    flags = ["--suite", "retention", "--start", model, "--limit", 2, "--max_new_tokens", 4, "--max_length", 60]
    assert "vocabulary of 70 tokens" in evaluate(other, *flags, expect=2)


def test_retention_takes_prompts_of_ones_own(evaluate, model, held_out, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    evaluate(other, "--suite", "retention", "--start", model, "--prompts", held_out, "--max_new_tokens", 4)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["retention"]
    assert found["settings"]["prompts"] == str(held_out)
    assert found["models"]["other"]["measures"]["kl_general"]["count"] == 10


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_adapter_is_one_line(content, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    command = ["evaluate", str(tmp_path / "adapter"), "--suite", "local", "--dataset_name", "x.jsonl"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ModelError")
    assert "adapter_config.json" in line
