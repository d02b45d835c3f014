"""Laws of devices: what is asked of torch.accelerator, so that it holds on CUDA, XPU and MPS alike; none is needed."""

import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import sapo
from sapo import SAPOConfig
from sapo.config import _accelerator_has_bf16
from sapo.errors import ConfigurationError
from sapo.training.metrics import clock
from sapo.weights.footprint import free_memory
from sapo.weights.loading import default_device, device_map

KNOWS_CUDA = {
    "config.py": "whether bfloat16 is emulated",
    "estimate/devices.py": "measures a GPU",
    "generation/token_step.py": "CUDA graphs",
    "generation/vllm/colocated.py": "vLLM in this process",
    "preference/shared_prefix.py": "flash attention of unequal lengths",
}
"""Modules that name `torch.cuda`, and for what; all others ask `torch.accelerator`."""


@pytest.fixture
def accelerator(monkeypatch):
    def pretend(kind):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: found)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")

    return pretend


def test_only_what_is_of_cuda_alone_names_it():
    root = Path(sapo.__file__).parent
    found = {file for file in root.rglob("*.py") if re.search(r"torch\.cuda\b", file.read_text())}
    assert {str(file.relative_to(root)) for file in found} == set(KNOWS_CUDA)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", None])
def test_the_accelerator_is_the_device_by_default(kind, accelerator):
    accelerator(kind)
    assert default_device() == torch.device(kind or "cpu")


@pytest.mark.parametrize(("kind", "expected"), [("xpu", True), ("npu", True), ("mps", False), (None, False)])
def test_bfloat16_is_on_by_default_where_it_is_native(kind, expected, accelerator, monkeypatch):
    accelerator(kind if kind != "npu" else None)
    if kind == "npu":  # a name that torch knows only with its plug-in
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="npu"))
    assert _accelerator_has_bf16() == expected


@pytest.mark.parametrize("emulated", [False, True])
def test_bfloat16_by_emulation_is_not_switched_on(emulated, accelerator, monkeypatch):
    """As torch reports a T4 or V100: supported, by emulation."""
    accelerator("cuda")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    assert _accelerator_has_bf16() == (not emulated)
    if emulated:
        with pytest.raises(ConfigurationError, match=r"T4, V100 .* Set bf16 to false and dtype to float32"):
            SAPOConfig("unused", bf16=True)


@pytest.mark.parametrize(("kind", "placed"), [("cuda", True), ("xpu", True), ("mps", False), ("cpu", False)])
def test_weights_are_loaded_onto_the_device_that_has_memory_of_its_own(kind, placed):
    args = SimpleNamespace(use_cpu=kind == "cpu", device=torch.device(kind))
    assert device_map(args) == ({"": torch.device(kind)} if placed else None)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "cpu"])
def test_a_clock_is_read_when_the_device_has_finished(kind, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    assert clock(torch.device(kind)) <= clock(torch.device("cpu"))
    assert waited == ([] if kind == "cpu" else [torch.device(kind)])


def test_free_memory_is_that_of_the_device(monkeypatch):
    on_device = SimpleNamespace(
        mem_get_info=lambda device: (7e9, 80e9),
        memory_reserved=lambda device: 5e9,
        memory_allocated=lambda device: 3e9,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: on_device)
    assert free_memory(SimpleNamespace(device=torch.device("xpu"), world_size=8)) == 9e9
    # MPS has no memory of its own, and no account of it.
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6e9))
    for kind in ("mps", "cpu"):
        assert free_memory(SimpleNamespace(device=torch.device(kind), world_size=2)) == 3e9
