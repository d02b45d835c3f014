"""Start a run of `worker` in one process or several, and read what it left.

The processes are forked from one that has imported all libraries, which else take longer than the run itself. What the
launcher adds (torchrun's environment, an end for all when one fails) is done here as it does it; `test_launch` starts
the real one.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist
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
    folder,
    processes,
    *,
    strategy=None,
    resume=None,
    lora=False,
    tied=False,
    fault=None,
    dtype="float32",
    quantized=None,
    **options,
):
    """A finished run: its `subprocess.CompletedProcess`. `quantized`: a folder whose model is loaded in 4 bits."""
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
    told |= {"dtype": dtype, "quantized": quantized}
    asked.write_text(json.dumps(told | {"distributed_type": DISTRIBUTED_TYPE[strategy], "strategy": strategy}))
    environment = {}
    if strategy not in ("none", "ddp"):
        environment |= launcher_environment(strategy, processes)
    if zero:
        environment |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
    return _forked(asked, processes, environment)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.distributed.worker"])


def _forked(asked, processes, environment):
    # What the server of forks, which starts with the first of them, and its children inherit.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    # The system chooses the port, and this process keeps it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    started, logs = [], []
    for rank in range(processes):
        log = asked.with_name(f"{asked.stem}-{rank}.log")
        own = dict(environment)
        if store is not None:
            own |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            own |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
            own |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        child = FORKS.Process(target=_child, args=(str(asked), str(log), {key: str(own[key]) for key in own}))
        child.start()
        started.append(child)
        logs.append(log)
    until = time.monotonic() + 300
    while any(child.is_alive() for child in started):
        # The first that fails ends the others, which would wait for it.
        if any(child.exitcode for child in started) or time.monotonic() > until:
            time.sleep(0.5)
            for child in started:
                child.kill()
        started[0].join(0.05)
    codes = [child.exitcode for child in started]
    failed = next((code for code in codes if code), 0)
    errors = "".join(log.read_text() for log in logs if log.is_file())
    return subprocess.CompletedProcess([sys.executable, str(asked)], failed, stderr=f"{errors}\n{codes}")


def _child(asked, log, environment):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    os.chdir(ROOT)

    from tests.distributed import worker

    worker.main(asked)


def run(folder, processes, **options):
    """The weights at the end of a run that succeeded."""
    done = start(folder, processes, **options)
    assert done.returncode == 0, done.stderr[-12000:]
    return load_file(folder / "end.safetensors")
