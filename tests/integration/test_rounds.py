"""Laws of self-play in rounds (SPIN), and of `sapo generate`."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sapo.commands.main import main
from sapo.data.loading import load_rows
from sapo.runs.checkpoint import read_state
from sapo.runs.layout import LOCK_FILE
from sapo.weights.digest import weights_digest
from tests.runs import metrics_of, refused
from tests.tiny import save_tiny, tiny_llama, tiny_rows, write_rows
from tests.vllm_servers import StandIn

ITERATIONS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def model(base):
    return save_tiny(base / "model")


@pytest.fixture(scope="module")
def data(base):
    return write_rows(base / "train.jsonl", tiny_rows(12))


def pairs_flags(model, data):
    return [
        "--model_name_or_path", str(model), "--dataset_name", str(data), "--max_length", "32",
        "--segment_length", "none", "--use_cpu", "--gradient_checkpointing", "false",
    ]  # fmt: skip


def spin(model, data, out, *more):
    return [
        "train", *pairs_flags(model, data), "--output_dir", str(out), "--ema_decay", "1", "--num_rounds",
        str(ITERATIONS), "--mix_previous_round", "true", "--max_steps", "4", "--save_steps", "2",
        "--learning_rate", "1e-2", "--per_device_train_batch_size", "2", "--logging_steps", "1",
        "--log_pairs_steps", "0", "--report_to", "none", *more,
    ]  # fmt: skip


def tensors(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def outcome(root):
    """All that later rounds depend on: policies, pairs, metrics that are not times."""
    found = {}
    for number in range(ITERATIONS):
        folder = root / f"round-{number}"
        rows = metrics_of(folder)
        kept = ("loss", "rewards/margins", "logps/chosen", "self_play/chosen_logp_change")
        found[number] = (
            pyarrow.parquet.read_table(folder / "pairs.parquet").to_pydict(),
            [[row.get(name) for name in ("step", *kept)] for row in rows if "loss" in row],
        )
    return found


@pytest.fixture(scope="module")
def whole(model, data, base):
    out = base / "whole"
    assert main(spin(model, data, out)) == 0
    return out


def test_opponent_and_reference_of_an_iteration_are_the_policy_of_the_one_before(whole, model, data, tmp_path):
    for number in range(ITERATIONS):
        before = whole / f"round-{number - 1}" if number else model
        folder = whole / f"round-{number}"
        # The reference is the model that the round starts from: a checkpoint tells which, and holds no copy of it.
        facts = read_state(folder / "checkpoint-4")["facts"]
        assert facts["start_model"] == weights_digest(AutoModelForCausalLM.from_pretrained(before))
        assert not (folder / "checkpoint-4" / "reference.safetensors").exists()
        if number == 0:
            # Round k writes with the seeds of epoch k, the command with those of epoch 0.
            file = tmp_path / "again.parquet"
            assert main(["generate", *pairs_flags(before, data), "--output_file", str(file)]) == 0
            ours, theirs = (pyarrow.parquet.read_table(f).to_pydict() for f in (folder / "pairs.parquet", file))
            assert ours == theirs
        assert not same(tensors(folder), dict(tiny_like(before)))
    # A policy written over changes what the next round's pairs would be: they do come from it.
    facts = [json.loads(pyarrow.parquet.read_schema(f).metadata[b"sapo_facts"]) for f in whole.glob("*/pairs.parquet")]
    assert len({fact["model"] for fact in facts}) == ITERATIONS


def tiny_like(folder):
    model = tiny_llama()
    model.load_state_dict(tensors(folder), strict=False)
    return model.named_parameters()


def test_each_iteration_is_an_ordinary_run(whole):
    for number in range(ITERATIONS):
        folder = whole / f"round-{number}"
        present = {file.name for file in folder.iterdir()}
        assert {"model.safetensors", "tokenizer.json", "metrics.jsonl", "recipe.yaml", "pairs.parquet"} <= present
        assert "pairs.parquet.parts" not in present
        # Mixed with the pairs of the round before.
        assert ("datasets:" in (folder / "recipe.yaml").read_text()) == (number > 0)


class Killed(BaseException):
    """As if the process were gone: nothing that handles errors may run into it."""


PLACES = {
    "while pairs are written": ("sapo.training.pair_files._table", 3),
    "between parts and their file": ("sapo.training.pair_files.PairWriter.join", 1),
    "while a policy trains": ("sapo.training.trainer.SAPOTrainer._after_optimizer_step", 7),
    "before a round is marked as done": ("sapo.commands.rounds.asdict", 1),
}


@pytest.mark.parametrize(
    "place",
    [
        "while pairs are written",
        pytest.param("between parts and their file", marks=pytest.mark.slow),
        "while a policy trains",
        pytest.param("before a round is marked as done", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_iterations_equal_uninterrupted_ones(place, whole, model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("sapo.commands.generate.ROWS_A_PART", 5)
    name, at = PLACES[place]
    module, _, function = name.rpartition(".")
    owner = sys.modules.get(module) or getattr(sys.modules[module.rpartition(".")[0]], module.rpartition(".")[2])
    original, count = getattr(owner, function), 0

    def dying(*args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        return original(*args, **kwargs)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, dying)
        with pytest.raises(Killed):
            main(spin(model, data, out))
    assert main(["train", "--config", str(out / "recipe.yaml"), "--resume_from_checkpoint", "true"]) == 0
    assert outcome(out) == outcome(whole)
    for number in range(ITERATIONS):
        assert same(tensors(out / f"round-{number}"), tensors(whole / f"round-{number}"))


@pytest.mark.slow
def test_a_signal_stops_the_loop_and_it_goes_on_to_the_same_end(whole, model, data, tmp_path, start):
    out = tmp_path / "stopped"
    steps = ("--max_steps", "4")
    run = [sys.executable, "-m", "sapo", *spin(model, data, out, *steps)]
    process = start(
        run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (out / "round-1" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=120)
    assert "Traceback" not in shown
    assert main(["train", "--config", str(out / "recipe.yaml"), "--resume_from_checkpoint", "true"]) == 0
    last = f"round-{ITERATIONS - 1}"
    assert same(tensors(out / last), tensors(whole / last))


def test_more_iterations_are_added_to_those_that_are_there(model, data, tmp_path, whole):
    out = tmp_path / "grown"
    assert main(spin(model, data, out, "--num_rounds", "1")) == 0
    assert main(spin(model, data, out, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(out) == outcome(whole)


def test_adapters_go_on_from_iteration_to_iteration(model, data, tmp_path):
    out = tmp_path / "lora"
    lora = ("--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear", "--max_steps", "2")
    assert main(spin(model, data, out, *lora)) == 0
    first = load_file(out / "round-0" / "adapter_model.safetensors")
    reference = load_file(out / "round-1" / "checkpoint-2" / "reference.safetensors")
    assert len(first) == len(reference) > 0
    values = sorted((list(t.shape), t.flatten()[:3].tolist()) for t in first.values())
    assert values == sorted((list(t.shape), t.flatten()[:3].tolist()) for t in reference.values())


def test_written_pairs_are_a_preference_data_set(model, data, tmp_path, tokenizer):
    file = tmp_path / "pairs.parquet"
    assert main(["generate", *pairs_flags(model, data), "--output_file", str(file), "--temperature", "1"]) == 0
    rows = list(load_rows(file))
    given = tiny_rows(12)
    assert [row["prompt"] for row in rows] == [given[row["row"]]["prompt"] for row in rows]
    for row in rows:
        assert row["chosen"] == given[row["row"]]["chosen"]
        assert row["chosen"] != row["rejected"]
        ids = tokenizer(row["rejected"])["input_ids"]
        assert ids == [token for token in row["rejected_ids"] if token not in tokenizer.all_special_ids]
    lines = tmp_path / "pairs.jsonl"
    assert main(["generate", *pairs_flags(model, data), "--output_file", str(lines), "--temperature", "1"]) == 0
    tokens = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [json.loads(line) for line in lines.read_text().splitlines()] == [
        {name: value for name, value in row.items() if name not in tokens} for row in rows
    ]
    assert not list(tmp_path.glob(".pairs*"))
    out = ["--output_dir", str(tmp_path / "dpo"), "--pair_source", "paired", "--max_steps", "1", "--report_to", "none"]
    assert main(["train", *pairs_flags(model, file), *out]) == 0


def test_two_processes_do_not_write_the_same_pairs(model, data, tmp_path, capsys):
    file = tmp_path / "pairs.parquet"
    parts = tmp_path / "pairs.parquet.parts"
    parts.mkdir()
    # As another process holds it: locks of one process do not exclude each other.
    with (parts / LOCK_FILE).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is in use by another process" in refused(
            ["generate", *pairs_flags(model, data), "--output_file", file], capsys
        )
    assert main(["generate", *pairs_flags(model, data), "--output_file", str(file)]) == 0
    assert [one.name for one in tmp_path.iterdir()] == ["pairs.parquet"]


def test_conversations_stay_conversations(tmp_path):
    from sapo.demo.build import MODEL_FOLDER
    from sapo.demo.tasks import TRAIN_ROWS

    data = tmp_path / "talks.jsonl"
    write_rows(data, TRAIN_ROWS[:6])
    file = tmp_path / "pairs.parquet"
    flags = [*pairs_flags(MODEL_FOLDER, data), "--skip_identical", "false", "--temperature", "1.5"]
    assert main(["generate", *flags, "--max_length", "64", "--output_file", str(file)]) == 0
    rows = list(load_rows(file))
    assert [row["prompt"] for row in rows] == [TRAIN_ROWS[row["row"]]["messages"][:1] for row in rows]
    assert [row["chosen"] for row in rows] == [TRAIN_ROWS[row["row"]]["messages"][1:] for row in rows]
    assert all(row["rejected"][0]["role"] == "assistant" for row in rows)


def test_an_opponent_with_its_own_system_message_writes_what_it_would_to_rows_that_have_it(tmp_path):
    from sapo.demo.build import MODEL_FOLDER
    from sapo.demo.tasks import TRAIN_ROWS

    model = shutil.copytree(MODEL_FOLDER, tmp_path / "model")
    template = model / "chat_template.jinja"
    refusal = "{{ raise_exception('the demo model knows the roles user and assistant only') }}"
    assert refusal in template.read_text()
    template.write_text(template.read_text().replace(refusal, "<user>{{ message['content'] }}"))
    bare = [row["messages"] for row in TRAIN_ROWS[:6]]
    told = [[{"role": "system", "content": "shout"}, *messages] for messages in bare]
    found = {}
    for name, talks, more in (
        ("own", bare, ["--opponent_system_prompt", "shout"]),
        ("rows", told, []),
        ("no", bare, []),
    ):
        data = write_rows(tmp_path / f"{name}.jsonl", [{"messages": messages} for messages in talks])
        file = tmp_path / f"{name}.parquet"
        flags = [*pairs_flags(model, data), "--skip_identical", "false", "--temperature", "1.5"]
        assert main(["generate", *flags, *more, "--max_length", "64", "--output_file", str(file)]) == 0
        found[name] = list(load_rows(file))
    rejected = {name: [row["rejected_ids"] for row in rows] for name, rows in found.items()}
    assert rejected["own"] == rejected["rows"] != rejected["no"]
    assert [row["prompt_ids"] for row in found["own"]] == [row["prompt_ids"] for row in found["no"]]
    rounds = ["--num_rounds", "1", "--ema_decay", "1", "--max_steps", "1", "--opponent_system_prompt", "shout"]
    flags = [*pairs_flags(model, tmp_path / "no.jsonl"), "--max_length", "64", "--report_to", "none"]
    assert main(["train", *flags, *rounds, "--output_dir", str(tmp_path / "spin")]) == 0


def test_a_longer_budget_lets_the_opponent_write_more_than_the_data_did(model, data, tmp_path):
    lengths = {}
    for budget in (None, 24):
        file = tmp_path / f"{budget}.parquet"
        more = [] if budget is None else ["--max_new_tokens", str(budget)]
        assert main(["generate", *pairs_flags(model, data), *more, "--output_file", str(file)]) == 0
        rows = list(load_rows(file))
        lengths[budget] = max(len(row["rejected_ids"]) - len(row["chosen_ids"]) for row in rows)
        assert all(len(row["prompt_ids"]) + len(row["rejected_ids"]) <= 32 for row in rows)
    assert lengths[None] == 0 < lengths[24]


def test_what_cannot_be_is_refused_in_one_line(whole, model, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert "Set ema_decay to 1" in refused(spin(model, data, out, "--ema_decay", "0.5"), capsys)
    assert "updated with the opponent" in refused(spin(model, data, out, "--reference", "opponent"), capsys)
    assert "Leave one of the two out" in refused(spin(model, data, out, "--pair_source", "paired"), capsys)
    assert "no round to resume" in refused(spin(model, data, out, "--resume_from_checkpoint", "true"), capsys)
    assert "is not empty" in refused(spin(model, data, whole), capsys)
    undone = tmp_path / "undone"
    shutil.copytree(whole, undone)
    (undone / "round-1" / "round.json").unlink()
    changed = spin(model, data, undone, "--resume_from_checkpoint", "true", "--temperature", "0.9")
    assert "temperature was 0.7, is 0.9" in refused(changed, capsys)
    assert "output_file is missing" in refused(["generate", *pairs_flags(model, data)], capsys)
    taken = whole / "round-0" / "pairs.parquet"
    again = ["generate", *pairs_flags(model, data), "--output_file", str(taken)]
    assert "exists already" in refused(again, capsys)


@pytest.fixture
def server(model):
    server = StandIn(model)
    yield server
    server.stop()


def on(server):
    return ["--generation_backend", "vllm_server", "--vllm_server_url", server.url, "--vllm_server_timeout", "5"]


def test_a_server_writes_the_same_pairs_as_this_process(model, data, server, tmp_path):
    """The one in this test draws as this process does; a real one draws otherwise from the same distribution."""
    files = tmp_path / "here.parquet", tmp_path / "there.parquet"
    for file, more in zip(files, ([], on(server)), strict=True):
        assert main(["generate", *pairs_flags(model, data), "--output_file", str(file), *more]) == 0
    here, there = (pyarrow.parquet.read_table(file).to_pylist() for file in files)
    assert here == there
    assert any(path == "/v1/completions" for path, _ in server.asked)


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param([], id="dense"),
        pytest.param(["--use_peft", "--lora_target_modules", "all-linear"], id="lora", marks=pytest.mark.slow),
    ],
)
def test_rounds_on_a_server_equal_rounds_in_this_process(lora, model, data, server, tmp_path):
    assert main(spin(model, data, tmp_path / "here", *lora)) == 0
    assert main(spin(model, data, tmp_path / "there", *lora, *on(server))) == 0
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    for number in range(ITERATIONS):
        ours, theirs = (load_file(tmp_path / run / f"round-{number}" / name) for run in ("here", "there"))
        assert all(torch.equal(ours[weight], theirs[weight]) for weight in ours)


def test_pairs_are_not_written_by_an_engine_inside_a_training_process(data, tmp_path, model, capsys):
    flags = [*pairs_flags(model, data), "--output_file", str(tmp_path / "pairs.parquet")]
    assert main(["generate", *flags, "--generation_backend", "vllm_colocate"]) == 2
    assert "sapo generate writes here or on vllm_server" in capsys.readouterr().err
