"""What a run has made is on the disk when it ends, whatever fails; what would fail then is refused at the start."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from sapo.commands.main import main
from sapo.errors import CheckpointError, ConfigurationError, TrainingError
from sapo.runs import lock
from sapo.runs.checkpoint import verify
from sapo.runs.lock import locked
from tests.integration.test_cli import command, data, model, refused  # noqa: F401 - fixtures
from tests.tiny import tiny_llama, tiny_rows

STEPS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


# ---- Saving ----


@pytest.mark.parametrize(
    "flags",
    [{"temperature": 0.6, "top_p": 0.9}, {"do_sample": False, "min_p": 0.1}, {"early_stopping": True}, {"top_k": 7}],
)
def test_a_generation_config_that_cannot_be_saved_is_repaired_and_generates_alike(flags, make_trainer):
    base = tiny_llama()
    base.generation_config = GenerationConfig(eos_token_id=1, max_length=20, pad_token_id=5)
    for name, value in flags.items():
        setattr(base.generation_config, name, value)
    prompt = torch.tensor([[5, 6, 7]])
    before = base.generate(prompt)
    trainer = make_trainer(model=base, max_steps=1, learning_rate=0.0)
    trainer.train()
    trainer.save_model()
    for folder in (trainer.run_folder.path, trainer.run_folder.path / "opponent"):
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert saved.generation_config.eos_token_id == 1
        assert torch.equal(saved.generate(prompt), before)


def test_valid_generation_settings_are_kept(make_trainer):
    base = tiny_llama()
    base.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=1)
    trainer = make_trainer(model=base, max_steps=1)
    trainer.train()
    trainer.save_model()
    saved = GenerationConfig.from_pretrained(trainer.run_folder.path)
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_the_first_step(make_trainer, monkeypatch, tokenizer):
    trainer = make_trainer()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *given, **more: {}["vocabulary"])
    with pytest.raises(ValueError, match="could not be saved at the end of the run"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_disk_too_small_for_the_models_is_refused_before_the_first_step(make_trainer, monkeypatch):
    trainer = make_trainer(**STEPS, eval_rows=tiny_rows(4))
    usage = shutil.disk_usage(".")
    # Policy and opponent, then a checkpoint with policy, opponent and reference: 31 KB each.
    monkeypatch.setattr("sapo.training.rehearsal.shutil.disk_usage", lambda folder: usage._replace(free=140_000))
    with pytest.raises(ConfigurationError, match="are free there"):
        trainer.train()
    assert trainer.state.global_step == 0
    monkeypatch.setattr("sapo.training.rehearsal.shutil.disk_usage", lambda folder: usage._replace(free=170_000))
    make_trainer("other", max_steps=1).train()


def test_what_fails_while_saving_leaves_the_weights_and_says_where(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    trainer.train()

    def broken(*given, **more):
        raise TypeError("of the model's own")

    monkeypatch.setattr(type(trainer.policy()), "save_pretrained", broken)
    with pytest.raises(CheckpointError, match=r"rescued_weights\.safetensors.*opponent cannot be saved"):
        trainer.save_model()
    saved = load_file(trainer.run_folder.path / "rescued_weights.safetensors")
    own = dict(trainer.policy().named_parameters())
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in own.items())


def test_an_opponent_that_cannot_be_saved_does_not_cost_the_policy(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    trainer.train()

    def broken(folder):
        raise TypeError("of the opponent")

    monkeypatch.setattr(trainer.opponent, "save_pretrained", broken)
    with pytest.raises(CheckpointError, match="the opponent cannot be saved"):
        trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(trainer.run_folder.path)
    for one, other in zip(saved.parameters(), trainer.policy().parameters(), strict=True):
        assert torch.equal(one, other)
    assert not (trainer.run_folder.path / ".saving").exists()


def test_a_report_and_a_card_that_fail_cost_neither_models_nor_each_other(model, data, tmp_path, capsys, monkeypatch):  # noqa: F811
    out = tmp_path / "run"

    def broken(*given):
        raise ZeroDivisionError("of the page")

    monkeypatch.setattr("sapo.training.recorder.write_report", broken)
    monkeypatch.setattr("sapo.commands.train.write_card", broken)
    assert main(command(model, data, out)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("TrainingError")]
    assert "report.html (ZeroDivisionError: of the page) and README.md" in line
    assert {"model.safetensors", "opponent", "recipe.yaml"} <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_of_a_run_have_the_permissions_of_the_umask(umask, make_trainer):
    before = os.umask(umask)
    try:
        trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(before)
    files = list(trainer.run_folder.path.rglob("*.safetensors"))
    assert {"model.safetensors", "opponent.safetensors"} <= {file.name for file in files}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


# ---- The best checkpoint ----


def test_the_best_checkpoint_puts_its_opponent_back_and_the_card_names_its_step(model, data, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    options = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--learning_rate", "0.1"]
    options += ["--eval_dataset_name", str(data), "--load_best_model_at_end", "--metric_for_best_model", "logps/chosen"]
    options += ["--greater_is_better", "false"]
    assert main(command(model, data, out, *options)) == 0
    shown = capsys.readouterr().out
    step = int(re.search(r"Saved are the models of step (\d+), the best by logps/chosen", shown)[1])
    assert f"those of step {step}, the best by logps/chosen" in (out / "README.md").read_text()
    best = load_file(out / f"checkpoint-{step}" / "opponent.safetensors")
    saved = load_file(out / "opponent" / "model.safetensors")
    assert all(torch.equal(weight, saved[name]) for name, weight in best.items())
    policy = load_file(out / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(weight, load_file(out / "model.safetensors")[name]) for name, weight in policy.items())


@pytest.mark.parametrize("name", ["accuracy", "eval_acuracy", "eval_local/loss"])
def test_a_best_metric_that_nothing_measures_is_refused_before_the_first_step(name, make_trainer):
    trainer = make_trainer(**STEPS, eval_rows=tiny_rows(4), metric_for_best_model=name, load_best_model_at_end=True)
    with pytest.raises(ConfigurationError, match=r"It measures loss, rewards/chosen"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- Runs of no steps ----


def test_runs_of_no_steps_and_options_without_effect_are_refused(model, data, tmp_path, capsys):  # noqa: F811
    def said(*more):
        return refused(command(model, data, tmp_path / "run", *more), capsys)

    assert "24 rows, and a batch over all processes has 64" in said(
        "--dataloader_drop_last", "--per_device_train_batch_size", "64"
    )
    assert "max_steps=0" in said("--max_steps", "0")
    assert "num_train_epochs=0" in said("--max_steps", "-1", "--num_train_epochs", "0")
    assert "lora_r=4 has no effect without use_peft. Add --use_peft" in said("--lora_r", "4")
    assert "hub_revision=x has no effect without push_to_hub" in said("--hub_revision", "x")
    assert "eval_delay=2" in said("--eval_delay", "2")
    assert "greater_is_better=false" in said("--greater_is_better", "false")
    assert "eval_local_size=4 has no effect without eval_local" in said("--eval_local_size", "4")
    assert "load_best_model_at_end=true needs evaluations" in said("--load_best_model_at_end")
    assert "mix_previous_round requires rounds" in said("--mix_previous_round")
    assert "cannot be resumed" in said("--save_only_model")


# ---- The lock ----


def test_a_second_process_is_told_whose_folder_it_is(model, data, tmp_path, capsys, monkeypatch, start):  # noqa: F811
    out = tmp_path / "run"
    said = []
    monkeypatch.setattr(lock.logger, "warning", said.append)
    holder = (
        "import sys, time; from pathlib import Path; from sapo.runs.lock import locked\n"
        f"with locked(Path({str(out)!r})): print('held', flush=True); time.sleep(600)"
    )
    process = start([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    for more in ([], ["--resume_from_checkpoint", "auto"], ["--overwrite_output_dir"]):
        message = refused(command(model, data, out, *more), capsys)
        assert f"in use by process {process.pid} on " in message
    assert [file.name for file in out.iterdir()] == [".lock"]
    process.kill()
    process.wait()
    # The owner is dead: its lock is broken, and that is said.
    with locked(out):
        pass
    assert [f"broke the lock of process {process.pid}" in line for line in said] == [True]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("age", "alive"), [(10, True), (100_000, False)])
def test_an_owner_on_another_host_counts_by_its_last_sign_of_life(age, alive, tmp_path):
    file = tmp_path / ".lock"
    file.write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "yesterday"}))
    os.utime(file, (time.time() - age,) * 2)
    if alive:
        with pytest.raises(ConfigurationError, match=rf"process 7 on elsewhere.*remove {file}"), locked(tmp_path):
            pass
        assert file.is_file()
    else:
        with locked(tmp_path):
            assert json.loads(file.read_text())["process"] == os.getpid()
        assert not file.exists()


class At(TrainerCallback):
    """Does something after step 2, and asks for nothing."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.act()


def moved(path):
    path.rename(path.with_name("moved"))


def taken_over(path):
    moved(path)
    path.mkdir()
    (path / ".lock").write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "now"}))


@pytest.mark.parametrize("act", [moved, shutil.rmtree, taken_over], ids=["moved", "gone", "taken"])
def test_a_run_whose_folder_is_lost_saves_beside_it_and_says_so(act, make_trainer, tmp_path):
    trainer, path = make_trainer(), tmp_path / "run"
    trainer.add_callback(At(lambda: act(path)))
    with pytest.raises(TrainingError, match=r"run was moved, .* Step 3 is saved.* \S+/run\.rescued/") as said:
        trainer.train()
    saved = Path(re.search(r"(\S+checkpoint-3)", str(said.value))[1])
    verify(saved)
    assert not path.exists() or [file.name for file in path.iterdir()] == [".lock"]
    again = make_trainer("again")
    again.train(resume_from_checkpoint=str(saved))
    assert again.state.global_step == 6


def test_a_lock_that_was_removed_by_hand_ends_no_run(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.add_callback(At((tmp_path / "run" / ".lock").unlink))
    assert trainer.train().global_step == 6


def test_a_copy_of_a_running_run_is_no_run_of_its_owner(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(lock.logger, "warning", said.append)
    with locked(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with locked(tmp_path / "copy"):
            pass
    assert [line.endswith("this folder is a copy.") for line in said] == [True]


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_write_owner", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_is_held_until_the_last_holder_of_a_process_lets_go(tmp_path):
    with locked(tmp_path):
        with locked(tmp_path):
            pass
        assert (tmp_path / ".lock").is_file()
    assert not (tmp_path / ".lock").exists()
    assert lock._held == {}


def test_steps_that_two_runs_have_written_are_there_once_after_a_resume(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(**options, eval_rows=tiny_rows(4))
    trainer.train()
    file = trainer.run_folder.path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("".join(line + "\n" for line in [*lines[:3], *lines]))
    make_trainer(**options, eval_rows=tiny_rows(4)).train(resume_from_checkpoint=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for kind in ("loss", "eval_loss"):
        steps = [row["step"] for row in rows if kind in row]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize("file", ["metrics.jsonl", "pairs.jsonl", "trace-0.jsonl"])
def test_a_line_that_a_full_disk_has_cut_off_does_not_keep_a_run_from_resuming(file, make_trainer):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "report_pairs": 12}
    trainer = make_trainer(**options)
    trainer.train()
    torn = trainer.run_folder.path / file
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-9])
    shutil.rmtree(trainer.run_folder.path / "checkpoint-4")
    make_trainer(**options).train(resume_from_checkpoint=True)
    rows = [json.loads(line) for line in torn.read_text().splitlines()]
    steps = [json.loads(line)["step"] for line in whole.decode().splitlines()]
    assert [row["step"] for row in rows if row["step"] <= 4] == steps


# ---- What is printed ----


def test_where_a_run_resumes_from_is_said(model, data, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    assert main(command(model, data, out, "--resume_from_checkpoint", "auto", "--save_steps", "2")) == 0
    assert f"No checkpoint in {out}: starting afresh." in capsys.readouterr().out
    assert main(command(model, data, out, "--resume_from_checkpoint", "auto", "--max_steps", "4")) == 0
    assert f"Resuming from {out / 'checkpoint-3'}." in capsys.readouterr().out


def test_printed_commands_work_when_pasted_into_another_folder(model, data, tmp_path, capsys, monkeypatch):  # noqa: F811
    """All but those that wait for a browser or a person."""
    monkeypatch.chdir(tmp_path)
    assert main(command("model", "train.jsonl", "out put/ünï 'run'")) == 0
    shown = capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    commands = re.findall(r"^(\w+): +sapo (.*?)(?:    \(.*)?$", shown, flags=re.MULTILINE)
    assert {label for label, _ in commands} >= {"Longer", "Report", "Chat", "Evaluate", "Compare"}
    for label, line in commands:
        words = shlex.split(line, comments=True)
        if label == "Report":
            words.remove("--serve")
        if label == "Chat":
            words += ["--prompt", "w1 w2", "--max_new_tokens", "2"]
        if label == "Evaluate":
            words += ["--limit", "4", "--max_new_tokens", "4"]
        assert main(words) == 0, (label, capsys.readouterr().err)
    recipe = yaml.safe_load((tmp_path / "out put/ünï 'run'/recipe.yaml").read_text())
    assert all(Path(recipe[name]).is_absolute() for name in ("model_name_or_path", "dataset_name", "output_dir"))


def test_a_restart_takes_a_recipe_of_before_the_first_checkpoint_for_its_own(model, data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.yaml").write_text("{}")
    (out / "metrics.jsonl").write_text("")
    assert main(command(model, data, out, "--resume_from_checkpoint", "auto")) == 0


# ---- Ctrl-C ----


def test_ctrl_c_says_at_once_what_will_happen_and_keeps_the_step(model, data, tmp_path, start):  # noqa: F811
    out = tmp_path / "run"
    process = start(
        [sys.executable, "-m", "sapo", *command(model, data, out, "--max_steps", "100000")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert re.search(
        r"Stopping (after this step|now), with a checkpoint( of step \d+)?; Ctrl-C again ends at once", said
    )
    step = int(re.search(r"Stopped after step (\d+) of", shown)[1])
    assert (out / f"checkpoint-{step}" / "sapo_manifest.json").is_file()
    assert "Continue:  sapo train --config" in shown


def test_a_signal_between_two_steps_ends_the_run_before_the_next(make_trainer):
    from sapo.training.callbacks import StopOnSignal

    class StopsWhileSaving(StopOnSignal):
        def on_save(self, args, state, control, **kwargs):
            self.received = signal.SIGINT

    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.add_callback(StopsWhileSaving())
    trainer.train()
    assert trainer.state.global_step == 2
    assert [path.name for path in trainer.run_folder.path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("generating", [False, True])
def test_a_signal_ends_an_evaluation_and_saves(generating, make_trainer):
    from sapo.training.callbacks import StopOnSignal

    class StopsWhileEvaluating(StopOnSignal):
        seen, at_token = 0, False

        def on_prediction_step(self, args, state, control, **kwargs):
            self.seen += 1
            self.received = signal.SIGINT
            super().on_prediction_step(args, state, control, **kwargs)

        def before_token(self):
            """Of the evaluation that follows step 2."""
            if self.at_token and trainer.state.global_step == 2:
                self.seen += 1
                self.received = signal.SIGINT
            look()

    stop = StopsWhileEvaluating()
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=2, eval_rows=tiny_rows(24), per_device_eval_batch_size=1,
        save_strategy="steps", save_steps=6,
    )  # fmt: skip
    trainer.add_callback(stop)
    stop.at_token, look = generating, trainer.source._generator._look
    trainer.source._generator._look = stop.before_token
    trainer.train()
    assert stop.seen == 1
    assert trainer.state.global_step == 2
    assert (trainer.run_folder.path / "checkpoint-2" / "sapo_manifest.json").is_file()
