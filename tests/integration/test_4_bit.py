"""Laws of a base model in 4 bits, on this processor; skipped without bitsandbytes."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sapo import SAPOTrainer
from sapo.errors import ConfigurationError
from tests.integration.test_precision import check_first_margin, lines
from tests.tiny import QUANTIZED, SIZE_IN_4_BITS, tiny_llama

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("default")  # of bitsandbytes, transformers and peft about each other


@pytest.fixture
def quantized(tmp_path):
    tiny_llama(**SIZE_IN_4_BITS).save_pretrained(tmp_path / "model")

    def load(kind="4-bit"):
        options = QUANTIZED.get(kind, {"load_in_8bit": True})
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=BitsAndBytesConfig(**options)
        )

    return load


def snapshot(model):
    """The base model's bytes, in whatever form they lie."""
    return {name: weight.data.clone() for name, weight in model.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("reference", ["initial", "opponent_copy", "opponent"])
def test_the_first_margin_is_exactly_zero(reference, kind, quantized, make_trainer):
    check_first_margin(make_trainer(model=quantized(kind), lora=True, max_steps=1, bf16=True, reference=reference))


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_gets_a_gradient_after_the_opponent_has_generated(kind, checkpointing, quantized, make_trainer):
    trainer = make_trainer(
        model=quantized(kind), lora=True, max_steps=3, bf16=True, gradient_checkpointing=checkpointing
    )
    base = snapshot(trainer.model)
    start = {name: w.detach().clone() for name, w in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    still = [name for name in start if "opponent" not in name and torch.equal(weights[name], start[name])]
    assert not [name for name in still if ".default." in name or ".policy." in name], still
    assert len(still) < len(start)
    # Training in 4 bits changes no code and no norm.
    assert all(torch.equal(weights[name], weight) for name, weight in base.items())
    assert lines(trainer)[-1]["loss"] < 5


@pytest.mark.parametrize("bf16", [True, False])
def test_keys_and_values_are_of_the_compute_type(bf16, quantized, make_trainer):
    trainer = make_trainer(model=quantized(), lora=True, max_steps=1, bf16=bf16)
    seen, inner = set(), trainer.model.get_base_model()
    original = inner.forward

    def spy(*args, **kwargs):
        output = original(*args, **kwargs)
        if output.get("past_key_values") is not None:
            seen.update(layer.keys.dtype for layer in output["past_key_values"].layers)
        return output

    inner.forward = spy
    trainer.train()
    assert seen == {torch.bfloat16}


def test_a_resumed_run_is_the_uninterrupted_one(quantized, make_trainer):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "bf16": True, "lora": True}
    whole = make_trainer("whole", model=quantized(), **options)
    whole.train()
    again = make_trainer("again", model=quantized(), **options)
    again.train(resume_from_checkpoint=str(whole.run_folder.path / "checkpoint-2"))
    ours, theirs = dict(again.model.named_parameters()), dict(whole.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_8_bits_on_a_processor_are_refused(quantized, make_trainer):
    with pytest.raises(ConfigurationError, match=r"load_in_8bit on cpu: .* Use load_in_4bit"):
        make_trainer(model=quantized("8-bit"), lora=True)


def test_a_model_that_was_packed_for_inference_is_refused(quantized, make_trainer):
    model = quantized().eval()
    linear = model.model.layers[0].self_attn.q_proj
    if not linear.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs on processors with AVX512-BF16")
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ConfigurationError, match="packed for inference"):
        make_trainer(model=model, lora=True)
    assert isinstance(make_trainer("new", model=quantized(), lora=True), SAPOTrainer)


def test_a_package_for_4_bits_that_is_not_used_says_nothing():
    code = "from sapo.commands.main import main; main(['--version']); import bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
