from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, TrainingArguments

from sapo import Pair, SAPOConfig, SAPOTrainer, Segment
from sapo.errors import ConfigurationError, DatasetError
from sapo.preference.pairs import PairSource
from sapo.weights.opponent import ModelCopy, policy_tensors
from sapo.weights.rounding import rounded
from tests.runs import metrics_of
from tests.tiny import tiny_llama, tiny_rows


class FixedPairs(PairSource):
    """Deals the same pairs in the same order, however they are divided into micro-batches."""

    def __init__(self, count):
        self._count = count
        self._dealt = 0

    def pairs(self, examples, *, epoch, step, micro_batch):
        dealt = []
        for _ in range(self._count):
            i = self._dealt
            self._dealt += 1
            chosen = tuple(3 + (i * 7 + k) % 60 for k in range(4 + i % 5))
            rejected = (*chosen[:2], *(5 + (i * 11 + k) % 55 for k in range(3 + i % 3)))
            dealt.append(
                Pair(i, 0, (4, 9, 3 + i % 50), chosen, rejected, Segment(2, len(chosen)), Segment(2, len(rejected)))
            )
        return dealt


def test_an_adapter_begins_alike_in_every_run_of_a_seed(make_trainer):
    """Whatever was drawn before: torch begins at another place in every process."""
    begun = []
    for folder, seed, before in (("one", 3, 7), ("two", 3, 8), ("other", 4, 7)):
        torch.manual_seed(before)
        model = tiny_llama()
        torch.manual_seed(before)
        begun.append(policy_tensors(make_trainer(folder, model=model, lora=True, seed=seed).policy()))
    assert all(torch.equal(begun[0][name], weight) for name, weight in begun[1].items())
    assert not all(torch.equal(begun[0][name], weight) for name, weight in begun[2].items())


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_accumulating_4_times_2_equals_1_times_8(objective, make_trainer):
    ends = []
    for batch, accumulation in ((2, 4), (8, 1)):
        trainer = make_trainer(
            f"run-{batch}",
            objective=objective,
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            source=FixedPairs(batch),
        )
        trainer.train()
        ends.append([weight.detach() for weight in trainer.policy().parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_evaluation_leaves_the_training_undisturbed(make_trainer):
    options = {"disable_dropout": False, "model": None}
    ends = []
    for name, extra in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 2})):
        trainer = make_trainer(
            name,
            **(options | {"model": tiny_llama(attention_dropout=0.3)}),
            eval_rows=tiny_rows(6, seed=5) if extra else None,
            **extra,
        )
        trainer.train()
        ends.append((list(trainer.policy().parameters()), trainer.source.buffer.entries()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert ends[0][1] == ends[1][1]


def test_evaluation_pairs_are_fixed(make_trainer):
    trainer = make_trainer(learning_rate=0.0, eval_rows=tiny_rows(5, seed=5), eval_strategy="steps", eval_steps=1)
    trainer.train()
    rows = metrics_of(trainer.run_folder.path)
    losses = {row["eval_loss"] for row in rows if "eval_loss" in row}
    logps = {row["eval_logps/rejected"] for row in rows if "eval_loss" in row}
    assert len(losses) == len(logps) == 1


def test_only_the_policy_adapter_learns_and_the_opponent_follows(make_trainer):
    trainer = make_trainer(lora=True, ema_decay=0.75, learning_rate=0.05)
    trainable = {name for name, weight in trainer.policy().named_parameters() if weight.requires_grad}
    assert trainable
    assert all(".default." in name for name in trainable)
    base = {n: w.clone() for n, w in trainer.policy().named_parameters() if "lora" not in n}
    expected = {name: weight.clone() for name, weight in trainer.opponent.tensors().items()}
    follow = trainer.opponent.follow

    def watched(policy, decay):
        for name, weight in policy.items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach()
        follow(policy, decay)

    trainer.opponent.follow = watched
    trainer.train()
    for name, weight in trainer.opponent.tensors().items():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-5, atol=1e-7)
    after = dict(trainer.policy().named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in base.items())
    assert {name for name, weight in after.items() if weight.requires_grad} == trainable


def test_the_opponent_writes_with_its_own_weights(make_trainer):
    trainer = make_trainer(lora=True, temperature=0.0, segment_length=None, learning_rate=0.0)
    examples = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])["examples"]
    before = trainer.source.regenerate(examples, epoch=0)
    with torch.no_grad():
        for weight in policy_tensors(trainer.policy()).values():
            weight.normal_()
    assert trainer.source.regenerate(examples, epoch=0) == before
    trainer.opponent.copy_from(policy_tensors(trainer.policy()))
    assert trainer.source.regenerate(examples, epoch=0) != before


def test_frozen_opponent_writes_what_the_initial_model_would(make_trainer):
    trainer = make_trainer(ema_decay=1.0, temperature=0.0, segment_length=None, skip_identical=False)
    trainer.train()
    initial = tiny_llama().eval()
    entries = trainer.source.buffer.entries()
    assert len(entries) == 12
    for pair in (entry.item for entry in entries):
        shared = [*pair.prompt_ids, *pair.chosen_ids[: pair.segment.start]]
        limit = len(pair.segment)
        written = initial.generate(
            torch.tensor([shared]),
            attention_mask=torch.ones(1, len(shared), dtype=torch.long),
            max_new_tokens=limit,
            do_sample=False,
        )[0, len(shared) :].tolist()
        assert list(pair.rejected_ids[pair.rewritten.start : pair.rewritten.stop]) == written
    assert not torch.equal(trainer.policy().lm_head.weight, initial.lm_head.weight)


def test_generation_interval_adds_pairs_at_every_kth_step_only(make_trainer):
    trainer = make_trainer(generation_interval=3, skip_identical=False)
    trainer.train()
    assert [entry.step for entry in trainer.source.buffer.entries()] == [0, 0, 3, 3]


def test_random_assistant_turns_vary_between_epochs(make_trainer, tokenizer, monkeypatch):
    each = "{{ ' ' + m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}" + each + "{% endfor %}")

    def talk(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    rows = [{"messages": talk("w1", "w2 w3 w4 w5 w6", "w7", f"w8 w9 w10 w{i + 11}")} for i in range(4)]
    trainer = make_trainer(rows=rows, assistant_turns="random", max_steps=12, skip_identical=False)
    trainer.train()
    seen = {}
    for entry in trainer.source.buffer.entries():
        seen.setdefault(entry.item.row, set()).add(entry.item.turn)
    assert max(len(turns) for turns in seen.values()) == 2


@pytest.mark.parametrize(("decay", "kept"), [(0.9, torch.float32), (0.5, torch.float32), (0.0, torch.bfloat16)])
def test_bfloat16_run_keeps_a_float32_master_when_it_has_to(decay, kept, make_trainer):
    trainer = make_trainer(model=tiny_llama(dtype=torch.bfloat16), ema_decay=decay)
    trainer.train()
    tensors = trainer.opponent.tensors()
    assert {weight.dtype for weight in tensors.values()} == {kept}
    with trainer.opponent.using() as opponent:
        for name, weight in opponent.named_parameters():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, rounded(tensors[name], torch.bfloat16))


@pytest.mark.parametrize(
    "options",
    [
        {"suffix": "drop", "chosen_nll_weight": 1.0},
        {"suffix": "mask", "dpop_weight": 5.0},
        {"loss_type": "ipo", "reference": "opponent"},
        {"loss_type": "hinge", "reference": "initial"},
        {"reference": "none", "generation_interval": 2},
        {"objective": "orpo", "nll_scope": "all"},
        {"segment_length": 0.3, "num_generations": 2, "replay_draw": "uniform", "replay_replacement": False},
        {"gradient_checkpointing": True, "generation_batch_size": 1},
        {"lora": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_every_option_trains_to_finite_weights(options, make_trainer):
    trainer = make_trainer(**options)
    start = [weight.clone() for weight in trainer.policy().parameters() if weight.requires_grad]
    trainer.train()
    end = [weight for weight in trainer.policy().parameters() if weight.requires_grad]
    assert all(torch.isfinite(weight).all() for weight in end)
    assert any(not torch.equal(a, b) for a, b in zip(start, end, strict=True))


@pytest.mark.parametrize("wanted", [True, False])
def test_the_checkpointing_flag_reaches_the_model_in_any_transformers(wanted, make_trainer):
    trainer = make_trainer(gradient_checkpointing=wanted, max_steps=1)
    trainer.train()
    assert trainer.args.gradient_checkpointing is wanted
    assert {layer.gradient_checkpointing for layer in trainer.policy().model.layers} == {wanted}


def test_offline_pairs_train_on_the_same_trainer(make_trainer):
    trainer = make_trainer(rows=tiny_rows(paired=True), pair_source="paired", max_steps=24)
    trainer.train()
    rows = metrics_of(trainer.run_folder.path)
    assert rows[-2]["rewards/margins"] > rows[0]["rewards/margins"]
    assert trainer.opponent is None


def test_falling_chosen_likelihood_stops_the_run(make_trainer):
    trainer = make_trainer(
        learning_rate=0.3, chosen_drop_limit=0.01, max_steps=50, optim="sgd", beta=5.0, source=FixedPairs(2)
    )
    trainer.train()
    assert trainer.state.global_step < 50
    assert "chosen log-probability has fallen" in trainer.stop_reason
    assert list(trainer.run_folder.path.glob("checkpoint-*"))


def test_saved_run_holds_two_ordinary_models_and_no_pickle(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    folder = trainer.run_folder.path
    for path, weights in (
        (folder, policy_tensors(trainer.policy())),
        (folder / "opponent", trainer.opponent.tensors()),
    ):
        loaded = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_saved_adapters_are_ordinary_adapter_folders(make_trainer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    trainer = make_trainer(lora=True, model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    trainer.train()
    trainer.save_model()
    for path in (trainer.run_folder.path, trainer.run_folder.path / "opponent"):
        AutoPeftModelForCausalLM.from_pretrained(path)


def test_half_precision_opponent_follows_through_a_float32_master():
    policy = tiny_llama(dtype=torch.bfloat16)
    opponent = ModelCopy(policy, decay=0.999)
    target = {name: weight + 0.5 for name, weight in policy.named_parameters()}
    for _ in range(100):
        opponent.follow(target, 0.999)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (opponent.tensors()[name] - dict(policy.named_parameters())[name].float()).mean().item()
    assert moved == pytest.approx(0.5 * (1 - 0.999**100), rel=0.02)


def test_impossible_options_are_refused_before_training(make_trainer):
    with pytest.raises(ConfigurationError, match="raise max_length to 2304"):
        make_trainer(max_length=2048, max_prompt_length=1792, segment_length=512)
    with pytest.raises(ConfigurationError, match="with objective=orpo"):
        make_trainer(objective="orpo", dpop_weight=1.0)
    with pytest.raises(ConfigurationError, match="bf16"):
        make_trainer(use_cpu=False, bf16=True)


def test_more_tokens_than_the_model_has_positions_are_refused(make_trainer):
    make_trainer(max_length=64)
    with pytest.raises(ConfigurationError, match=r"max_length=65 exceeds the 64 positions .*--max_length 64"):
        make_trainer(max_length=65)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # torch, where there is no accelerator
def test_a_model_and_rows_are_enough(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama(max_position_embeddings=2048)
    model.config._name_or_path = "models/mine"
    trainer = SAPOTrainer(model, train_dataset=tiny_rows(4), processing_class=tokenizer)
    assert trainer.args.output_dir == "mine-SAPO"
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.state.global_step == 1


def test_an_evaluation_before_the_run_is_part_of_it(make_trainer, tmp_path):
    trainer = make_trainer(eval_rows=tiny_rows(4, seed=1))
    before = trainer.evaluate()
    assert trainer.train().global_step == 6
    assert metrics_of(tmp_path / "run")[0]["eval_loss"] == before["eval_loss"]
    plain = make_trainer("plain")
    plain.train()
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.policy().parameters(), plain.policy().parameters(), strict=True)
    )
    with pytest.raises(ConfigurationError, match="eval_dataset is missing"):
        plain.evaluate()
    with pytest.raises(ConfigurationError, match="no evaluation set is called test; none has a name"):
        plain.evaluate("test")
    # But no earlier run.
    with pytest.raises(ConfigurationError, match="is not empty"):
        plain.train()


def test_evaluation_sets_by_name_and_no_predictions(make_trainer):
    trainer = make_trainer(eval_rows={"near": tiny_rows(3, seed=1), "far": tiny_rows(2, seed=2)})
    metrics = trainer.evaluate()
    assert trainer.evaluate("far")["eval_loss"] == metrics["eval_far_loss"]
    assert "test_loss" in trainer.evaluate(tiny_rows(2, seed=2), metric_key_prefix="test")
    with pytest.raises(ConfigurationError, match="no evaluation set is called fra; there are far, near"):
        trainer.evaluate("fra")
    with pytest.raises(ConfigurationError, match="metric_key_prefix"):
        trainer.predict(tiny_rows(2))


class pandas:
    class DataFrame:
        __module__ = "pandas.core.frame"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("rows.jsonl", r"rows\.jsonl is a name. Pass rows, such as sapo\.data\.loading\.load_rows\('rows\.jsonl'\)"),
        (Path("rows.jsonl"), "is a name"),
        (pandas.DataFrame(), "not read from a DataFrame. Pass a datasets.Dataset"),
        (tiny_rows, "not read from a function"),
        (["text"], "row 1 of train_dataset: is of type str, and a row is a dict"),
        ({"prompt": ["a"], "completion": ["b"]}, "row 1 of train_dataset_prompt: is of type str"),
        ({"train": tiny_rows(2), "test": tiny_rows(2)}, r"several datasets \(train, test\). Pass one"),
    ],
)
def test_what_are_no_rows_is_said(rows, message, make_trainer):
    with pytest.raises((ConfigurationError, DatasetError), match=message):
        make_trainer(rows=rows)


def test_what_is_no_model_or_no_options_is_said(tokenizer, make_trainer, tmp_path):
    with pytest.raises(ConfigurationError, match="args is of type TrainingArguments: pass a SAPOConfig"):
        SAPOTrainer(
            tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True), tiny_rows(), processing_class=tokenizer
        )
    config = SAPOConfig(str(tmp_path / "run"), use_cpu=True, report_to="none", max_length=32)
    with pytest.raises(ConfigurationError, match="model is missing"):
        SAPOTrainer(None, config, tiny_rows(), processing_class=tokenizer)
    base = tiny_llama()
    make_trainer(model=base, lora=True)
    with pytest.raises(ConfigurationError, match="still has the adapter of an earlier trainer"):
        make_trainer(model=base, lora=True)
