import pytest
import torch
from peft import LoraConfig, get_peft_model

from sapo import SAPOConfig
from sapo.weights import loading
from tests.prepared import CHATML
from tests.tiny import byte_tokenizer, save_tiny


@pytest.fixture
def args(tmp_path):
    return SAPOConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", max_length=32, gradient_checkpointing=False
    )


@pytest.fixture
def folder(tmp_path):
    """A model with its tokenizer."""
    return save_tiny(tmp_path / "model")


@pytest.fixture
def adapter(folder, tmp_path):
    """An adapter on it that changes what it computes."""
    model = get_peft_model(loading.load_frozen(str(folder)), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def chatml():
    return byte_tokenizer(CHATML)
