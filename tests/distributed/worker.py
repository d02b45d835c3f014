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
from sapo.sharding import gather_all, shard_of
from tests.distributed import cpu_sharding
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer


def build(asked):
    """The trainer that `asked` describes, one of as many processes and of the strategy that it names."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    cpu_sharding.install()
    zero = asked["strategy"].startswith("zero")
    if zero:
        import deepspeed

        deepspeed.init_distributed("gloo")
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear") if asked["lora"] else None
    config = SAPOConfig(**asked["options"])
    if zero:
        # Any optimizer, and on a CPU; a threshold below which some weights of these tiny models are not kept whole.
        settings = config.deepspeed_plugin.deepspeed_config
        settings |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
        settings["zero_optimization"] |= {"overlap_comm": False, "stage3_param_persistence_threshold": 100}
    trainer = SAPOTrainer(
        tiny_llama(),
        config,
        tiny_rows(paired=True),
        tiny_rows(4, seed=1) if asked["options"].get("eval_strategy") else None,
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )
    # The fall-backs, to one process and to another strategy, are silent.
    state = trainer.accelerator.state
    assert state.num_processes == asked["processes"], state
    assert state.distributed_type is DistributedType(asked["distributed_type"]), state
    if zero:
        assert state.deepspeed_plugin.zero_stage == int(asked["strategy"][-1])
    assert (trainer.twin is not None) == (asked["strategy"] in ("fsdp2", "zero3"))
    return trainer


def weights(trainer):
    """Policy and opponent on the first process, whole."""
    tensors = policy_tensors(trainer.policy())
    if trainer.twin is None:
        policy = tensors
    else:
        policy = gather_all(tensors, {name: shard_of(weight) for name, weight in tensors.items()})
    opponent = {} if trainer.opponent is None else trainer.opponent.whole()
    named = {f"policy.{name}": weight for name, weight in policy.items()}
    named |= {f"opponent.{name}": weight for name, weight in opponent.items()}
    return {name: weight.detach().clone() for name, weight in named.items()}


def main(file: str) -> None:
    asked = json.loads(Path(file).read_text())
    trainer = build(asked)
    trainer.train(resume_from_checkpoint=asked["resume"])
    assert trainer._layout == asked["options"]["layout"]
    own = weights(trainer)
    trainer.save_model(str(Path(asked["options"]["output_dir"]) / "models"))
    if trainer.is_world_process_zero():
        save_file(own, Path(asked["options"]["output_dir"]) / "end.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
