"""What a run keeps for its report: enough to look at, always the same, and of no influence on the run."""

import json
from itertools import pairwise

import pytest
import torch

from sapo.errors import ConfigurationError
from sapo.training.recorder import followed_steps, snapshot_steps
from tests.tiny import tiny_rows


def kept(trainer):
    return [json.loads(line) for line in (trainer.run_folder.path / "pairs.jsonl").read_text().splitlines()]


def test_recording_changes_nothing_that_is_learnt(make_trainer):
    options = {"objective": "dpo", "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    watched = make_trainer("watched", report_pairs=28, **options)
    alone = make_trainer("alone", report_pairs=0, **options)
    for trainer in (watched, alone):
        trainer.train()
    for one, other in zip(watched.policy().parameters(), alone.policy().parameters(), strict=True):
        assert torch.equal(one, other)
    assert watched.source.buffer.entries() == alone.source.buffer.entries()
    assert kept(watched)
    assert not (alone.run_folder.path / "pairs.jsonl").exists()
    assert (alone.run_folder.path / "report.html").is_file()


@pytest.mark.parametrize(
    "options", [{"objective": "dpo"}, {"objective": "orpo"}, {"lora": True, "pairs_per_forward": 1}]
)
def test_followed_prompts_are_the_same_at_every_snapshot(options, make_trainer):
    trainer = make_trainer(report_pairs=28, **options)
    trainer.train()
    rows = kept(trainer)
    followed = [row for row in rows if row["kind"] == "followed"]
    steps = sorted({row["step"] for row in followed})
    assert steps == [0, 2, 4, 6]
    assert len(rows) <= 28
    for step in steps:
        own = [row for row in followed if row["step"] == step]
        first = [row for row in followed if row["step"] == 0]
        assert [(row["row"], row["chosen"]) for row in own] == [(row["row"], row["chosen"]) for row in first]
    assert all("margin" in row and "loss" in row for row in rows)


def test_a_pair_is_scored_as_the_training_scores_it(make_trainer):
    """Of a pair that is learnt from without effect: the learning rate is 0."""
    trainer = make_trainer(
        report_pairs=60, learning_rate=0.0, per_device_train_batch_size=1, max_steps=6, chosen_nll_weight=0.5
    )
    trainer.train()
    learnt = {row["step"]: row for row in kept(trainer) if row["kind"] == "trained"}
    for line in trainer.state.log_history[:-1]:
        row = learnt[line["step"]]
        assert row["loss"] == pytest.approx(line["loss"], abs=1e-3)
        assert row["margin"] == pytest.approx(line["rewards/margins"], abs=1e-4)
        assert row["chosen_logp"] == pytest.approx(line["logps/chosen"], abs=1e-3)
        assert row["draws"] >= 1
        assert row["age"] >= 0


def test_by_default_prompts_are_followed_only_as_often_as_pairs_are_trained_on():
    assert followed_steps(10, None, 4) == set()
    assert followed_steps(100, None, 4) == {0, 100}
    assert followed_steps(100, 200, 4) == snapshot_steps(100, 200)
    for steps, pairs in ((1000, 1), (1000, 8), (77, 64), (5, 100_000)):
        found = sorted(followed_steps(steps, None, pairs))
        assert set(found) <= snapshot_steps(steps, 200)
        assert (found[0], found[-1]) == (0, steps)
        assert min(b - a for a, b in pairwise(found)) * pairs >= 300 - pairs


def test_a_short_run_computes_nothing_for_its_report_or_its_probe(make_trainer, monkeypatch):
    """Beyond the look at the start, and that at the end: what is kept was computed by the steps."""
    trainer = make_trainer(report_pairs=None, chosen_probe_size=None)
    looks = []
    logps = trainer._scorer.response_logps
    trainer._probe._logps = lambda examples: looks.append(len(examples)) or logps(examples)
    monkeypatch.setattr(trainer._scorer, "scores_of", lambda pairs: pytest.fail("scored for the report"))
    trainer.train()
    assert looks == [4, 4]
    assert {row["kind"] for row in kept(trainer)} == {"trained"}
    changes = [line["step"] for line in trainer.state.log_history if "self_play/chosen_logp_change" in line]
    assert changes == [6]


def test_pairs_of_the_data_are_kept_too(make_trainer):
    trainer = make_trainer(report_pairs=20, pair_source="paired", rows=tiny_rows(paired=True))
    trainer.train()
    assert {row["kind"] for row in kept(trainer)} == {"followed", "trained"}


def test_a_run_without_pairs_has_a_report_all_the_same(make_trainer):
    trainer = make_trainer(report_pairs=20, objective="sft")
    trainer.train()
    assert not (trainer.run_folder.path / "pairs.jsonl").exists()
    assert "SFT on the chosen responses" in (trainer.run_folder.path / "report.html").read_text()


def test_a_resumed_run_keeps_what_the_uninterrupted_one_does(make_trainer):
    options = {"report_pairs": 28, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer("whole", **options)
    whole.train()
    expected = kept(whole)
    again = make_trainer("whole", **options)
    again.train(resume_from_checkpoint=str(whole.run_folder.path / "checkpoint-2"))
    assert kept(again) == expected


def test_a_fresh_run_keeps_nothing_of_an_earlier_one(make_trainer):
    make_trainer("run", report_pairs=28).train()
    again = make_trainer("run", report_pairs=12, max_steps=2, overwrite_output_dir=True)
    again.train()
    assert {row["step"] for row in kept(again)} == {0, 2}
    assert len(kept(again)) <= 12


@pytest.mark.parametrize(
    ("share", "every", "expected"),
    [
        (0, 2, [2, 4, 6, 6]),
        # The first, which tells what one takes, and the one at the end.
        (1e12, 1, [1, 6]),
    ],
)
def test_the_report_is_refreshed_during_the_run_within_its_share_of_the_time(
    share, every, expected, make_trainer, monkeypatch
):
    from sapo.training import recorder

    written = []
    monkeypatch.setattr(recorder, "write_report", lambda file, runs: written.append(trainer.state.global_step))
    monkeypatch.setattr(recorder, "_SHARE_OF_TIME", share)
    trainer = make_trainer(report_steps=every)
    trainer.train()
    assert written == expected


def test_too_few_pairs_for_a_start_and_an_end_are_refused(make_trainer):
    with pytest.raises(ConfigurationError, match="must be 0, or 12 or more"):
        make_trainer(report_pairs=5)


def test_a_stopped_run_says_why_in_its_report(make_trainer):
    trainer = make_trainer(chosen_drop_limit=0.0, learning_rate=1.0)
    trainer.train()
    page = (trainer.run_folder.path / "report.html").read_text()
    assert trainer.stop_reason is not None
    assert "Early stop" in page
