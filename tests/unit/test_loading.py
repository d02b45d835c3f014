"""Laws of the loader: what it refuses and how it says so, where weights are placed, what it switches off."""

import json
import logging
from importlib.util import find_spec

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.integrations import HfDeepSpeedConfig
from trl import ModelConfig

from sapo import SAPOConfig, SAPOTrainer
from sapo.errors import CheckpointError, ConfigurationError, ModelError, TokenizerError
from sapo.runs.files import folder_digest
from sapo.weights import description, loading
from sapo.weights.policy import adapter_config, disable_dropout, with_adapter
from sapo.weights.source import find_source, other_base
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer


@pytest.fixture
def args(tmp_path):
    return SAPOConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", max_length=32, gradient_checkpointing=False
    )


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(folder, tmp_path):
    model = get_peft_model(loading.load_frozen(str(folder)), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def named(folder, **options):
    return ModelConfig(model_name_or_path=str(folder), **options)


# ---- What is refused, and how ----


def test_a_leftover_adapter_configuration_is_refused(folder, args):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"config\.json and adapter_config\.json.*Remove"):
        loading.check_model(named(folder), args)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors"])
def test_quantized_weights_are_refused_for_full_training_before_loading(method, folder, args, monkeypatch):
    change(folder / "config.json", quantization_config={"quant_method": method})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for call in (loading.check_model, loading.load_policy):
        with pytest.raises(ModelError, match=rf"{method}.*--use_peft"):
            call(named(folder), args)
    with pytest.raises(ModelError, match=method):
        SAPOTrainer(str(folder), args, tiny_rows())
    loading.check_model(named(folder, use_peft=True), args)


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


def test_an_adapter_that_was_cut_off_is_named(adapter, args):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: cut off"):
        loading.check_model(named(adapter), args)


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
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    codes = {name: (weights[name] * 100).to(stored)} | ({f"{name}_scale_inv": torch.ones(1)} if scales else {})
    save_file(weights | codes, file, metadata={"format": "pt"})
    for adapter in (False, True):
        with pytest.raises(ModelError, match=rf"{name} is stored as .*no quantization_config"):
            loading.load_policy(named(folder, use_peft=adapter), args)


def test_float8_weights_without_scales_are_weights(folder, args):
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, file, metadata={"format": "pt"})
    model, _ = loading.load_policy(named(folder), args)
    assert torch.equal(model.state_dict()[name], weights[name].to(torch.float8_e4m3fn).float())


def test_weights_of_another_shape_than_the_configuration_are_one_line(folder, args, capfd):
    change(folder / "config.json", hidden_size=32)
    with pytest.raises(ModelError, match=r"other shapes than config\.json says"):
        loading.load_policy(named(folder), args)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_vision_language_model_trains_as_text_and_says_so(tmp_path, args, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = {"vocab_size": 63, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 16}, mm_tokens_per_image=4
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        loading.load_policy(named(tmp_path / "model"), args)
    assert "trained as a language model" in caplog.text


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


def reweigh(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


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
    reweigh(folder, change)
    with pytest.raises(ModelError, match=r"(layers\.2|q_proj\.bias|output\.weight|module\.lm_head).*no place"):
        loading.load_policy(named(folder), args)


def test_weights_beside_the_model_are_left_out_and_said(folder, args, caplog):
    change(folder / "config.json", architectures=["LlamaWithSeveralHeads"])
    reweigh(folder, lambda weights: {**weights, "heads.0.linear.weight": torch.zeros(3)})
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

    reweigh(folder, spoil)
    said = rf"{folder}: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"
    with pytest.raises(ModelError, match=said):
        SAPOTrainer(str(folder), args, tiny_rows())
    with pytest.raises(ModelError, match=said):
        loading.load_frozen(str(folder))


def test_an_adapter_that_is_not_finite_is_named_and_not_its_base(adapter, args):
    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] * float("nan")}, adapter / "adapter_model.safetensors")
    for load in (lambda: loading.load_policy(named(adapter), args), lambda: loading.load_frozen(str(adapter))):
        with pytest.raises(ModelError, match=rf"^{adapter}: .*lora_A.*NaN"):
            load()


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


def test_a_model_stored_quantized_is_not_quantized_again_and_may_generate(folder, args):
    change(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigurationError, match=r"load_in_4bit with .*gptq.*Leave it out"):
        loading.check_model(named(folder, use_peft=True, load_in_4bit=True), args)
    loading.check_model(named(folder), args, trains=False)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_type_of_weights_has_two_names(name, folder, args):
    args.model_init_kwargs = {name: "bfloat16"}
    assert loading.load_named_policy(str(folder), args, adapter=False).dtype == torch.bfloat16
    with pytest.raises(ConfigurationError, match="sets dtype, which has an option of its own: --dtype bfloat16"):
        loading.load_policy(named(folder), args)


def test_what_is_on_this_machine_has_no_revision(folder, adapter):
    for name in (folder, adapter):
        with pytest.raises(ModelError, match="has no revision v9"):
            find_source(str(name), "v9")
    change(adapter / "adapter_config.json", revision="v9")
    assert find_source(str(adapter)).revision == "main"


def test_an_adapter_keeps_the_revision_of_its_base(folder):
    made = adapter_config(named("owner/name", use_peft=True, model_revision="v9"))
    assert made.revision == "v9"
    assert adapter_config(named(folder, use_peft=True)).revision is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"attn_implementation": "magic"}, "attn_implementation is none that transformers has.*Use sdpa or eager"),
        ({"wrong": 1}, "model_init_kwargs or config.json has what the model does not take"),
        ({"subfolder": "part"}, "Name the folder itself"),
    ],
)
def test_what_from_pretrained_does_not_take_is_said_with_its_option(given, says, folder, args):
    args.model_init_kwargs = given
    with pytest.raises((ModelError, ConfigurationError), match=says):
        loading.load_named_policy(str(folder), args, adapter=False)


def test_a_revision_is_named_once_for_all_parts_of_a_model(folder, args):
    args.model_init_kwargs = {"revision": "v2"}
    with pytest.raises(ConfigurationError, match=r"model_init_kwargs sets revision.*--model_revision v2"):
        loading.load_policy(named(folder), args)


def test_a_generation_config_that_cannot_be_read_is_not_one_that_is_missing(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 1')
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read.*remove it"):
        description.load_generation_config(str(folder))
    (folder / "generation_config.json").unlink()
    assert description.load_generation_config(str(folder)).eos_token_id == 1


def test_nothing_to_train_is_refused(args):
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing would be trained"):
        with_adapter(model, None, args)


def test_unknown_target_modules_name_those_that_exist(args):
    for wanted in (["q_proj", "query"], "no.*such"):
        with pytest.raises(ConfigurationError, match="down_proj, gate_proj, k_proj, lm_head") as caught:
            with_adapter(tiny_llama(), LoraConfig(target_modules=wanted), args)
        assert "\n" not in str(caught.value)


# ---- Adapters ----


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


def test_evaluation_rows_that_are_trained_on_are_said_in_python_too(folder, args, caplog):
    rows = tiny_rows()
    SAPOTrainer(str(folder), args, rows, {"old": rows[:3], "new": tiny_rows(4, seed=9)})
    assert caplog.text.count("evaluation rows are training rows too") == 1
    assert "3 of 3 evaluation rows" in caplog.text


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


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        (["embed_tokens"], {"embed_tokens"}),
        ([".*[qk]_proj"], {"q_proj", "k_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_one_target_module_is_found_by_name_like_several(given, found, folder, args):
    model, config = loading.load_policy(named(folder, use_peft=True, lora_target_modules=given), args)
    policy = with_adapter(model, config, args)
    assert {name.rpartition(".")[2] for name in policy.targeted_module_names} == found


def test_an_adapter_without_some_of_its_weights_is_refused(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter / "adapter_model.safetensors")
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
    weights = load_file(adapter / "adapter_model.safetensors")
    more = {
        name.replace("layers.1", "layers.2"): weight.clone() for name, weight in weights.items() if "layers.1" in name
    }
    save_file(weights | more, adapter / "adapter_model.safetensors")
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


# ---- Placement ----


@pytest.fixture
def on_gpu(args, monkeypatch):
    """What a process sees on a machine with GPUs, for code that asks without touching one."""

    def see(device, visible=1):
        args.use_cpu = False
        monkeypatch.setattr(SAPOConfig, "device", torch.device(device))
        args._n_gpu = visible
        return args

    return see


@pytest.fixture
def device_maps(monkeypatch):
    """What `from_pretrained` is told; the weights stay where they are."""
    seen, load = [], AutoModelForCausalLM.from_pretrained

    def spy(*given, device_map="not given", **options):
        seen.append(device_map)
        return load(*given, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    return seen


def loaded_by_name_and_by_options(folder, args):
    loading.load_policy(named(folder), args)
    loading.load_policy(named(folder, use_peft=True), args)
    loading.load_named_policy(str(folder), args, adapter=False)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:3", "xpu:1"])
def test_a_full_model_goes_to_the_device_of_its_process(device, folder, on_gpu, device_maps):
    # One process, DDP, ZeRO-1, ZeRO-2: each holds everything on its own device.
    loaded_by_name_and_by_options(folder, on_gpu(device))
    assert device_maps == [{"": torch.device(device)}] * 3


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no deepspeed")


@needs_deepspeed
def test_zero3_places_its_shards_itself(folder, on_gpu, device_maps, monkeypatch):
    configuration = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert configuration.is_zero3()
    assert loading.device_map(on_gpu("cuda:1")) is None


@needs_deepspeed
def test_zero2_does_not_shard_weights(on_gpu):
    configuration = HfDeepSpeedConfig({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1})
    assert not configuration.is_zero3()
    assert loading.device_map(on_gpu("cuda:1")) == {"": torch.device("cuda:1")}


def test_fsdp2_places_its_shards_itself(folder, on_gpu, device_maps, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    loaded_by_name_and_by_options(folder, on_gpu("cuda:1"))
    assert device_maps == [None] * 3


def test_a_processor_is_left_to_trainer(folder, args, device_maps):
    loaded_by_name_and_by_options(folder, args)
    assert device_maps == [None] * 3


def test_a_user_does_not_place_weights(folder, args):
    args.model_init_kwargs = {"device_map": "auto"}
    with pytest.raises(ConfigurationError, match="device_map"):
        loading.load_policy(named(folder), args)


def test_one_process_uses_one_of_several_gpus_and_says_so(on_gpu, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(loading.logger, "propagate", True)
    args = on_gpu("cuda:0", visible=4)
    assert args.train_batch_size == 4 * args.per_device_train_batch_size
    loading.use_one_device(args)
    assert args.n_gpu == 1
    # What Trainer wraps in nn.DataParallel, and multiplies the batch by.
    assert args.train_batch_size == args.per_device_train_batch_size
    loading.use_one_device(args)
    (message,) = [record.getMessage() for record in caplog.records if "GPUs are visible" in record.getMessage()]
    assert message.startswith("4 GPUs are visible and one is used (cuda:0)")
    assert "sapo train ... --accelerate_config multi_gpu" in message


def test_trainer_leaves_one_of_several_gpus_in_one_piece(make_trainer, monkeypatch):
    """With two GPUs counted, Trainer would wrap the model in DataParallel."""
    counted = SAPOConfig.__post_init__

    def two(self):
        counted(self)
        self._n_gpu = 2

    monkeypatch.setattr(SAPOConfig, "__post_init__", two)
    trainer = make_trainer(max_steps=1)
    assert trainer.args.n_gpu == 1
    assert not isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel)
    trainer.train()


# ---- What is switched off ----


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_router_logits_are_switched_off(tmp_path, args):
    config = MixtralConfig(
        vocab_size=63, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64, output_router_logits=True,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    model, _ = loading.load_policy(named(tmp_path / "moe"), args)
    assert model.config.output_router_logits is False
    assert description.read_config(str(tmp_path / "moe")).output_router_logits is False
    # Also of a model that the user has loaded.
    model.config.output_router_logits = True
    assert with_adapter(model, None, args).config.output_router_logits is False


SMALL = {"vocab_size": 63, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_llama(attention_dropout=0.5),
        lambda: GraniteForCausalLM(
            GraniteConfig(**SMALL, intermediate_size=16, num_key_value_heads=2, attention_dropout=0.5)
        ),
        lambda: OPTForCausalLM(
            OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
        ),
    ],
    ids=["llama", "granite", "opt"],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_dropout_training_computes_what_evaluation_does(build, attention):
    model = build().train()
    model.set_attn_implementation(attention)
    inputs = torch.arange(3, 30).unsqueeze(0)
    assert not torch.equal(model(inputs).logits, model(inputs).logits)
    disable_dropout(model)
    assert torch.equal(model(inputs).logits, model.eval()(inputs).logits)


def test_without_dropout_an_adapter_has_none_either():
    model = get_peft_model(tiny_llama(attention_dropout=0.5), LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    disable_dropout(model.train())
    inputs = torch.arange(3, 30).unsqueeze(0)
    assert torch.equal(model(inputs).logits, model.eval()(inputs).logits)


# ---- Digest ----


def test_a_digest_sees_every_byte_and_not_the_folder(tmp_path):
    def digest(name, content, file="a.safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content)
        (tmp_path / name / "other.txt").write_text(name)
        return folder_digest(tmp_path / name, ("*.safetensors",))

    content = bytes(3 << 20)
    middle = content[: 1 << 20] + b"\1" + content[(1 << 20) + 1 :]
    assert digest("one", content) == digest("two", content)
    assert len({digest("three", content), digest("four", middle), digest("five", content, "b.safetensors")}) == 3
    assert folder_digest(tmp_path, ("*.safetensors",)) is None
