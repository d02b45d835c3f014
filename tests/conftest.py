import contextlib
import subprocess

import pytest
import torch
from peft import LoraConfig

from sapo import SAPOConfig, SAPOTrainer
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer

torch.set_num_threads(1)
# The suite's numbers are those of float32; with AMX the default would be bfloat16.
torch.cpu._is_amx_tile_supported = lambda: False


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Replies of start models are kept in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAPO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def start():
    """Starts a process that does not outlive its test, whatever the test finds."""
    with contextlib.ExitStack() as running:

        def start(command, **options):
            process = running.enter_context(subprocess.Popen(command, **options))
            running.callback(process.kill)
            return process

        yield start


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    def make(
        folder="run",
        *,
        lora=False,
        rows=None,
        eval_rows=None,
        model=None,
        generator=None,
        source=None,
        trainer=SAPOTrainer,
        **options,
    ):
        settings = {
            "output_dir": str(tmp_path / folder),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "segment_length": 4,
            "max_length": 32,
            "ref_model_sync_steps": 2,
            "chosen_probe_size": 4,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "report_to": "none",
            "report_pairs": 0,
        } | options
        adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear") if lora else None
        return trainer(
            model or tiny_llama(),
            SAPOConfig(**settings),
            rows or tiny_rows(),
            eval_rows,
            processing_class=tokenizer,
            peft_config=adapter,
            generator=generator,
            source=source,
        )

    return make
