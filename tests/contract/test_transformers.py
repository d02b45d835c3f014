"""What we take from transformers that it does not promise: private hooks of its Trainer, and layers of its cache."""

import inspect

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Trainer, TrainerCallback, TrainingArguments
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tests.tiny import tiny_llama

HOOKS = {
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_rng_state": ["self", "checkpoint"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_get_output_dir": ["self", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_issue_warnings_after_load": ["self", "load_result"],
    "_load_best_model": ["self"],
    "_evaluate": ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_determine_best_metric": ["self", "metrics", "trial"],
}
"""The private hooks that the trainer overrides, and their parameters."""


class Line(nn.Module):
    """`y = a x + b`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x, y, **more):
        assert not more
        return {"loss": ((self.a * x + self.b - y) ** 2).mean()}


class Recorder(Trainer):
    """Notes when each hook begins and ends."""

    def __init__(self, folder, **options):
        settings = {
            "output_dir": str(folder), "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2,
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no",
            "remove_unused_columns": False, "dataloader_pin_memory": False,
        }  # fmt: skip
        rows = [{"x": torch.tensor(float(i)), "y": torch.tensor(2.0 * i)} for i in range(8)]
        super().__init__(Line(), TrainingArguments(**settings | options), train_dataset=rows)
        self.calls = []

    def training_step(self, *args, **kwargs):
        self.calls.append(f"step {self.state.global_step}")
        return super().training_step(*args, **kwargs)


def recorded(name):
    def hook(self, *args, **kwargs):
        self.calls.append(name)
        result = getattr(super(Recorder, self), name)(*args, **kwargs)
        self.calls.append(f"{name} ends")
        return result

    return hook


for hook in HOOKS:
    setattr(Recorder, hook, recorded(hook))


@pytest.mark.parametrize("name", HOOKS)
def test_signatures_of_the_trainers_hooks(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == HOOKS[name]


def test_signatures_of_the_trainers_loop():
    parameters = ["self", "epoch_iterator", "num_batches", "device"]
    assert list(inspect.signature(Trainer.get_batch_samples).parameters) == parameters
    parameters = ["self", "model", "inputs", "num_items_in_batch"]
    assert list(inspect.signature(Trainer.training_step).parameters) == parameters


SAVED = [
    "_save_checkpoint",
    "_get_output_dir", "_get_output_dir ends",
    "_save_optimizer_and_scheduler", "_save_optimizer_and_scheduler ends",
    "_save_checkpoint ends",
]  # fmt: skip


def test_order_of_the_hooks_in_a_run_that_saves(tmp_path):
    trainer = Recorder(tmp_path)
    trainer.train()
    # What a run begins with is ready before its first step; a checkpoint follows the step that it is of; the folder is
    # asked for once more at the end, when old checkpoints are deleted.
    assert [call for call in trainer.calls if "_load_rng_state" not in call] == [
        "_prepare_for_training", "_prepare_for_training ends", "step 0", *SAVED, "step 1", *SAVED,
        "_get_output_dir", "_get_output_dir ends",
    ]  # fmt: skip
    assert "_load_rng_state" not in trainer.calls[: trainer.calls.index("_prepare_for_training ends")]


def test_order_of_the_hooks_in_a_run_that_resumes(tmp_path):
    Recorder(tmp_path).train()
    trainer = Recorder(tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    before = trainer.calls[: trainer.calls.index("step 1")]
    # Weights, then what `_prepare_for_training` restores, then the random state, which nothing may move afterwards.
    assert before[:6] == [
        "_load_from_checkpoint", "_issue_warnings_after_load", "_issue_warnings_after_load ends",
        "_load_from_checkpoint ends", "_prepare_for_training", "_prepare_for_training ends",
    ]  # fmt: skip
    assert before[6:]
    assert {call.removesuffix(" ends") for call in before[6:]} == {"_load_rng_state"}
    assert before[-1] == "_load_rng_state ends"


def test_a_checkpoint_goes_where_get_output_dir_says(tmp_path):
    class Staged(Recorder):
        def _get_output_dir(self, trial):
            return str(tmp_path / "staging")

        def _save_optimizer_and_scheduler(self, output_dir):
            self.calls.append(output_dir)
            super()._save_optimizer_and_scheduler(output_dir)

    trainer = Staged(tmp_path / "run", max_steps=1)
    trainer.train()
    folder = tmp_path / "staging" / "checkpoint-1"
    assert str(folder) in trainer.calls
    names = {file.name for file in folder.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"} <= names


def test_missing_weights_are_told_to_the_hook_and_may_be_taken_off_its_list(tmp_path):
    Recorder(tmp_path).train()

    class Tied(Recorder):
        def _issue_warnings_after_load(self, load_result):
            self.calls.append([*load_result.missing_keys])
            load_result.missing_keys[:] = []
            super()._issue_warnings_after_load(load_result)

    trainer = Tied(tmp_path, max_steps=3)
    trainer.model.c = nn.Parameter(torch.zeros(()))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert ["c"] in trainer.calls


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_may_be_drawn_ahead_of_their_step(tmp_path, accumulation):
    class Ahead(Recorder):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            self.held = [*getattr(self, "held", []), *epoch_iterator]
            asked, self.held = self.held[:num_batches], self.held[num_batches:]
            self.asked = [*getattr(self, "asked", []), num_batches]
            return asked, None

    options = {"gradient_accumulation_steps": accumulation, "max_steps": -1, "num_train_epochs": 2}
    ahead, plain = (kind(tmp_path / kind.__name__, **options) for kind in (Ahead, Recorder))
    for trainer in (ahead, plain):
        trainer.train()
    assert ahead.asked == [accumulation] * (8 // accumulation)
    assert [c for c in ahead.calls if "step" in c] == [c for c in plain.calls if "step" in c]
    assert ahead.model.a.item() == plain.model.a.item()


def test_a_run_that_is_stopped_with_no_batches_takes_no_step(tmp_path):
    class Stopped(Recorder):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            self.control.should_training_stop = True
            return [], None

    trainer = Stopped(tmp_path)
    trainer.train()
    assert trainer.state.global_step == 0
    assert not any(call.startswith("step") for call in trainer.calls)


@pytest.mark.parametrize("accepts", [True, False])
def test_without_loss_kwargs_the_loss_is_the_mean_over_the_accumulation(tmp_path, accepts):
    gradients = []

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients.append(model.a.grad.item())

    class Plain(Recorder):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.calls.append(num_items_in_batch)
            return model(**inputs)["loss"]

    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0}
    trainer = Plain(tmp_path, **options)
    trainer.model_accepts_loss_kwargs = accepts
    trainer.add_callback(Gradient())
    batches = list(trainer.get_train_dataloader())[:2]
    trainer.get_batch_samples = lambda epoch_iterator, num_batches, device: (batches, None)
    trainer.train()
    fresh = Line()
    (sum(fresh(**batch)["loss"] for batch in batches) / 2).backward()
    assert gradients == [pytest.approx(fresh.a.grad.item())]


def test_the_dynamic_layers_of_a_cache():
    parameters = ["self", "key_states", "value_states"]
    assert list(inspect.signature(DynamicLayer.lazy_initialization).parameters) == parameters
    assert list(inspect.signature(DynamicLayer.update).parameters)[:3] == parameters
    assert list(inspect.signature(DynamicLayer.reorder_cache).parameters) == ["self", "beam_idx"]
    assert DynamicSlidingWindowLayer.__bases__ == (DynamicLayer,)
    cache = DynamicCache(config=tiny_llama().config)
    assert {type(layer) for layer in cache.layers} <= {DynamicLayer}
    states = torch.arange(12.0).reshape(2, 1, 3, 2)
    cache.update(states, -states, 0)
    layer = cache.layers[0]
    assert type(layer) is DynamicLayer
    assert (layer.keys.tolist(), layer.values.tolist()) == (states.tolist(), (-states).tolist())
    assert (layer.get_seq_length(), layer.is_sliding) == (3, False)
    layer.reorder_cache(torch.tensor([1]))
    assert layer.keys.tolist() == states[1:].tolist()
    window = DynamicSlidingWindowLayer(sliding_window=2)
    assert (window.sliding_window, window.is_sliding) == (2, True)
    replaced = DynamicLayer()
    cache.layers[0] = replaced
    assert cache.layers[0] is replaced
