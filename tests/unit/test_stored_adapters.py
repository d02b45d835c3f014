"""Laws of adapter folders: what is refused and how it says so, and the base that an adapter belongs to."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from sapo import SAPOConfig, SAPOTrainer
from sapo.errors import CheckpointError, ConfigurationError, ModelError
from sapo.weights import loading
from sapo.weights.source import find_source, other_base
from tests.stored import change, named, reweigh
from tests.tiny import tiny_llama, tiny_rows


def test_a_leftover_adapter_configuration_is_refused(folder, args):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"config\.json and adapter_config\.json.*Remove"):
        loading.check_model(named(folder), args)


def test_an_adapter_that_was_cut_off_is_named(adapter, args):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: cut off"):
        loading.check_model(named(adapter), args)


def test_an_adapter_that_is_not_finite_is_named_and_not_its_base(adapter, args):
    reweigh(
        adapter / "adapter_model.safetensors",
        lambda weights: {name: weight * float("nan") for name, weight in weights.items()},
    )
    for load in (lambda: loading.load_policy(named(adapter), args), lambda: loading.load_frozen(str(adapter))):
        with pytest.raises(ModelError, match=rf"^{adapter}: .*lora_A.*NaN"):
            load()


def test_what_is_on_this_machine_has_no_revision(folder, adapter):
    for name in (folder, adapter):
        with pytest.raises(ModelError, match="has no revision v9"):
            find_source(str(name), "v9")
    change(adapter / "adapter_config.json", revision="v9")
    assert find_source(str(adapter)).revision == "main"


def test_a_stored_adapter_is_trained_on(adapter, folder, args):
    model, new = loading.load_policy(named(adapter), args)
    assert new is None
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    loading.check_model(named(adapter), args)
    with pytest.raises(ConfigurationError, match="leave use_peft out"):
        loading.check_model(named(adapter, use_peft=True), args)
    trainer = SAPOTrainer(str(adapter), args, tiny_rows())
    assert trainer.is_adapter()
    assert loading.with_stored_adapter(named(adapter), merge=False).lora_r == 4


def test_an_adapter_computes_with_its_own_weights(adapter, folder):
    inputs = torch.tensor([[5, 6, 7]])
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()(inputs).logits
    got = loading.load_frozen(str(adapter))(inputs).logits
    assert torch.equal(got, expected)
    assert not torch.equal(got, loading.load_frozen(str(folder))(inputs).logits)


def test_an_adapter_of_another_base_is_said(adapter, folder, tmp_path, caplog):
    other = tmp_path / "other"
    tiny_llama(seed=1).save_pretrained(other)
    loading.load_adapter(loading.load_frozen(str(other)), str(adapter))
    assert f"adapter: was trained on {folder}, and is put on {other}." in caplog.text
    caplog.clear()
    loading.load_adapter(loading.load_frozen(str(folder)), str(adapter))
    assert "was trained on" not in caplog.text


@pytest.mark.parametrize(
    ("named", "base", "is_other"),
    [
        ("owner/small", "/cache/models--owner--small/snapshots/0123", False),
        ("/gone/small", "owner/Small", False),
        ("/gone/small", "owner/large", True),
        ("owner/small", "owner/large", True),
        ("", "owner/large", False),
        (None, "", False),
    ],
)
def test_bases_are_compared_by_what_a_move_leaves(named, base, is_other):
    assert other_base({"base_model_name_or_path": named}, base) == (named if is_other else None)


@pytest.mark.parametrize("part", ["run", "run/opponent", "run/checkpoint-1"])
def test_a_base_that_changed_after_its_adapter_was_trained_is_said_and_not_resumed_on(part, folder, tmp_path, caplog):
    def trained(checkpoint=None):
        args = SAPOConfig(
            output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", max_length=32, max_steps=2, save_steps=1,
            segment_length=4, per_device_train_batch_size=2, report_pairs=0, chosen_probe_size=0, disable_tqdm=True,
        )  # fmt: skip
        made = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = SAPOTrainer(str(folder), args, tiny_rows(), peft_config=made)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()

    trained()
    folder = folder.rename(tmp_path / "moved")
    folder.rename(tmp_path / "model")
    folder = tmp_path / "model"
    loading.load_frozen(str(tmp_path / part))
    assert "have changed" not in caplog.text
    tiny_llama(seed=1).save_pretrained(folder)
    loading.load_frozen(str(tmp_path / part))
    assert "have changed since this adapter was trained" in caplog.text
    if part.endswith("1"):
        with pytest.raises(CheckpointError, match="base_weights: the weights of the base model have changed"):
            trained(str(tmp_path / part))
        (tmp_path / part / "base_weights.json").write_text("[]")
        with pytest.raises(ModelError, match=r"base_weights\.json: cannot be read"):
            loading.load_frozen(str(tmp_path / part))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 8}, "other shapes than adapter_config.json says"),
        ({"target_modules": ["q_proj", "v_proj"]}, "lacks weights that adapter_config.json asks for"),
        ({"lora_alpha": "many"}, "Correct adapter_config.json"),
    ],
)
def test_an_adapter_with_the_configuration_of_another_is_told_so(changes, says, adapter, args):
    change(adapter / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=says):
        loading.load_policy(named(adapter), args)


def test_an_adapter_without_some_of_its_weights_is_refused(adapter):
    reweigh(adapter / "adapter_model.safetensors", lambda weights: dict(sorted(weights.items())[1:]))
    with pytest.raises(ModelError, match="missing adapter keys"):
        loading.load_frozen(str(adapter))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING.*Use a LoRA adapter"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING.*Use a LoRA adapter"),
        ({"peft_type": "SUPERLORA"}, "no adapters of type SUPERLORA.*--upgrade peft"),
        ({"task_type": "SEQ_CLS"}, "task_type is SEQ_CLS"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_every_loader(changes, says, adapter, args):
    change(adapter / "adapter_config.json", **changes)
    for load in (lambda: loading.load_policy(named(adapter), args), lambda: loading.load_frozen(str(adapter))):
        with pytest.raises(ModelError, match=says):
            load()


def test_an_adapter_of_lora_with_biases_says_what_to_do(folder, args, tmp_path):
    model = get_peft_model(loading.load_frozen(str(folder)), LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    model.save_pretrained(tmp_path / "biased")
    with pytest.raises(ConfigurationError, match=r"LORA with bias=all.*--adapter merge"):
        SAPOTrainer(str(tmp_path / "biased"), args, tiny_rows()).train()


def test_an_adapter_of_another_base_is_refused(adapter, args, tmp_path):
    reweigh(
        adapter / "adapter_model.safetensors",
        lambda weights: {
            name.replace("layers.1", layer): weight.clone()
            for layer in ("layers.1", "layers.2")
            for name, weight in weights.items()
        },
    )
    with pytest.raises(ModelError, match=r"no place for .*layers\.2.* and 1 more weights of the adapter"):
        loading.load_frozen(str(adapter))
    config = GPTNeoXConfig(
        vocab_size=63, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "other")
    change(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ModelError, match=r"does not fit .*other .*no module q_proj.*adapter_config\.json"):
        loading.check_model(named(adapter), args)


def test_an_adapter_without_a_file_of_weights_is_refused_without_asking_the_hub(adapter, args):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks adapter_model\.safetensors"):
        loading.check_model(named(adapter), args)


def test_the_base_of_an_adapter_is_checked(adapter, tmp_path):
    change(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"adapter_config\.json names the base model .*gone"):
        find_source(str(adapter))
    change(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="base_model_name_or_path is missing"):
        find_source(str(adapter))
