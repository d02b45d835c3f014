"""Training runs in forked processes, which may be killed: everything is imported once, before the fork."""

import os
import signal
import sys
import time
import traceback

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PrinterCallback

from sapo import SAPOConfig, SAPOTrainer
from sapo.errors import SapoError
from sapo.weights.opponent import policy_tensors
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer


def build(folder, *, lora=False, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "segment_length": 4,
        "steps_per_generation": 3,
        "max_length": 32,
        "ref_model_sync_steps": 2,
        "chosen_probe_size": 2,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
    } | options
    adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear") if lora else None
    trainer = SAPOTrainer(
        tiny_llama(), SAPOConfig(**settings), tiny_rows(), processing_class=tiny_tokenizer(), peft_config=adapter
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(trainer):
    named = {f"policy.{name}": weight for name, weight in policy_tensors(trainer.policy()).items()}
    named |= {f"opponent.{name}": weight for name, weight in trainer.opponent.tensors().items()}
    return {name: weight.detach().clone() for name, weight in named.items()}


def train(folder, *, resume="auto", limit=None, **options):
    """In the child: train to the end, from the newest checkpoint if there is one."""
    torch.set_num_threads(1)
    trainer = build(folder, **options)
    if limit is not None:
        limit(trainer)
    trainer.train(resume_from_checkpoint=resume)
    save_file(weights(trainer), folder.with_suffix(".safetensors"))


def start(function, *args, **kwargs):
    """Fork a child that runs `function`; its process id. Its error, if it has one, goes to its standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function(*args, **kwargs)
        status = 0
    except SapoError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        status = 2
    except SystemExit as ended:
        status = ended.code
    except BaseException:  # noqa: BLE001 the child must not come back into pytest
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child, timeout):
    """Exit status of a child that has `timeout` seconds to end; it is killed after that: None."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
