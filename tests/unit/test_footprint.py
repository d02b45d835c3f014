"""Laws of the memory of models: what is counted from a configuration is what a run makes of it."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

from sapo import SAPOConfig
from sapo.weights.footprint import Strategy, build_run_models, gather_shell_memory, gradient_memory, model_memory
from tests.tiny import tiny_llama
from tests.unit.test_shared_prefix import ARCHITECTURES, UNABLE

CONFIGS = Path(__file__).parents[1] / "configs"
PARAMETERS = {"llama-3-8b": 8_030_261_248, "mistral-7b-v0.1": 7_241_732_096}
"""As the hub counts the weights of meta-llama/Meta-Llama-3-8B and mistralai/Mistral-7B-v0.1."""
ALONE = Strategy()


def published(name):
    content = json.loads((CONFIGS / f"{name}.json").read_text())
    return AutoConfig.for_model(content.pop("model_type"), **content)


def options(**more):
    return SAPOConfig(output_dir="unused", use_cpu=True, report_to="none", **more)


def parts(config, *, strategy=ALONE, model=None, **more):
    args, model_args = options(**more), ModelConfig(**(model or {}))
    return model_memory(build_run_models(config, model_args, args, strategy))


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_counted_from_a_configuration_are_those_of_the_model(name):
    roles = build_run_models(ARCHITECTURES[name], ModelConfig(), options(), ALONE)
    counted = sum(weight.numel() for weight in roles.trained)
    assert counted == AutoModelForCausalLM.from_config(ARCHITECTURES[name]).num_parameters()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_the_parameters_that_they_are_known_for(name):
    roles = build_run_models(published(name), ModelConfig(dtype="bfloat16"), options(bf16=True), ALONE)
    assert sum(weight.numel() for weight in roles.trained) == PARAMETERS[name]


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_adapter_parameters_are_those_that_peft_makes(targets):
    model = {"use_peft": True, "lora_r": 4, "lora_target_modules": targets}
    roles = build_run_models(ARCHITECTURES["llama"], ModelConfig(**model), options(), ALONE)
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    made = get_peft_model(AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]), lora)
    assert sum(weight.numel() for weight in roles.trained) == made.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"reference": "opponent"},
        {"objective": "orpo", "optim": "rmsprop"},
        {"lora": True},
        {"lora": True, "reference": "initial"},
        {"pair_source": "paired", "optim": "sgd"},
    ],
    ids=str,
)
def test_what_is_counted_is_what_a_run_holds(given, make_trainer):
    lora = given.get("lora", False)
    more = {key: value for key, value in given.items() if key != "lora"}
    rows = None
    if "pair_source" in given:
        rows = [{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5 w6"}] * 8
    trainer = make_trainer(lora=lora, rows=rows, max_steps=1, **more)
    config = tiny_llama().config
    trainer.train()
    model = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"} if lora else {}
    found = parts(config, model=model, **more)
    roles = {"opponent": trainer.opponent, "reference": trainer.reference}
    if trainer.reference is trainer.opponent:
        del roles["reference"]
    expected = {name: size(role.tensors().values()) for name, role in roles.items() if role is not None}
    expected["optimizer"] = sum(
        size(v for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
        for state in trainer.optimizer.state.values()
    )
    policy = dict(trainer.policy().named_parameters())
    expected["gradients"] = size(weight for weight in policy.values() if weight.requires_grad)
    expected["policy"] = size(weight for name, weight in policy.items() if "lora_" not in name)
    expected["policy's adapter"] = expected["gradients"] if lora else 0
    assert found == {name: bytes_ for name, bytes_ in expected.items() if bytes_}


def test_the_live_reference_is_one_model_fewer():
    config = ARCHITECTURES["llama"]
    three, two = parts(config), parts(config, reference="opponent")
    assert three.pop("reference") == three["policy"]
    assert three == two


def test_a_float32_master_is_counted_where_one_is_kept():
    config = ARCHITECTURES["llama"]
    slow = parts(config, model={"dtype": "bfloat16"}, bf16=True, ema_decay=0.9)
    assert slow["opponent's float32 master"] == 2 * slow["opponent"]
    fast = parts(config, model={"dtype": "bfloat16"}, bf16=True, ema_decay=0.0)
    assert "opponent's float32 master" not in fast


@pytest.mark.parametrize("name", ["none", "multi_gpu"])
def test_bfloat16_weights_are_stepped_in_float32(name):
    config, half = ARCHITECTURES["llama"], {"model": {"dtype": "bfloat16"}, "bf16": True, "strategy": Strategy(name, 2)}
    found, whole = parts(config, **half), parts(config)
    assert found["float32 master"] == 2 * found["policy"] == whole["policy"]
    assert found["optimizer"] == whole["optimizer"]
    assert "float32 master" not in whole
    # An adapter's weights are float32 already.
    assert "float32 master" not in parts(config, **half | {"model": {"dtype": "bfloat16", "use_peft": True}})


@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_sharding_divides_every_model_and_the_optimizer(name):
    config = ARCHITECTURES["llama"]
    whole = parts(config, optim="sgd" if name == "zero3" else "adamw_torch")
    cut = parts(config, strategy=Strategy(name, 8), optim="sgd" if name == "zero3" else "adamw_torch")
    for part in ("policy", "opponent", "reference"):
        assert cut[part] == pytest.approx(whole[part] / 8, abs=1)
    if name == "fsdp2":
        assert cut["optimizer"] == pytest.approx(whole["optimizer"] / 8, abs=1)
        assert cut["gradients"] == pytest.approx(whole["gradients"] / 8, abs=1)


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_weight"),
    [
        ("adamw_torch_fused", 8),
        ("rmsprop", 4),
        ("sgd", 0),
        ("adamw_bnb_8bit", 2 * (1 + 4 / 256)),
        ("lion_8bit", 1 + 4 / 256),
    ],
)
def test_states_are_those_of_the_optimizer(optimizer, bytes_a_weight):
    found = parts(ARCHITECTURES["llama"], optim=optimizer)
    assert found.get("optimizer", 0) == round(found["policy"] / 4 * bytes_a_weight)


def test_zero_keeps_a_float32_copy_and_divides_what_is_stepped():
    config = published("llama-3-8b")
    given = {"model": {"dtype": "bfloat16"}, "bf16": True, "optim": "adamw_torch"}
    one, eight = (parts(config, strategy=Strategy("zero2", n), **given) for n in (1, 8))
    assert one["policy"] == eight["policy"] == 2 * PARAMETERS["llama-3-8b"]
    # Master and two states, four bytes each.
    assert one["optimizer"] == 12 * PARAMETERS["llama-3-8b"] == pytest.approx(8 * eight["optimizer"], abs=8)


def test_data_parallel_processes_hold_buckets_beside_the_gradients():
    one, both = (
        build_run_models(ARCHITECTURES["llama"], ModelConfig(), options(), strategy)
        for strategy in (ALONE, Strategy("multi_gpu", 2))
    )
    assert gradient_memory(both) == 2 * gradient_memory(one)


def test_four_bits_shrink_the_linear_layers_alone():
    config, lora = published("llama-3-8b"), {"use_peft": True, "dtype": "bfloat16"}
    whole = parts(config, model=lora, bf16=True)["policy"]
    found = parts(config, model=lora | {"load_in_4bit": True}, bf16=True)["policy"]
    outside = 2 * 128256 * 4096 + 65 * 4096
    linear = PARAMETERS["llama-3-8b"] - outside
    assert whole == 2 * PARAMETERS["llama-3-8b"]
    assert found == 4 * outside + linear // 2 + linear // 16


@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_zero3_shards_4_bit_weights_and_fsdp2_leaves_them_whole(name):
    """As `tests/distributed` counts what is gathered; codes are gathered as codes."""
    model = ModelConfig(use_peft=True, dtype="bfloat16", load_in_4bit=True, lora_target_modules="all-linear")
    roles = build_run_models(published("llama-3-8b"), model, options(bf16=True), Strategy(name, 8))
    outside = 2 * 128256 * 4096 + 65 * 4096
    codes = (PARAMETERS["llama-3-8b"] - outside) * 9 // 16
    adapters = sum(weight.numel() for key, weight in roles.policy.named_parameters() if "lora_" in key)
    found = model_memory(roles)["policy"]
    assert found == pytest.approx(4 * outside / 8 + (codes / 8 if name == "zero3" else codes), abs=1)
    assert gather_shell_memory(roles) == 2 * (outside + adapters) + (codes if name == "zero3" else 0)


@pytest.mark.parametrize("attention", ["flash_attention_2", "eager", None])
def test_any_attention_and_any_architecture_can_be_counted(attention):
    for config in [ARCHITECTURES["llama"], *UNABLE.values()]:
        roles = build_run_models(config, ModelConfig(attn_implementation=attention), options(), ALONE)
        assert model_memory(roles)["policy"] == 4 * sum(weight.numel() for weight in roles.trained)
