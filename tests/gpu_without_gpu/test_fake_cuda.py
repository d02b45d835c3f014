"""Laws on fake CUDA tensors: no two devices meet, sums are float32, and scoring a pass does not wait for the device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to compile a device guard"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for a PyTorch without CUDA"),
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """The device guard, compiled once."""
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    home = Path(torch.__file__).parent
    command = ["g++", "-shared", "-fPIC", "-std=c++20", str(HERE / "guard.cpp"), "-o", str(library)]
    command += [f"-I{home / part}" for part in ("include", "include/torch/csrc/api/include")]
    command += [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def test_a_gpu_would_take_it(guard):
    """One process for all checks: torch takes longer to import than they take."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu_without_gpu.fake_cuda", str(guard)],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n".join(f"{name}\n{trace}" for name, trace in failed.items())
