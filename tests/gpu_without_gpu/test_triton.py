"""trl's fused head in Triton's interpreter; skipped without triton, which torch for CUDA brings along."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from sapo.config import HAS_FUSED_LM_HEAD

OLD_INTERPRETER = (
    importlib.util.find_spec("triton") is not None
    and Version(version("triton")) < Version("3.7")
    and Version(version("numpy")) >= Version("2.5")
)
pytestmark = [
    pytest.mark.skipif(OLD_INTERPRETER, reason="the interpreter of triton 3.6 fails with numpy 2.5"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (with CUDA's torch)"),
    pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="trl 1.16 or newer"),
]


def test_the_kernels_of_the_fused_head_compute_log_probabilities():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu_without_gpu.interpreted"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for what, found in json.loads(done.stdout.splitlines()[-1]).items():
        bounds = (0.02, 0.01) if what == "bfloat16" else (2e-5, 2e-5)
        assert found["logps"] < bounds[0], (what, found)
        assert found["gradients"] < bounds[1], (what, found)
