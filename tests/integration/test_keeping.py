import pytest
import torch

from sapo.commands.main import main
from sapo.data.loading import load_rows
from sapo.errors import CheckpointError, ConfigurationError
from sapo.weights.opponent import BaseModel, ModelCopy
from tests.integration.test_evaluate import save_model
from tests.runs import metrics_of
from tests.tiny import tiny_llama, tiny_rows, write_rows


def logged(trainer):
    return metrics_of(trainer.run_folder.path, "loss")


ANCHORED = {"objective": "sft", "kl_weight": 2.0, "token_weighting": "probability"}


@pytest.mark.parametrize("lora", [False, True])
def test_the_anchor_of_a_run_is_its_start(make_trainer, lora):
    trainer = make_trainer(lora=lora, **ANCHORED, layout="plain")
    assert isinstance(trainer.reference, BaseModel if lora else ModelCopy)
    trainer.train()
    first, *others = logged(trainer)
    assert first["kl_loss"] == pytest.approx(0.0, abs=1e-9)
    assert all(row["kl_loss"] > 0 for row in others)


def test_a_heavy_anchor_holds_the_policy(make_trainer):
    ends = []
    for name, weight in (("free", 0.0), ("held", 100.0)):
        trainer = make_trainer(name, objective="sft", kl_weight=weight)
        trainer.train()
        start = tiny_llama()
        ends.append(
            sum(
                float((a - b).detach().norm())
                for a, b in zip(trainer.policy().parameters(), start.parameters(), strict=True)
            )
        )
    assert ends[1] < ends[0]


CASES = [
    {},
    {"objective": "sft"},
    {"objective": "orpo"},
    {"pair_source": "paired", "rows": tiny_rows(paired=True), "reference": "none"},
    {"lora": True},
    {"loss_type": "nce", "layout": "plain"},
    {"loss_type": ["sigmoid", "hinge", "sft"], "loss_weights": [1.0, 0.2, 0.5]},
]


@pytest.mark.parametrize("options", CASES)
def test_self_replay_works_with_every_source_and_objective(make_trainer, options):
    trainer = make_trainer(replay_share=0.4, replay_max_new_tokens=6, **options)
    trainer.train()
    rows = logged(trainer)
    assert any("self_replay/nll_loss" in row for row in rows)
    shares = [row["self_replay/share"] for row in rows]
    assert 0.3 < sum(shares) / len(shares) < 0.5
    assert all(pair.row >= 0 for pair in trainer.last_pairs())


@pytest.mark.parametrize("options", [{}, ANCHORED, {"loss_type": ["sigmoid", "nce"], "loss_weights": [0.5, 1]}])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, options):
    options = {"replay_share": 0.4, "replay_max_new_tokens": 6, "save_strategy": "steps", "save_steps": 3} | options
    whole = make_trainer("run", **options)
    whole.train()
    again = make_trainer("run", **options)
    again.train(resume_from_checkpoint=str(again.run_folder.path / "checkpoint-3"))
    for a, b in zip(whole.policy().parameters(), again.policy().parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_without_its_replies_cannot_resume(make_trainer):
    options = {"replay_share": 0.4, "replay_max_new_tokens": 6, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer("run", **options)
    trainer.train()
    (trainer.run_folder.path / "self_replay.json").unlink()
    again = make_trainer("run", **options)
    with pytest.raises(CheckpointError, match=r"lacks self_replay\.json"):
        again.train(resume_from_checkpoint=str(again.run_folder.path / "checkpoint-3"))


def test_generated_replies_can_be_replayed(tmp_path, make_trainer, capsys):
    model = save_model(tmp_path / "model")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny_rows(12)])
    file = tmp_path / "replies.parquet"
    flags = ["--model_name_or_path", str(model), "--output_file", str(file), "--max_new_tokens", "6", "--use_cpu"]
    assert main(["generate", "--self_replay", str(prompts), *flags, "--max_length", "60"]) == 0
    assert "replies" in capsys.readouterr().out
    rows = load_rows(str(file))
    assert 6 <= len(rows) <= 12
    assert all(row["instruction"] and row["output"] for row in rows)
    first = file.read_bytes()
    file.unlink()
    assert main(["generate", "--self_replay", str(prompts), *flags, "--max_length", "60"]) == 0
    assert file.read_bytes() == first


def test_shipped_prompts_can_be_replied_to(tmp_path, capsys):
    model, file = save_model(tmp_path / "model", max_position_embeddings=256), tmp_path / "replies.parquet"
    flags = ["--output_file", str(file), "--max_new_tokens", "4", "--max_length", "200", "--use_cpu"]
    assert main(["generate", "--self_replay", "shipped", "--model_name_or_path", str(model), *flags]) == 0
    assert 60 < len(load_rows(str(file))) <= 102


def test_a_frozen_opponent_is_renewed_at_its_steps_only(make_trainer):
    trainer = make_trainer(ema_decay=1.0, opponent_refresh_steps=2, max_steps=3, segment_length=None)
    distances = [row["opponent/distance"] for row in (trainer.train(), logged(trainer))[1]]
    assert distances[0] > 0
    assert distances[1] == 0.0
    assert 0 < distances[2] < distances[0] * 2


def test_only_a_frozen_opponent_can_be_renewed(make_trainer):
    with pytest.raises(ConfigurationError, match="opponent_refresh_steps=2"):
        make_trainer(opponent_refresh_steps=2)
