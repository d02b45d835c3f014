"""Laws of steps whose loss or gradient is not finite: they change nothing, can be traced, and end the run in time."""

import copy
import json
import math

import pytest
import torch
from transformers import TrainerCallback

from sapo import SAPOTrainer
from sapo.errors import TrainingError
from sapo.runs.layout import BAD_PAIRS_FILE, TRACE_FILE


def state_of(trainer):
    weights = {name: weight.detach().clone() for name, weight in trainer.policy().named_parameters()}
    opponent = {name: weight.clone() for name, weight in trainer.opponent.tensors().items()}
    return weights, opponent, copy.deepcopy(trainer.optimizer.state_dict()["state"]), trainer.source.buffer.entries()


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


class Watch(TrainerCallback):
    """The state before and after each step, by the number of the step."""

    def __init__(self):
        self.trainer, self.before, self.after = None, {}, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.before[state.global_step + 1] = state_of(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        self.after[state.global_step] = state_of(self.trainer)


def faulty(step_guard, spoil, micro_batch=0):
    """A trainer whose loss is spoilt in some steps."""

    class Faulty(SAPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            here = model.training and self.state.global_step + 1 in step_guard and self._micro_batch == micro_batch
            return spoil(self, loss) if here else loss

    return Faulty


def nan_loss(trainer, loss):
    trained = trainer._step_guard.trained
    trained[-1] = type(trained[-1])(trained[-1].pair, math.nan)
    return loss * math.nan


def infinite_loss(trainer, loss):
    return loss + math.inf * loss


def nan_gradient(trainer, loss):
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


FAULTS = {"loss": nan_loss, "infinite": infinite_loss, "gradient": nan_gradient}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("lora", "accumulation"), [(False, 1), (True, 2)])
def test_a_bad_step_changes_nothing_and_the_next_one_learns(make_trainer, fault, lora, accumulation):
    watch = Watch()
    trainer = watch.trainer = make_trainer(
        trainer=faulty({3}, FAULTS[fault], accumulation - 1),
        lora=lora,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
    )
    trainer.add_callback(watch)
    trainer.train()
    # Weights, opponent, buffer and the optimizer's moments are what they were.
    assert all(map(same, watch.before[3], watch.after[3]))
    for step in (2, 4):
        assert not any(map(same, watch.before[step], watch.after[step]))
    rows = lines(trainer.run_folder.path / "metrics.jsonl")
    assert [row["nonfinite_step_fraction"] for row in rows if "loss" in row] == [0, 0, 1, 0]
    assert all(torch.isfinite(weight).all() for weight in trainer.policy().parameters())


def test_too_many_bad_steps_in_a_row_end_the_run_with_their_pairs_in_a_file(make_trainer):
    trainer = make_trainer(trainer=faulty({2, 4, 5, 6}, nan_loss), max_nonfinite_steps=3, max_steps=8)
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row, up to step 6;.*bad_pairs-0\.jsonl"):
        trainer.train()
    rows = lines(trainer.run_folder.path / BAD_PAIRS_FILE.format(process=0))
    assert len(rows) == 2
    assert [row["loss"] for row in rows].count("nan") == 1
    texts = {(row["prompt"], row["chosen"].strip()) for row in rows}
    known = {
        (trainer.processing_class.decode(pair.prompt_ids), trainer.processing_class.decode(pair.chosen_ids).strip())
        for pair in (one.pair for one in trainer._step_guard.trained)
    }
    assert texts == known


def test_bad_steps_apart_do_not_end_the_run(make_trainer):
    trainer = make_trainer(trainer=faulty({1, 2, 4, 5}, nan_gradient), max_nonfinite_steps=3)
    assert trainer.train().global_step == 6


def test_each_loss_leads_to_its_pairs(make_trainer):
    trainer = make_trainer(gradient_accumulation_steps=2, pairs_per_forward=1, objective="orpo")
    trainer.train()
    folder = trainer.run_folder.path
    trace = lines(folder / TRACE_FILE.format(process=0))
    losses = {row["step"]: row["loss"] for row in lines(folder / "metrics.jsonl") if "loss" in row}
    assert [line["step"] for line in trace] == [1, 2, 3, 4, 5, 6]
    for line in trace:
        assert len(line["pairs"]) == 4
        assert sum(loss for *_, loss in line["pairs"]) / 4 == pytest.approx(losses[line["step"]], rel=1e-5)
    stored = {(pair.row, pair.turn, pair.segment.start) for pair in trainer.source.buffer.items()}
    assert {tuple(pair[:3]) for line in trace for pair in line["pairs"]} <= stored


def test_the_trace_stays_bounded_and_is_cut_at_a_resume(make_trainer, monkeypatch):
    monkeypatch.setattr("sapo.runs.folder._TRACE_BYTES", 200)
    trainer = make_trainer(save_strategy="steps", save_steps=3, max_steps=6)
    trainer.train()
    file = trainer.run_folder.path / TRACE_FILE.format(process=0)
    assert sorted(path.name for path in file.parent.glob("trace*")) == ["trace-0.jsonl", "trace-0.jsonl.old"]
    assert all(path.stat().st_size < 400 for path in file.parent.glob("trace*"))
    monkeypatch.undo()
    again = make_trainer(save_strategy="no", max_steps=6)
    again.train(resume_from_checkpoint=str(trainer.run_folder.path / "checkpoint-3"))
    old = file.with_name(f"{file.name}.old")
    assert [line["step"] for line in (*lines(old), *lines(file)) if line["step"] > 3] == [4, 5, 6]
