import pytest
import torch

from sapo.errors import CheckpointError, ConfigurationError
from sapo.measures import retention as measures
from tests.runs import metrics_of
from tests.tiny import tiny_llama, tiny_rows

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, "eval_on_start": True}
MEASURED = {"eval_retention": True, "eval_retention_size": 4, "eval_retention_max_time_fraction": 1.0}


def logged(trainer):
    return metrics_of(trainer.run_folder.path, "eval_loss")


def make(make_trainer, name="run", **options):
    settings = EVALUATED | MEASURED | {"eval_rows": tiny_rows(6, seed=5), "model": tiny_llama()}
    return make_trainer(name, **(settings | options))


@pytest.mark.parametrize("options", [{}, {"lora": True}, {"objective": "sft"}])
def test_distance_is_zero_at_the_start_and_grows_as_the_policy_moves(make_trainer, options):
    trainer = make(make_trainer, **options)
    trainer.train()
    first, *others = logged(trainer)
    assert first["eval_retention/kl_general"] == first["eval_retention/kl_task"] == first["eval_retention/gain"] == 0
    assert all(row["eval_retention/kl_general"] > 0 and row["eval_retention/kl_task"] > 0 for row in others)
    assert all(row["eval_retention/gain"] != 0 and 0 < row["eval_retention/time_share"] <= 1 for row in others)


def test_measuring_leaves_the_training_undisturbed(make_trainer):
    ends = []
    for name, measured in (("without", False), ("with", True)):
        trainer = make(make_trainer, name, eval_retention=measured, lora=True)
        trainer.train()
        ends.append(list(trainer.policy().parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_measures_against_the_same_start(make_trainer, lora):
    whole = make(make_trainer, "whole", lora=lora)
    whole.train()
    stopped = make(make_trainer, "parts", lora=lora, save_strategy="steps", save_steps=4)
    stopped.train()
    again = make(make_trainer, "parts", lora=lora, save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=str(again.run_folder.path / "checkpoint-4"))

    def numbers(trainer):
        return {k: v for k, v in logged(trainer)[-1].items() if "retention/" in k and "time" not in k}

    assert numbers(again) == numbers(whole)
    assert len(numbers(again)) == 3


def test_a_run_that_did_not_keep_its_start_is_refused(make_trainer):
    trainer = make(make_trainer, eval_retention=False, save_strategy="steps", save_steps=4)
    trainer.train()
    again = make(make_trainer, save_strategy="steps", save_steps=4)
    with pytest.raises(CheckpointError, match=r"lacks retention\.safetensors"):
        again.train(resume_from_checkpoint=str(again.run_folder.path / "checkpoint-4"))


def test_replies_are_generated_once_for_a_model(make_trainer, monkeypatch):
    made = []
    generate = measures.generate_replies

    def counted(*args, **kwargs):
        made.append(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr("sapo.training.replay.generate_replies", counted)
    model = tiny_llama(seed=77)
    make(make_trainer, "one", model=model, lora=True, max_steps=1).train()
    assert len(made) == 2  # general and task prompts
    make(make_trainer, "two", model=tiny_llama(seed=77), max_steps=1).train()
    assert len(made) == 2
    make(make_trainer, "three", model=tiny_llama(seed=78), max_steps=1).train()
    assert len(made) == 4


def test_passing_the_limit_warns_once(make_trainer, monkeypatch):
    warned = []
    monkeypatch.setattr("sapo.training.retention.logger.warning", warned.append)
    make(make_trainer, retention_kl_limit=1e-9).train()
    (line,) = warned
    assert "above retention_kl_limit=1e-09" in line


def test_measuring_waits_for_its_share_of_time(make_trainer, monkeypatch):
    told = []
    monkeypatch.setattr("sapo.training.retention.logger.warning", told.append)
    trainer = make(make_trainer, eval_retention_max_time_fraction=0.0)
    trainer.train()
    assert not any("eval_retention/kl_general" in row for row in logged(trainer))
    (line,) = told
    assert "eval_retention_max_time_fraction=0" in line


def test_retention_needs_evaluations(make_trainer):
    with pytest.raises(ConfigurationError, match="eval_retention=true needs evaluations"):
        make_trainer(eval_retention=True)
