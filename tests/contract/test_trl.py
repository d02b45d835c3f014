"""What we take from trl, and that our DPO loss is its."""

import inspect

import pytest
import torch
import trl
from datasets import Dataset

from sapo import dpo_loss
from sapo.commands.main import main
from sapo.config import HAS_FUSED_LM_HEAD
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.prepare import prepare_dataset
from sapo.preference.batches import collate_pairs
from sapo.preference.pairs import paired
from sapo.preference.scoring import score
from tests.tiny import save_tiny, tiny_llama, tiny_rows, write_rows


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (trl.get_peft_config, ["model_args"]),
        (trl.get_quantization_config, ["model_args"]),
        (trl.get_dataset, ["mixture_config"]),
        (trl.TrlParser.set_defaults_with_config, ["self", "kwargs"]),
        (trl.TrlParser, ["dataclass_types", "kwargs"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_signatures_taken_from_trl(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        (trl.ModelConfig, {"model_name_or_path", "model_revision", "dtype", "attn_implementation"}),
        (trl.ModelConfig, {"use_peft", "lora_r", "load_in_4bit", "load_in_8bit"}),
        (trl.ScriptArguments, {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"}),
        (trl.DatasetMixtureConfig, {"datasets", "streaming", "test_split_size"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_options_taken_from_trl(options, parameters):
    assert parameters <= set(inspect.signature(options).parameters)


@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="needs trl 1.16")
def test_the_fused_head_is_trls():
    from trl.trainer.utils import add_fused_lm_head

    assert next(iter(inspect.signature(add_fused_lm_head).parameters)) == "model"
    model, ids = tiny_llama(), torch.tensor([[3, 4, 5, 6]])
    plain = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    add_fused_lm_head(model)
    # Without the flag the forward is the old one, which generation needs.
    assert model(ids).logits.shape == (1, 4, model.config.vocab_size)
    fused = model(ids, labels=ids, fused_lm_head=True).log_probs
    assert torch.allclose(fused[fused != 0], plain[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16
@pytest.mark.parametrize(
    ("loss_type", "loss_weights", "count"),
    [
        ("sigmoid", None, 4),
        ("hinge", None, 4),
        ("ipo", None, 4),
        (["sigmoid", "hinge", "ipo"], [0.8, 0.3, 0.1], 4),
        (["sigmoid", "ipo"], None, 4),
        # One pair: trl averages the likelihood over the tokens of a batch, we over those of a pair, then over pairs.
        (["sigmoid", "sft"], [0.8, 0.5], 1),
        (["sft", "hinge"], None, 1),
    ],
)
def test_trl_dpo_loss_equals_ours(loss_type, loss_weights, count, tokenizer, make_trainer, tmp_path):
    policy, reference = tiny_llama(0), tiny_llama(1)
    rows = tiny_rows(count, paired=True)
    shared = {
        "loss_weights": loss_weights,
        "beta": 0.3,
        "per_device_train_batch_size": count,
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_length": 64,
    }
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "theirs"),
        loss_type=loss_type if isinstance(loss_type, list) else [loss_type],
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        **shared,
    )
    theirs = trl.DPOTrainer(
        policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    theirs.train()
    expected = theirs.state.log_history[0]["loss"]
    if isinstance(loss_type, str):
        options = DataOptions(max_length=64, max_prompt_length=32, paired=True)
        prepared, _ = prepare_dataset(rows, tokenizer, options, eos_ids=eos_token_ids(tokenizer, 1))
        batch = collate_pairs([paired(e) for e in collate_examples(list(prepared))["examples"]], pad_token_id=0)
        with torch.no_grad():
            ours, frozen = score(tiny_llama(0), batch), score(tiny_llama(1), batch)
        losses = dpo_loss(
            ours.chosen_logps,
            ours.rejected_logps,
            frozen.chosen_logps,
            frozen.rejected_logps,
            beta=0.3,
            loss_type=loss_type,
            chosen_lengths=ours.chosen_lengths,
            rejected_lengths=ours.rejected_lengths,
        ).losses
        assert losses.mean().item() == pytest.approx(expected, rel=1e-4)

    # The whole trainer on the same rows: its reference is the initial model, its policy is moved away from it.
    trainer = make_trainer("ours", model=tiny_llama(1), rows=rows, pair_source="paired", loss_type=loss_type, **shared)
    trainer.policy().load_state_dict(tiny_llama(0).state_dict())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16
def test_trl_reads_written_pairs(tokenizer, tmp_path):
    model, file = tmp_path / "model", tmp_path / "pairs.parquet"
    save_tiny(model, tokenizer=tokenizer)
    write_rows(tmp_path / "rows.jsonl", tiny_rows(6))
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "rows.jsonl"), "--max_length", "40"]
    more = ["--segment_length", "none", "--max_new_tokens", "30", "--use_cpu", "--output_file", str(file)]
    assert main(["generate", *flags, *more]) == 0
    written = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "theirs"), max_length=64, use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, report_to="none", max_steps=1,
    )  # fmt: skip
    theirs = trl.DPOTrainer(
        tiny_llama(), ref_model=tiny_llama(), args=args, train_dataset=written, processing_class=tokenizer
    )
    for row, own in zip(theirs.train_dataset, written, strict=True):
        assert row["prompt_ids"] == own["prompt_ids"]
        assert row["chosen_ids"] == own["chosen_ids"]
        # Text has no special tokens, so neither the end that a response may lack.
        plain = [token for token in own["rejected_ids"] if token not in tokenizer.all_special_ids]
        assert row["rejected_ids"][: len(plain)] == plain
    theirs.train()
