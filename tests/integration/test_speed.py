"""Laws of what is done for speed and memory: it changes nothing that is learnt."""

import json
import logging

import pytest
import torch

from sapo import config
from sapo.config import HAS_FUSED_LM_HEAD
from sapo.errors import ConfigurationError
from sapo.generation.decoding import TransformersGenerator
from sapo.preference.reference_scores import ReferenceScores
from tests.tiny import tiny_llama, tiny_rows

OBJECTIVES = {
    "dpo": {"objective": "dpo"},
    "orpo": {"objective": "orpo"},
    "guarded": {"objective": "dpo", "chosen_nll_weight": 1.0, "dpop_weight": 0.5, "suffix": "mask"},
    "ipo": {"objective": "dpo", "loss_type": "ipo", "suffix": "drop"},
    "lora": {"objective": "dpo", "lora": True, "reference": "initial"},
    "paired": {"objective": "dpo", "pair_source": "paired", "rows": tiny_rows(paired=True)},
}


def trained(make_trainer, folder, **options):
    trainer = make_trainer(folder, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, seed=3, **options)
    trainer.train()
    return trainer


def assert_same_run(one, other, tolerance=1e-5):
    for (name, ours), theirs in zip(one.policy().named_parameters(), other.policy().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)
    start = dict(tiny_llama().named_parameters())
    if not one.is_adapter():
        moved = max(
            float((p.detach() - start[name].detach()).abs().max()) for name, p in one.policy().named_parameters()
        )
        assert moved > 100 * tolerance, "the run did not move the weights"
    names = {"loss", "logps/chosen", "rewards/margins", "rewards/accuracies"}
    for ours, theirs in zip(one.state.log_history[:-1], other.state.log_history[:-1], strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_layouts_train_to_the_same_weights(name, make_trainer):
    options = OBJECTIVES[name] | {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    shared = trained(make_trainer, "shared", layout="shared", **options)
    plain = trained(make_trainer, "plain", layout="plain", **options)
    assert_same_run(shared, plain)


@pytest.mark.parametrize("name", ["dpo", "orpo", "guarded"])
def test_a_pair_drawn_twice_is_computed_once_and_counts_twice(name, make_trainer):
    """Four draws from a buffer of four pairs."""
    options = OBJECTIVES[name] | {"per_device_train_batch_size": 4, "replay_buffer_size": 4, "pairs_per_forward": 2}
    merged = make_trainer("merged", optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **options)
    every = make_trainer("every", optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **options)
    every._scorer._equal_passes = True
    computed = {}
    for trainer in (merged, every):
        trainer.train()
        computed[trainer] = sum(len(part.pairs) for part in trainer._step_guard.scored)
    assert computed[every] == 4
    assert_same_run(merged, every)
    traces = [next(t.run_folder.path.glob("trace-*.jsonl")).read_text().splitlines() for t in (merged, every)]
    drawn = [[sorted(pair[:3] for pair in json.loads(line)["pairs"]) for line in lines] for lines in traces]
    assert drawn[0] == drawn[1]
    assert any(len(set(map(tuple, pairs))) < 4 for pairs in drawn[0])
    assert computed[merged] == len(set(map(tuple, drawn[0][-1])))


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_passes_of_fewer_pairs_train_to_the_same_weights(layout, make_trainer):
    options = {"layout": layout, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
    whole = trained(make_trainer, "whole", **options)
    parts = trained(make_trainer, "parts", pairs_per_forward=2, **options)
    assert_same_run(whole, parts)


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_loss_and_gradients_do_not_depend_on_the_tokens_of_a_pass(name, layout, make_trainer, monkeypatch):
    found = []
    for tokens in (None, 1, 60, 10_000):
        trainer = make_trainer(
            objective=name, layout=layout, per_device_train_batch_size=5, max_steps=1, logging_steps=1,
            tokens_per_forward=tokens, overwrite_output_dir=True,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant",
        )  # fmt: skip
        start = {key: weight.detach().clone() for key, weight in trainer.policy().named_parameters()}
        trainer.train()
        # With plain SGD at a rate of 1 the step is the gradient.
        steps = {key: start[key] - weight.detach() for key, weight in trainer.policy().named_parameters()}
        found.append((trainer.state.log_history[0]["loss"], steps))
    (loss, steps), *others = found
    largest = max(float(step.abs().max()) for step in steps.values())
    for other, moved in others:
        assert other == pytest.approx(loss, abs=1e-6, rel=1e-6)
        assert max(float((moved[key] - step).abs().max()) for key, step in steps.items()) <= 1e-6 * max(1.0, largest)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_pool_changes_when_a_segment_is_written_and_nothing_else(accumulation, make_trainer, monkeypatch):
    calls = []
    generate = TransformersGenerator.generate
    monkeypatch.setattr(
        TransformersGenerator, "generate", lambda self, c, *rest: calls.append(len(c)) or generate(self, c, *rest)
    )
    # Of a frozen opponent: its text does not depend on when it writes.
    options = {"ema_decay": 1.0, "gradient_accumulation_steps": accumulation, "max_steps": 6}
    one = trained(make_trainer, "one", **options)
    # All micro-batches of a step in one call.
    assert calls == [2 * accumulation] * 6
    calls.clear()
    pooled = trained(make_trainer, "pooled", steps_per_generation=4, **options)
    # 24 rows are 12 steps without accumulation, and 4 with 3: a pool ends with its epoch.
    assert calls == ([8, 4] if accumulation == 1 else [24, 12])
    assert_same_run(one, pooled)
    assert [entry.item for entry in one.source.buffer.entries()] == [
        entry.item for entry in pooled.source.buffer.entries()
    ]
    assert not pooled.source.pool


def test_pooled_text_is_as_old_as_its_writing(make_trainer):
    trainer = trained(make_trainer, "pooled", steps_per_generation=4, max_steps=4)
    assert {entry.step for entry in trainer.source.buffer.entries()} == {0}


def test_steps_that_generate_nothing_are_not_pooled(make_trainer):
    options = {"generation_interval": 2, "ema_decay": 1.0, "max_steps": 6}
    one = trained(make_trainer, "one", **options)
    pooled = trained(make_trainer, "pooled", steps_per_generation=4, **options)
    assert len(one.source.buffer) == 6
    assert_same_run(one, pooled)


def test_what_cannot_share_falls_back_and_says_so_once(make_trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="sapo.training.trainer"):
        trainer = make_trainer(model=tiny_llama(attn_implementation="eager"), max_steps=2)
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "plain layout" in record.getMessage()]
    assert len(said) == 1
    assert "attn_implementation is eager" in said[0]
    trainer = make_trainer("strict", model=tiny_llama(attn_implementation="eager"), layout="shared")
    with pytest.raises(ConfigurationError, match=r"layout=shared: attn_implementation is eager.* Set layout"):
        trainer.train()


def test_the_published_likelihood_term_asks_for_the_plain_layout(make_trainer):
    with pytest.raises(ConfigurationError, match="layout"):
        make_trainer(objective="orpo", nll_scope="all", layout="shared")


@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="trl 1.16 brought the fused head")
def test_a_fused_head_trains_to_the_same_weights(make_trainer):
    plain = trained(make_trainer, "gathered", max_steps=3)
    fused = trained(make_trainer, "fused", max_steps=3, fused_lm_head=True)
    assert_same_run(plain, fused)


def test_keeping_the_scores_of_the_reference_changes_nothing(make_trainer, monkeypatch):
    kept = trained(make_trainer, "kept", ref_model_sync_steps=3, replay_buffer_size=4)
    monkeypatch.setattr(ReferenceScores, "of", lambda self, pairs, form, stored: form(list(pairs)))
    formed = trained(make_trainer, "formed", ref_model_sync_steps=3, replay_buffer_size=4)
    assert_same_run(kept, formed)


def test_the_reference_is_opened_once_for_all_passes_of_a_micro_batch(make_trainer, monkeypatch):
    trainer = make_trainer(pairs_per_forward=1, gradient_accumulation_steps=2, max_steps=3, reference="initial")
    opened, using = [], trainer.reference.using
    monkeypatch.setattr(trainer.reference, "using", lambda: opened.append(trainer.state.global_step) or using())
    assert trainer._scorer.layout == "shared"
    opened.clear()
    trainer.train()
    assert opened == [0, 0, 1, 1, 2, 2]


def test_a_fused_head_that_trl_has_not_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(config, "HAS_FUSED_LM_HEAD", False)
    with pytest.raises(ConfigurationError, match=r"fused_lm_head=true requires trl 1.16"):
        make_trainer(fused_lm_head=True)
