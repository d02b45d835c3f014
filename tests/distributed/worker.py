"""One process of a distributed run: trains, checks that it was one of several, saves the weights."""

import json
import logging
import sys
from pathlib import Path

import torch
from accelerate import DistributedType
from peft import LoraConfig
from safetensors.torch import save_file

from sapo import SAPOConfig, SAPOTrainer
from sapo.opponent import policy_tensors
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer


def main(file: str) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    asked = json.loads(Path(file).read_text())
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear") if asked["lora"] else None
    trainer = SAPOTrainer(
        tiny_llama(),
        SAPOConfig(**asked["options"]),
        tiny_rows(paired=True),
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )
    # Both fall-backs, to one process and to another strategy, are silent.
    state = trainer.accelerator.state
    assert state.num_processes == asked["processes"], state
    assert state.distributed_type is DistributedType(asked["distributed_type"]), state
    trainer.train(resume_from_checkpoint=asked["resume"])
    assert trainer._layout == asked["options"]["layout"]
    if trainer.is_world_process_zero():
        weights = {f"policy.{name}": weight for name, weight in policy_tensors(trainer.policy()).items()}
        if trainer.opponent is not None:
            weights |= {f"opponent.{name}": weight for name, weight in trainer.opponent.tensors().items()}
        own = {name: weight.detach().clone() for name, weight in weights.items()}
        save_file(own, Path(asked["options"]["output_dir"]) / "end.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
