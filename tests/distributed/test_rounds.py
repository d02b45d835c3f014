"""Laws of self-play in rounds with several processes."""

import os
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from sapo.demo.build import MODEL_FOLDER
from sapo.demo.tasks import TRAIN_ROWS
from tests.distributed.processes import ROOT
from tests.tiny import write_rows


@pytest.mark.slow
def test_two_processes_write_the_pairs_and_train_to_the_weights_of_one(tmp_path):
    data = tmp_path / "rows.jsonl"
    # More than one part, so that both processes write.
    write_rows(data, TRAIN_ROWS[:300])
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        options = {
            "model_name_or_path": MODEL_FOLDER, "dataset_name": data, "output_dir": out, "max_length": 64,
            "segment_length": "none", "ema_decay": 1, "num_rounds": 2, "max_steps": 2, "learning_rate": 1e-4,
            "per_device_train_batch_size": 4 // processes, "use_cpu": "true", "gradient_checkpointing": "false",
            "temperature": 1.5, "log_pairs_steps": 0, "report_to": "none",
        }  # fmt: skip
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        more = ["--ddp_backend", "gloo"] if processes == 2 else []
        command = [sys.executable, *launch, "-m", "sapo", "train", *flags, *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        folders = [out / f"round-{number}" for number in range(2)]
        pairs = [pyarrow.parquet.read_table(folder / "pairs.parquet").to_pydict() for folder in folders]
        found[processes] = pairs, [load_file(folder / "model.safetensors") for folder in folders]
    assert found[1][0] == found[2][0]
    for one, two in zip(found[1][1], found[2][1], strict=True):
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-6, msg=name)
