"""Laws of a run that is killed at any moment: it goes on from a whole checkpoint and ends as if nothing had been."""

import os
import random
import resource
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from sapo.runs.checkpoint import MANIFEST_FILE, rotate, seal, verify
from tests.faults.children import build, ended, start, train
from tests.faults.trials import trials
from tests.runs import metrics_of

TIMES = ("time/", "memory/", "tokens_per_second", "train_runtime", "_per_second", "flos")


def metrics(folder):
    rows = metrics_of(folder)
    return [{name: value for name, value in row.items() if not any(t in name for t in TIMES)} for row in rows]


def newest(folder):
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_killed_at_random_moments_ends_bit_equal_to_one_that_was_not(lora, tmp_path, capfd):
    rng = random.Random(int(lora))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert ended(start(train, whole, lora=lora), 300) == 0, capfd.readouterr().err
    length = time.monotonic() - began
    expected, wanted = load_file(whole.with_suffix(".safetensors")), trials(3, 60)
    kills, runs, while_saving = 0, 0, 0
    while kills < wanted:
        runs += 1
        before = newest(killed)
        status = ended(start(train, killed, lora=lora), length * rng.random() ** 2)
        if status is None:
            kills += 1
            while_saving += any(killed.glob(".saving/*")) or any(killed.glob(".*.old"))
            after = newest(killed)
            assert after >= before, "progress was lost"
            for checkpoint in killed.glob("checkpoint-*"):
                verify(checkpoint)
        else:
            assert status == 0, capfd.readouterr().err
            finish(killed, whole, expected)
    # What is left of the last attempt runs to its end.
    assert ended(start(train, killed, lora=lora), 300) == 0, capfd.readouterr().err
    finish(killed, whole, expected)
    with capfd.disabled():
        print(f"\n{kills} kills in {runs} runs, {while_saving} of them while saving; lora={lora}")


def finish(killed, whole, expected):
    """The run has ended: as the whole one did. Then it starts anew."""
    own = load_file(killed.with_suffix(".safetensors"))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], weight) for name, weight in expected.items())
    assert [row for row in metrics(killed) if "loss" in row] == [row for row in metrics(whole) if "loss" in row]
    assert len(list(killed.glob("checkpoint-*"))) == 2
    killed.rename(killed.with_name(f"done-{time.monotonic_ns()}"))


def no_room(size, step):
    """Let no file grow beyond `size` bytes from the checkpoint of `step` on: writing fails as on a full disk."""

    def limit(trainer):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = trainer.run_folder.save_checkpoint

        def cramped(*given):
            if trainer.state.global_step == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            try:
                return save(*given)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        trainer.run_folder.save_checkpoint = cramped

    return limit


@pytest.mark.parametrize("size", [100, 2_000, 30_000, 60_000])
def test_a_full_disk_gives_one_line_and_leaves_the_earlier_checkpoint(size, tmp_path, capfd):
    folder = tmp_path / "run"
    assert ended(start(train, folder, limit=no_room(size, 3)), 300) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "Error" in line]
    assert line.startswith("CheckpointError: ")
    assert "checkpoint-3 cannot be written" in line
    assert newest(folder) == 2
    verify(folder / "checkpoint-2")
    assert not (folder / ".saving").exists()
    assert ended(start(train, folder), 300) == 0
    assert newest(folder) == 12


def test_the_last_good_checkpoint_outlives_a_failed_save_with_a_limit_of_one(tmp_path):
    folder = tmp_path / "run"
    assert ended(start(train, folder, save_total_limit=1, limit=no_room(2_000, 4)), 300) == 2
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    verify(folder / "checkpoint-3")


def test_rotation_spares_the_newest_and_the_best_even_after_a_resume_from_an_older_one(tmp_path):
    for step in (3, 9, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        seal(checkpoint)
        os.utime(checkpoint / MANIFEST_FILE, ns=(step, step))
    # Resumed from step 3: step 4 is the newest now.
    (tmp_path / "checkpoint-4").mkdir()
    seal(tmp_path / "checkpoint-4")
    rotate(tmp_path / "checkpoint-4", 2, str(tmp_path / "checkpoint-9"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-9"}
    rotate(tmp_path / "checkpoint-4", 1, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4"}


def test_auto_starts_where_there_is_nothing_and_refuses_what_is_not_its_own(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    trainer = build(folder)
    with pytest.raises(ValueError, match=r"not empty \(it holds thesis.txt\)"):
        trainer.train(resume_from_checkpoint="auto")
    (folder / "thesis.txt").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert trainer.train(resume_from_checkpoint="auto").global_step == 12
