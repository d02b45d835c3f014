"""Start a run of `worker` in one process or several, and read what it left."""

import json
import os
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from sapo.commands.launch import config_file

ROOT = Path(__file__).parents[2]

# A buffer that holds the newest batch and is drawn empty: then the draws do not depend on the number of processes.
FIXED_DRAWS = {"replay_replacement": False, "skip_identical": False}

DISTRIBUTED_TYPE = {"none": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def launcher_environment(strategy, processes):
    """What `accelerate launch` would tell its processes with the shipped configuration."""
    # Port 0: the usual one may be taken by another run on this machine.
    arguments = ["--config_file", str(config_file(strategy)), "--num_processes", str(processes)]
    arguments += ["--main_process_port", "0", "script.py"]
    parsed, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    environment = prepare_deepspeed_cmd_env(parsed)[1] if parsed.use_deepspeed else prepare_multi_gpu_env(parsed)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def start(
    folder, processes, *, strategy=None, resume=None, lora=False, tied=False, fault=None, dtype="float32", **options
):
    """A finished run: its `subprocess.CompletedProcess`."""
    strategy = "none" if processes == 1 else strategy or "ddp"
    batch = 4 // processes
    zero = strategy.startswith("zero")
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "replay_buffer_size": batch,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "segment_length": 4,
        "max_length": 32,
        "chosen_probe_size": 0,
        # DeepSpeed has a CPU of its own, which accelerate does not know.
        "use_cpu": not zero,
        "ddp_backend": "gloo" if processes > 1 and not zero else None,
        "gradient_checkpointing": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "layout": "shared",
    } | options
    folder.mkdir(exist_ok=True)
    asked = folder.parent / f"{folder.name}-{settings['max_steps']}.json"
    told = {"options": settings, "lora": lora, "tied": tied, "fault": fault, "processes": processes, "resume": resume}
    told["dtype"] = dtype
    asked.write_text(json.dumps(told | {"distributed_type": DISTRIBUTED_TYPE[strategy], "strategy": strategy}))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "tests.distributed.worker", str(asked)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    if strategy not in ("none", "ddp"):
        environment |= launcher_environment(strategy, processes)
    if zero:
        environment |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def run(folder, processes, **options):
    """The weights at the end of a run that succeeded."""
    done = start(folder, processes, **options)
    assert done.returncode == 0, done.stderr[-12000:]
    return load_file(folder / "end.safetensors")
