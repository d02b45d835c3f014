import itertools
import shutil
import signal
from pathlib import Path

import pytest
import torch

from sapo.errors import CheckpointError, ConfigurationError
from sapo.runs import folder as run_folder
from sapo.training.callbacks import StopOnSignal
from tests.runs import metrics_of
from tests.tiny import tiny_llama, tiny_rows

VARIANTS = {
    f"{objective}-{'lora' if lora else 'dense'}-{accumulation}": {
        "objective": objective,
        "lora": lora,
        "disable_dropout": False,
        "gradient_accumulation_steps": accumulation,
    }
    for objective in ("dpo", "orpo")
    for lora in (False, True)
    for accumulation in (1, 3)
} | {
    "dpo-initial-lora": {"objective": "dpo", "lora": True, "reference": "initial"},
    "pooled": {"steps_per_generation": 3, "gradient_accumulation_steps": 3, "num_generations": 2},
    "sparse-logs": {"logging_steps": 4, "replay_max_age": 2, "num_generations": 2},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": tiny_rows(5, seed=5)},
}


def metrics(trainer, after):
    rows = metrics_of(trainer.run_folder.path)
    timed = ("time/", "tokens_per_second", "memory/")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed) and "second" not in k and "runtime" not in k}
        for row in rows
        if row["step"] > after
    ]


def weights(trainer):
    everything = {f"policy.{name}": weight for name, weight in trainer.policy().named_parameters()}
    everything |= {f"opponent.{name}": weight for name, weight in trainer.opponent.tensors().items()}
    if trainer.reference is not None:
        everything |= {f"reference.{name}": weight for name, weight in trainer.reference.tensors().items()}
    return everything


# With one batch a step ORPO takes the same way as DPO.
@pytest.mark.parametrize(
    "variant",
    [pytest.param(one, marks=[pytest.mark.slow] * (one in ("orpo-dense-1", "orpo-lora-1"))) for one in VARIANTS],
)
def test_resume_reproduces_uninterrupted_run(variant, make_trainer):
    options = VARIANTS[variant] | {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer("whole", model=tiny_llama(attention_dropout=0.2), **options)
    whole.train()
    for step in (2, 3):
        resumed = make_trainer(f"from-{step}", model=tiny_llama(attention_dropout=0.2), **options)
        resumed.train(resume_from_checkpoint=str(whole.run_folder.path / f"checkpoint-{step}"))
        ours, theirs = weights(resumed), weights(whole)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert resumed.source.buffer.entries() == whole.source.buffer.entries()
        assert metrics(resumed, step) == metrics(whole, step)


class StopsWithin(StopOnSignal):
    """A signal comes in the step after `step`, before one of its parts."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def come(self, trainer, part, after=0):
        """Before the part is done for the `after`th time after the first in its step."""
        owner = trainer.source._generator if part == "_look" else trainer._scorer
        own, times = getattr(owner, part), itertools.count()

        def then(*given):
            assert self.received is None
            if trainer.state.global_step == self.step and next(times) == after:
                self.received = signal.SIGINT
            return own(*given)

        setattr(owner, part, then)
        trainer.add_callback(self)


@pytest.mark.parametrize(("part", "after"), [("_look", 2), ("passes", 0), ("reference_logps", 0)])
@pytest.mark.parametrize("variant", ["pooled", "dpo-dense-3"])
def test_a_step_that_a_signal_ends_is_as_if_it_had_not_begun(variant, part, after, make_trainer):
    options = VARIANTS[variant] | {"logging_steps": 2}
    whole = make_trainer("whole", model=tiny_llama(attention_dropout=0.2), **options)
    whole.train()
    stopped = make_trainer("stopped", model=tiny_llama(attention_dropout=0.2), **options)
    StopsWithin(3).come(stopped, part, after)
    stopped.train()
    assert stopped.state.global_step == 3
    assert (stopped.run_folder.path / "checkpoint-3" / "sapo_manifest.json").is_file()
    resumed = make_trainer("stopped", model=tiny_llama(attention_dropout=0.2), **options)
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.source.buffer.entries() == whole.source.buffer.entries()
    # A run that ends adds a line for all of its steps.
    ours, theirs = ([row for row in metrics(one, 0) if "loss" in row] for one in (resumed, whole))
    assert ours == theirs


def test_the_first_step_is_finished_for_a_signal(make_trainer):
    trainer = make_trainer()
    StopsWithin(0).come(trainer, "passes")
    trainer.train()
    assert [path.name for path in trainer.run_folder.path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.fixture
def checkpoint(make_trainer):
    trainer = make_trainer("whole", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    return trainer.run_folder.path / "checkpoint-2"


@pytest.mark.parametrize("part", ["opponent.safetensors", "replay_buffer_0.safetensors", "sapo_state.json"])
def test_checkpoint_that_lacks_a_part_is_refused(part, checkpoint, make_trainer):
    (checkpoint / part).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {part}"):
        make_trainer("again").train(resume_from_checkpoint=str(checkpoint))


def test_truncated_checkpoint_is_refused(checkpoint, make_trainer):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model.safetensors: \d+ bytes, \d+ when it was saved"):
        make_trainer("again").train(resume_from_checkpoint=str(checkpoint))


def test_corrupt_checkpoint_is_refused(checkpoint, make_trainer):
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="content has changed"):
        make_trainer("again").train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_of_another_configuration_is_refused(checkpoint, make_trainer):
    with pytest.raises(CheckpointError, match=r"beta was 0.1, is 0.2"):
        make_trainer("again", beta=0.2).train(resume_from_checkpoint=str(checkpoint))


def test_a_resume_with_other_rows_says_which(checkpoint, make_trainer):
    rows, other = tiny_rows(), {"prompt": "w1", "chosen": " w2 w3"}
    for given, said in (
        ([*rows[:2], other, *rows[3:]], "24 rows then, 24 now; changed: row 3"),
        ([*rows, other, other], "24 rows then, 26 now; new: rows 25, 26"),
        (rows[1:], "24 rows then, 23 now; gone: row 1"),
        ([*rows[1:], rows[0]], "24 rows then, 24 now; their order is another"),
        ([other], "24 rows then, 1 now, none of them the same: the data, the chat template or the tokenizer is"),
    ):
        with pytest.raises(CheckpointError, match=f"dataset: {said}"):
            make_trainer("again", rows=given).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_has_no_copy_of_the_start_model_and_asks_for_the_same(make_trainer):
    options = {"reference": "initial", "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer("whole", **options)
    whole.train()
    checkpoint = whole.run_folder.path / "checkpoint-3"
    assert not (checkpoint / "reference.safetensors").exists()
    again = make_trainer("again", **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    for one, other in zip(whole.policy().parameters(), again.policy().parameters(), strict=True):
        assert torch.equal(one, other)
    other_start = make_trainer("other", model=tiny_llama(seed=5), **options)
    with pytest.raises(CheckpointError, match="start_model was"):
        other_start.train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_of_the_model_alone_is_refused(make_trainer):
    """Before it is made: it could not be resumed."""
    with pytest.raises(ConfigurationError, match="save_only_model=true: a checkpoint without optimizer state"):
        make_trainer("whole", max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True)


def test_checkpoint_that_is_not_there_is_refused(make_trainer):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        make_trainer().train(resume_from_checkpoint="nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        make_trainer().train(resume_from_checkpoint=True)


def test_fresh_run_does_not_mix_with_an_earlier_one(checkpoint, make_trainer):
    with pytest.raises(ConfigurationError, match="is not empty"):
        make_trainer("whole").train()
    trainer = make_trainer("whole", overwrite_output_dir=True)
    trainer.train()
    assert not checkpoint.exists()


def test_failed_save_leaves_the_previous_checkpoint(checkpoint, make_trainer, monkeypatch):
    def full(folder):
        raise OSError("no space left on device")

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = make_trainer("whole", **options)
    monkeypatch.setattr(run_folder.parts, "seal", full)
    with pytest.raises(OSError, match="no space left"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    monkeypatch.undo()
    assert sorted(path.name for path in checkpoint.parent.glob("checkpoint-*")) == ["checkpoint-2"]
    make_trainer("whole", **options).train(resume_from_checkpoint=True)
    shutil.rmtree(checkpoint.parent)


def kill_at_rename(number, call, monkeypatch):
    """Let `call` end at its n-th rename, as if the process were killed there."""
    count = 0

    def rename(path, target):
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        return original(path, target)

    original = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.parametrize("rename", [1, 2])
def test_kill_while_a_checkpoint_is_replaced_loses_none(rename, checkpoint, make_trainer, monkeypatch):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer("whole", **options)
    trainer.state.global_step = 2
    # Not a checkpoint that could be resumed from, so that the surviving one is known to be the earlier.
    folder = trainer.run_folder

    def save_nothing():
        (folder.staging / "checkpoint-2").mkdir(parents=True)

    kill_at_rename(rename, lambda: folder.save_checkpoint(2, save_nothing, lambda *places: None), monkeypatch)
    assert (checkpoint.parent / ".saving").exists()
    for wanted in (True, str(checkpoint)):
        again = make_trainer("whole", **options | {"max_steps": 3})
        again.train(resume_from_checkpoint=wanted)
        assert again.state.global_step == 3
    left = {path.name for path in checkpoint.parent.iterdir()}
    assert not [name for name in left if name.endswith(".old") or name == ".saving"]


def test_kill_while_the_opponent_is_replaced_loses_neither(checkpoint, make_trainer, monkeypatch):
    folder = checkpoint.parent
    trainer = make_trainer("whole", max_steps=2)
    trainer.save_model()
    before = (folder / "opponent" / "model.safetensors").read_bytes()
    kill_at_rename(2, trainer.save_model, monkeypatch)
    assert not (folder / "opponent").exists()
    make_trainer("whole", max_steps=3).train(resume_from_checkpoint=True)
    assert (folder / "opponent" / "model.safetensors").read_bytes() == before


def test_old_folder_beside_its_successor_is_removed(checkpoint, make_trainer):
    old = checkpoint.with_name(".checkpoint-2.old")
    shutil.copytree(checkpoint, old)
    make_trainer("whole", max_steps=3).train(resume_from_checkpoint=True)
    assert checkpoint.exists()
    assert not old.exists()


def test_fresh_run_removes_what_a_kill_left(checkpoint, make_trainer):
    for name in (".checkpoint-2.old", ".opponent.old", ".saving"):
        (checkpoint.parent / name).mkdir()
    make_trainer("whole", overwrite_output_dir=True).train()
    assert {path.name for path in checkpoint.parent.iterdir()} <= {
        "metrics.jsonl",
        "report.html",
        "run.json",
        "sapo_config.yaml",
        "trace-0.jsonl",
    }


def test_a_tied_weight_is_not_reported_missing(make_trainer, caplog):
    def tied(folder):
        return make_trainer(
            folder, model=tiny_llama(tie_word_embeddings=True), max_steps=2, save_strategy="steps", save_steps=1
        )

    tied("whole").train()
    with caplog.at_level("WARNING", logger="transformers.trainer"):
        tied("again").train(resume_from_checkpoint=str(tied("other").run_folder.path.parent / "whole" / "checkpoint-1"))
    assert not [record for record in caplog.records if "missing keys" in record.getMessage()]


def test_a_run_that_has_ended_takes_no_step_more_when_it_is_resumed(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    again = make_trainer(save_strategy="steps", save_steps=2, max_steps=4)
    assert again.train(resume_from_checkpoint="auto").global_step == 4
    pairs = zip(again.policy().parameters(), trainer.policy().parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


CHANGES = {
    "warmup_steps": 4,
    "data_seed": 7,
    "adam_beta1": 0.1,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-4,
    "lr_scheduler_kwargs": {"power": 2},
    "optim_args": "a=1",
    "train_sampling_strategy": "sequential",
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "chosen_probe_size": 2,
    "dataloader_drop_last": True,
}


def test_resume_with_another_value_of_a_fixed_option_is_refused(checkpoint, make_trainer):
    for name, value in CHANGES.items():
        trainer = make_trainer(f"with-{name}", **{name: value})
        with pytest.raises(CheckpointError, match=rf"has another configuration: .*{name} was "):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_resume_takes_another_value_of_a_free_option(checkpoint, make_trainer):
    options = {"logging_steps": 2, "pairs_per_forward": 1, "save_steps": 3, "max_steps": 3, "layout": "plain"}
    trainer = make_trainer("free", **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3
