"""One process of a distributed run: trains, checks that it was one of several, saves the weights."""

import importlib
import json
import logging
import sys
from pathlib import Path

import torch
import transformers.training_args
from accelerate import DistributedType
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import sapo.config
from sapo import SAPOConfig, SAPOTrainer
from sapo.errors import ModelError
from sapo.weights.opponent import policy_tensors
from sapo.weights.rounding import rounded
from sapo.weights.sharding import gather_full_state_dict, local_shard, shutdown_process_group
from tests.distributed import cpu_sharding
from tests.distributed.collectives import Collectives
from tests.tiny import QUANTIZED, SIZE_IN_4_BITS, tiny_llama, tiny_rows, tiny_tokenizer


class Faulty(SAPOTrainer):
    """Fails in one process at one step, if asked to."""

    fault = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        where = {"process": self.args.process_index, "step": self.state.global_step + 1}
        if self.fault and model.training and {**self.fault, **where} == self.fault:
            if self.fault["kind"] == "error":
                raise ModelError("this process cannot go on")
            return loss * float("nan")
        return loss


def build(asked):
    """The trainer that `asked` describes, one of as many processes and of the strategy that it names."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    cpu_sharding.install()
    zero = asked["strategy"].startswith("zero")
    if zero:
        import deepspeed

        # It would compile a kernel for serving on a CPU, for a minute, of which training makes no use. The package has
        # an attribute of this name, which is the real torch.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        deepspeed.init_distributed("gloo")
        # DeepSpeed's CPU is no accelerator for torch, and computes in bfloat16 all the same.
        sapo.config._accelerator_has_bf16 = transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        asked["options"].setdefault("bf16", False)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear") if asked["lora"] else None
    config = SAPOConfig(**asked["options"])
    if zero:
        # Any optimizer, and on a CPU; a threshold below which some weights of these tiny models are not kept whole.
        settings = config.deepspeed_plugin.deepspeed_config
        settings |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
        settings["zero_optimization"] |= {"overlap_comm": False, "stage3_param_persistence_threshold": 100}
    if asked["quantized"]:
        how = BitsAndBytesConfig(**QUANTIZED["4-bit"])
        model = AutoModelForCausalLM.from_pretrained(asked["quantized"], quantization_config=how)
    else:
        model = tiny_llama(tie_word_embeddings=asked["tied"], dtype=getattr(torch, asked["dtype"]))
    trainer = Faulty(
        model,
        config,
        tiny_rows(paired=True),
        tiny_rows(4, seed=1) if asked["options"].get("eval_strategy") else None,
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )
    trainer.fault = asked["fault"]
    # The fall-backs, to one process and to another strategy, are silent.
    state = trainer.accelerator.state
    assert state.num_processes == asked["processes"], state
    assert state.distributed_type is DistributedType(asked["distributed_type"]), state
    if zero:
        assert state.deepspeed_plugin.zero_stage == int(asked["strategy"][-1])
    assert trainer._context.roles.sharded == (asked["strategy"] in ("fsdp2", "zero3"))
    return trainer


def weights(trainer):
    """Policy and opponent on the first process, whole."""
    tensors = policy_tensors(trainer.policy())
    if not trainer._context.roles.sharded:
        policy = tensors
    else:
        policy = gather_full_state_dict(tensors, {name: local_shard(weight) for name, weight in tensors.items()})
    opponent = {} if trainer.opponent is None else trainer.opponent.full()
    named = {f"policy.{name}": weight for name, weight in policy.items()}
    named |= {f"opponent.{name}": weight for name, weight in opponent.items()}
    return {name: weight.detach().clone() for name, weight in named.items()}


class WithoutCollectives(TrainerCallback):
    """Checks that the moving average does not communicate, and that decoding gathers each weight once a call."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.play = getattr(trainer.source, "play", trainer.source)
        self.updates = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.opponent is None:
            return
        follow, generate = self.trainer.opponent.follow, self.play._generator.generate

        def silent(*given):
            with Collectives() as seen:
                follow(*given)
            # The thread that speaks to an engine has a barrier of its own.
            assert not set(seen.names) - ({"barrier"} if self.trainer.source is not self.play else set()), seen.names
            self.updates += 1

        def gathering_once(*given):
            with Collectives() as seen:
                written = generate(*given)
            # accelerate leaves 4-bit weights whole with FSDP2.
            spread = [
                w for w in self.trainer.policy().parameters() if isinstance(w, DTensor) or hasattr(w, "ds_tensor")
            ]
            assert len(seen.names) == len(spread), (len(spread), seen.names)
            assert bool(spread) == self.trainer._context.roles.sharded
            return written

        self.trainer.opponent.follow = silent
        if self.trainer.source is self.play:
            self.play._generator.generate = gathering_once


class Float32Scores(TrainerCallback):
    """Checks that log-probabilities reach their sums in float32, whatever wraps the model."""

    def __init__(self):
        self.scored = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def check(module, given, output):
            # An adapter's model generates too, and both heads are compared before the first step.
            if "log_probs" in output:
                self.scored += 1
                assert output.log_probs.dtype == torch.float32, output.log_probs.dtype

        model.register_forward_hook(check)

    def on_train_end(self, args, state, control, **kwargs):
        assert self.scored


def check_folder(folder, expected, base, *, dtypes, sharded):
    """An ordinary folder: transformers or peft loads it, and its weights are `expected`."""
    # Else this process alone would load the model cut for all of them.
    unset_hf_deepspeed_config()
    if base is not None:
        model = PeftModel.from_pretrained(base, folder)
    else:
        model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(told.values()), told
        assert model.config.architectures == ["LlamaForCausalLM"]
    loaded = policy_tensors(model)
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        # Shards are cast, as they are to compute.
        saved = weight.to(dtypes[name]) if sharded else rounded(weight, dtypes[name])
        assert torch.equal(loaded[name], saved.to(loaded[name].dtype)), name


def main(file: str) -> None:
    asked = json.loads(Path(file).read_text())
    trainer = build(asked)
    watch = WithoutCollectives(trainer)
    trainer.add_callback(watch)
    if asked["options"].get("fused_lm_head"):
        trainer.add_callback(Float32Scores())
    trainer.train(resume_from_checkpoint=asked["resume"])
    steps = asked["options"]["max_steps"]
    if asked["resume"] is None:
        assert trainer._scorer.layout == asked["options"]["layout"]
        assert watch.updates == (0 if trainer.opponent is None else steps - bool(asked["fault"]))
    elif asked["resume"].endswith(f"-{steps}"):
        trainer._save_checkpoint(trainer.model, None)
        checkpoint = Path(asked["options"]["output_dir"]) / f"checkpoint-{steps}"
        if trainer.is_world_process_zero():
            checkpoint.rename(checkpoint.with_name("resumed"))
    own, dtypes = weights(trainer), {name: one.dtype for name, one in policy_tensors(trainer.policy()).items()}
    models = Path(asked["options"]["output_dir"]) / "models"
    trainer.save_model(str(models))
    if trainer.is_world_process_zero():
        for part, folder in (("policy", models), ("opponent", models / "opponent")):
            expected = {name.partition(".")[2]: own[name] for name in own if name.startswith(f"{part}.")}
            assert folder.is_dir() == bool(expected)
            if expected:
                base = tiny_llama(**(SIZE_IN_4_BITS if asked["quantized"] else {})) if asked["lora"] else None
                check_folder(folder, expected, base, dtypes=dtypes, sharded=trainer._context.roles.sharded)
        save_file(own, Path(asked["options"]["output_dir"]) / "end.safetensors")
    shutdown_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
