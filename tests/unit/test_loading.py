"""Laws of the loader: the options of a model, where weights are placed, what it switches off."""

import logging
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.integrations import HfDeepSpeedConfig

from sapo import SAPOConfig, SAPOTrainer
from sapo.errors import ConfigurationError, ModelError
from sapo.weights import description, loading
from sapo.weights.policy import adapter_config, disable_dropout, with_adapter
from sapo.weights.roles import Roles
from sapo.weights.rounding import rounded
from tests.stored import change, named
from tests.tiny import tiny_llama, tiny_rows


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


def test_an_adapter_keeps_the_revision_of_its_base(folder):
    made = adapter_config(named("owner/name", use_peft=True, model_revision="v9"))
    assert made.revision == "v9"
    assert adapter_config(named(folder, use_peft=True)).revision is None


def test_nothing_to_train_is_refused(args):
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing would be trained"):
        with_adapter(model, None, args)


def test_unknown_target_modules_name_those_that_exist(args):
    for wanted in (["q_proj", "query"], "no.*such"):
        with pytest.raises(ConfigurationError, match="down_proj, gate_proj, k_proj, lm_head") as caught:
            with_adapter(tiny_llama(), LoraConfig(target_modules=wanted), args)
        assert "\n" not in str(caught.value)


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


def test_evaluation_rows_that_are_trained_on_are_said_in_python_too(folder, args, caplog):
    rows = tiny_rows()
    SAPOTrainer(str(folder), args, rows, {"old": rows[:3], "new": tiny_rows(4, seed=9)})
    assert caplog.text.count("evaluation rows are training rows too") == 1
    assert "3 of 3 evaluation rows" in caplog.text


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


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_copies_are_where_deepspeed_will_take_the_policy(stage, bf16, args, monkeypatch):
    """Trainer leaves a model that was passed in on the host; "meta" stands for the device."""
    monkeypatch.setattr(SAPOConfig, "device", torch.device("meta"))
    monkeypatch.setattr("sapo.weights.roles.zero_stage", lambda accelerator: stage)
    args.bf16 = bf16
    policy = tiny_llama()
    roles = Roles(policy, args, Accelerator(cpu=True), lambda: policy)
    for role in (policy, roles.opponent.model, roles.reference.model):
        assert {weight.device.type for weight in role.parameters()} == {"meta"}
        assert {weight.dtype for weight in role.parameters()} == {torch.bfloat16 if bf16 else torch.float32}
        assert {buffer.device.type for buffer in role.buffers()} == {"meta"}
        assert {buffer.dtype for buffer in role.buffers()} == {torch.float32}


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


def test_a_float32_folder_loaded_in_bfloat16_keeps_steps_below_a_rounding_error(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    start = {name: weight.float() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.float().parameters():
            weight.mul_(1 + 2**-11)  # an eighth of the way to the next bfloat16 number, or less
    model.save_pretrained(tmp_path / "run")
    exact = model.state_dict()
    loaded = loading.load_frozen(str(tmp_path / "run"), dtype="bfloat16", device="cpu").state_dict()
    assert loaded.keys() == exact.keys()
    for name, weight in exact.items():
        assert torch.equal(loaded[name], rounded(weight, torch.bfloat16)), name
        assert torch.equal(weight.bfloat16().float(), start[name]), name
    stored = loading.load_frozen(str(tmp_path / "run"), device="cpu").state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in exact.items())
