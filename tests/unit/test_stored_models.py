"""Laws of model folders: what is missing, damaged or another kind is refused in one line, before weights are read."""

import json
import logging

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from sapo import SAPOTrainer
from sapo.errors import ModelError, TokenizerError
from sapo.weights import description, loading
from tests.stored import change, named, reweigh
from tests.tiny import tiny_llama, tiny_rows


def test_a_weight_that_is_not_in_the_checkpoint_is_refused(folder, args, capfd):
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight.*random"):
        loading.load_policy(named(folder), args)
    save_file({**weights, "lm_head.weight": head[:5]}, folder / "model.safetensors", metadata={"format": "pt"})
    args.model_init_kwargs = {"ignore_mismatched_sizes": True}
    with pytest.raises(ModelError, match=r"lm_head\.weight.*random"):
        loading.load_policy(named(folder), args)
    assert "LOAD REPORT" not in capfd.readouterr().err
    change(folder / "config.json", tie_word_embeddings=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    args.model_init_kwargs = None
    model, _ = loading.load_policy(named(folder), args)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_incomplete_folder_is_refused_before_data_are_read(folder, args):
    (folder / "model.safetensors").rename(folder / "kept")
    with pytest.raises(ModelError, match="holds no weights"):
        loading.check_model(named(folder), args)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    (folder / "kept").rename(folder / "model-1.safetensors")
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors \(1 of 2"):
        loading.check_model(named(folder), args)
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(ModelError, match="not a file of this folder"):
        loading.check_model(named(folder), args)


@pytest.mark.parametrize("damage", [b"", b"damaged", b"\x07" + bytes(7) + b'{"a":1}'])
def test_damaged_weights_are_one_line(damage, folder, args):
    (folder / "model.safetensors").write_bytes(damage)
    with pytest.raises(ModelError, match=rf"model\.safetensors: .*\({len(damage)} bytes\)") as caught:
        loading.check_model(named(folder), args)
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"cannot be loaded|more than weights") as caught:
        loading.load_policy(named(folder), args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [0.5, 0.99])
def test_of_several_weight_files_the_one_that_was_cut_off_is_named(left, folder, args):
    tiny_llama().save_pretrained(folder, max_shard_size="4KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    size = shards[2].stat().st_size
    shards[2].write_bytes(shards[2].read_bytes()[: int(left * size)])
    with pytest.raises(ModelError, match=rf"{shards[2].name}: cut off \({int(left * size)} of {size} bytes\)"):
        loading.check_model(named(folder), args)


def test_a_link_that_leads_nowhere_is_named(folder, args):
    file = folder / "model.safetensors"
    file.unlink()
    file.symlink_to(folder / "blob")
    with pytest.raises(ModelError, match=r"model\.safetensors: a link to .*blob, which is not there"):
        loading.check_model(named(folder), args)


def test_of_two_models_in_a_folder_the_one_that_is_used_is_said(folder, args, caplog):
    tiny_llama(seed=1).save_pretrained(folder / "other", max_shard_size="4KB")
    for file in (folder / "other").glob("model*"):
        file.rename(folder / file.name)
    with caplog.at_level(logging.WARNING):
        model, _ = loading.load_policy(named(folder), args)
    assert "The first is used" in caplog.text
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


def test_what_is_left_of_a_model_in_several_files_does_no_harm(folder, args, caplog):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    loading.check_model(named(folder), args)
    loading.load_policy(named(folder), args)
    assert "used" not in caplog.text


def test_a_file_of_torch_that_could_run_code_is_refused_as_such(folder, args, tmp_path):
    class Opens:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(2), "more": Opens()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"more than weights.*never loaded\. Use a checkpoint in safetensors"):
        loading.load_policy(named(folder), args)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "/nowhere/model", "runs/mine/policy", "mine/checkpoint-500", "mine/model/"]
)
def test_a_missing_folder_is_said_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)
    with pytest.raises(ModelError, match="no such model folder"):
        description.read_config(name)


@pytest.mark.parametrize(
    ("cause", "says", "never"),
    [
        (LocalEntryNotFoundError("not found"), "hub cannot be reached", "log in"),
        (RepositoryNotFoundError, "no such model on the hub", "cannot be reached"),
    ],
)
def test_what_the_hub_answers_decides_the_advice(cause, says, never, monkeypatch):
    def answer(*_, **__):
        error = cause
        if isinstance(cause, type):
            error = cause.__new__(cause)
            Exception.__init__(error, "401")
        raise OSError("transformers' long advice") from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", answer)
    with pytest.raises(ModelError, match=says) as caught:
        description.read_config("owner/name")
    assert never not in str(caught.value)
    assert "folder is complete" not in str(caught.value)


def test_a_model_that_does_not_generate_is_refused(folder, args):
    change(folder / "config.json", model_type="t5")
    with pytest.raises(ModelError, match="t5 is not a causal language model"):
        loading.check_model(named(folder), args)


OTHER_KINDS = {
    "encoder-decoder": (BartForConditionalGeneration, BartConfig, {"d_model": 16}, "an encoder with a decoder"),
    "masked": (BertForMaskedLM, BertConfig, {"hidden_size": 16}, "saved as BertForMaskedLM"),
    "masked, anonymous": (BertForMaskedLM, BertConfig, {"hidden_size": 16}, "both directions"),
    "classifier": (LlamaForSequenceClassification, LlamaConfig, {"hidden_size": 16}, "LlamaForSequenceClassification"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_model_of_another_kind_is_refused_by_every_loader(kind, tmp_path, args):
    """transformers would load each as a causal language model, some without a missing weight."""
    made, config, size, said = OTHER_KINDS[kind]
    small = {name: 2 for name in config().to_dict() if name.endswith(("_heads", "_layers"))}
    wide = {name: 16 for name in config().to_dict() if name.endswith(("ffn_dim", "intermediate_size"))}
    made(config(vocab_size=63, pad_token_id=0, **small, **wide, **size)).save_pretrained(tmp_path / "model")
    if kind.endswith("anonymous"):
        change(tmp_path / "model" / "config.json", architectures=None)
    for call in (
        lambda: loading.check_model(named(tmp_path / "model"), args),
        lambda: description.read_config(str(tmp_path / "model")),
        lambda: loading.load_frozen(str(tmp_path / "model")),
    ):
        with pytest.raises(ModelError, match=rf"{said}.*Use a model that generates text"):
            call()


def test_a_bidirectional_model_made_a_decoder_is_taken(tmp_path):
    config = BertConfig(
        vocab_size=63, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "model")
    assert description.read_config(str(tmp_path / "model")).is_decoder


@pytest.mark.parametrize("method", ["modelopt", "no-such", None])
def test_a_quantization_that_transformers_does_not_know_is_refused_everywhere(method, folder, args):
    """transformers warns and loads the codes as weights."""
    change(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    for call in (
        lambda: loading.load_policy(named(folder, use_peft=True), args),
        lambda: loading.load_frozen(str(folder)),
    ):
        with pytest.raises(ModelError, match=rf"{method or 'by an unnamed method'}\), which transformers would take"):
            call()


@pytest.mark.parametrize(("stored", "scales"), [(torch.int8, False), (torch.uint8, True), (torch.float8_e4m3fn, True)])
def test_codes_without_a_quantization_config_are_refused(stored, scales, folder, args):
    name = "model.layers.0.mlp.up_proj.weight"
    more = {f"{name}_scale_inv": torch.ones(1)} if scales else {}
    reweigh(folder / "model.safetensors", lambda weights: weights | {name: (weights[name] * 100).to(stored)} | more)
    for adapter in (False, True):
        with pytest.raises(ModelError, match=rf"{name} is stored as .*no quantization_config"):
            loading.load_policy(named(folder, use_peft=adapter), args)


def test_float8_weights_without_scales_are_weights(folder, args):
    file, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    reweigh(file, lambda weights: weights | {name: weights[name].to(torch.float8_e4m3fn)})
    model, _ = loading.load_policy(named(folder), args)
    assert torch.equal(model.state_dict()[name], load_file(file)[name].float())


def test_weights_of_another_shape_than_the_configuration_are_one_line(folder, args, capfd):
    change(folder / "config.json", hidden_size=32)
    with pytest.raises(ModelError, match=r"other shapes than config\.json says"):
        loading.load_policy(named(folder), args)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"eos_token_id": "stop"}, "eos_token_id stop"),
        ({"eos_token_id": [1, "stop"]}, "must be a token id"),
        ([], "generation_config.json cannot be used"),
        ({"cache_implementation": "attic"}, "Invalid `cache_implementation`"),
    ],
)
def test_a_generation_config_that_is_none_is_one_line(content, said, folder):
    (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=said):
        description.generation_eos_ids(str(folder), "main", description.read_config(str(folder)))


def test_a_tokenizer_that_is_not_there_is_a_tokenizer_error(folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(TokenizerError, match="tokenizer"):
        description.load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {**weights, "model.layers.2.mlp.up_proj.weight": torch.zeros(3)},
        lambda weights: {**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(16)},
        lambda weights: {name.replace("lm_head", "output"): weight for name, weight in weights.items()},
        lambda weights: {f"module.{name}": weight for name, weight in weights.items()},
    ],
    ids=["another layer", "a bias", "another name", "a prefix"],
)
def test_weights_that_the_model_would_leave_out_of_itself_are_refused(change, folder, args):
    reweigh(folder / "model.safetensors", change)
    with pytest.raises(ModelError, match=r"(layers\.2|q_proj\.bias|output\.weight|module\.lm_head).*no place"):
        loading.load_policy(named(folder), args)


def test_weights_beside_the_model_are_left_out_and_said(folder, args, caplog):
    change(folder / "config.json", architectures=["LlamaWithSeveralHeads"])
    reweigh(folder / "model.safetensors", lambda weights: {**weights, "heads.0.linear.weight": torch.zeros(3)})
    loading.load_policy(named(folder), args)
    assert "saved as LlamaWithSeveralHeads, which transformers lacks; used as LlamaForCausalLM" in caplog.text
    assert "1 weights of the checkpoint are not used, such as heads.0.linear.weight" in caplog.text


def test_a_head_of_its_own_is_said_in_the_configuration(folder, args, tmp_path):
    change(folder / "config.json", tie_word_embeddings=True)
    model, _ = loading.load_policy(named(folder), args)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, folder, args):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return weights

    reweigh(folder / "model.safetensors", spoil)
    said = rf"{folder}: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"
    with pytest.raises(ModelError, match=said):
        SAPOTrainer(str(folder), args, tiny_rows())
    with pytest.raises(ModelError, match=said):
        loading.load_frozen(str(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(file, folder, args):
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises((ModelError, TokenizerError), match=rf"{file}: .*git lfs pull"):
        SAPOTrainer(str(folder), args, tiny_rows())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": "16"}, "expected int, got str"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"hidden_act": "gelu_super"}, "gelu_super"),
        ({"dtype": "float17"}, "float17"),
        ({"vocab_size": None}, "vocab_size"),
        ({"pad_token_id": 900}, "Padding_idx"),
    ],
)
def test_a_configuration_that_makes_no_model_is_one_line(changes, says, folder, args):
    change(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"{folder}.*{says}.*Correct config\.json\."):
        loading.check_model(named(folder), args)


def test_codes_in_a_file_of_torch_are_refused(folder, args):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    loading.check_model(named(folder), args)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: model\.layers\.0\.mlp\.up_proj\.weight is stored as I8"):
        loading.check_model(named(folder), args)


def test_a_generation_config_that_cannot_be_read_is_not_one_that_is_missing(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 1')
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read.*remove it"):
        description.load_generation_config(str(folder))
    (folder / "generation_config.json").unlink()
    assert description.load_generation_config(str(folder)).eos_token_id == 1
