"""What accelerators can do, by their makers' data sheets; and what this machine does, measured."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from sapo.errors import ConfigurationError

MATRIX_SHARE = 0.7
"""Share of a data sheet's matrix rate that large products are assumed to reach."""

BANDWIDTH_SHARE = 0.85
"""Share of a data sheet's memory bandwidth that is assumed to be reached."""

LINK_SHARE = 0.7
"""Share of a link's rate that collectives are assumed to reach."""

LAUNCH = 10e-6
"""Seconds in which Python and PyTorch are assumed to start one operation on a GPU."""


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator as the estimate sees it.

    Attributes:
        name: for the report.
        memory: bytes.
        half_rate: operations a second of matrix products in bfloat16, as reached.
        float_rate: the same in float32 without TF32, PyTorch's default.
        bandwidth: bytes a second of its memory, as reached.
        link: bytes a second to the other devices in one direction, as reached.
        launch: seconds to start an operation.
        overlaps: whether starting operations and computing go on side by side.
        source: where the figures come from.
    """

    name: str
    memory: float
    half_rate: float
    float_rate: float
    bandwidth: float
    link: float
    launch: float
    overlaps: bool
    source: str


def _sheet(
    name: str, gigabytes: float, half: float, single: float, terabytes: float, link: float, source: str
) -> Device:
    """From teraflops (dense), terabytes a second, and gigabytes a second of a link in one direction."""
    return Device(
        name=name,
        memory=gigabytes * 1e9,
        half_rate=half * 1e12 * MATRIX_SHARE,
        float_rate=single * 1e12 * MATRIX_SHARE,
        bandwidth=terabytes * 1e12 * BANDWIDTH_SHARE,
        link=link * 1e9 * LINK_SHARE,
        launch=LAUNCH,
        overlaps=True,
        source=source,
    )


DEVICES = {
    "a100-40": _sheet("NVIDIA A100 40 GB SXM", 40, 312, 19.5, 1.555, 300, "NVIDIA A100 data sheet, 2021"),
    "a100-80": _sheet("NVIDIA A100 80 GB SXM", 80, 312, 19.5, 2.039, 300, "NVIDIA A100 data sheet, 2021"),
    "h100": _sheet("NVIDIA H100 SXM", 80, 989, 67, 3.35, 450, "NVIDIA H100 data sheet, 2023"),
    "h100-pcie": _sheet("NVIDIA H100 PCIe", 80, 756, 51, 2.0, 64, "NVIDIA H100 PCIe product brief, 2022"),
    "h200": _sheet("NVIDIA H200 SXM", 141, 989, 67, 4.8, 450, "NVIDIA H200 data sheet, 2024"),
    "b200": _sheet("NVIDIA B200 (HGX)", 180, 2250, 75, 7.7, 900, "NVIDIA HGX B200 data sheet, 2025"),
    "l40s": _sheet("NVIDIA L40S", 48, 362, 91.6, 0.864, 32, "NVIDIA L40S data sheet, 2023"),
    "a6000": _sheet("NVIDIA RTX A6000", 48, 154.8, 38.7, 0.768, 32, "NVIDIA RTX A6000 data sheet, 2020"),
    "rtx4090": _sheet("NVIDIA RTX 4090", 24, 165.2, 82.6, 1.008, 32, "NVIDIA Ada architecture paper, 2022"),
    "rtx3090": _sheet("NVIDIA RTX 3090", 24, 71, 35.6, 0.936, 32, "NVIDIA GA102 architecture paper, 2020"),
}
"""By the name that `--gpu` takes; rates of bfloat16 are dense, with float32 accumulation."""


def device_named(name: str) -> Device:
    """A device of the table, or `here`: this machine, measured.

    Raises:
        ConfigurationError: no such device.
    """
    key = name.lower().replace(" ", "").replace("_", "-")
    if key == "here":
        return measure()
    if key not in DEVICES:
        close = difflib.get_close_matches(key, DEVICES, n=1)
        nearest = f"; nearest: {close[0]}" if close else ""
        raise ConfigurationError(f"--gpu {name}: known are {', '.join(DEVICES)}, and here{nearest}.")
    return DEVICES[key]


def measure() -> Device:
    """A short profile of this machine: its GPU if there is one, else its processor with the threads torch has.

    The best of several: wall time on a GPU, on a CPU the time that each of its threads worked, which other programs do
    not lengthen. Links between devices are not measured.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    size = 8192 if on_gpu else 1536
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[dtype] = 2 * size**3 / _best(lambda left=left, right=right: torch.mm(left, right), device)  # type: ignore[misc]
    large = torch.zeros(2**28 if on_gpu else 2**25, device=device)
    bandwidth = 2 * large.numel() * large.element_size() / _best(lambda: large.add_(1.0), device)
    small = torch.zeros(8, device=device)

    def many() -> None:
        for _ in range(1000):
            torch.add(small, small)

    launch = _best(many, device) / 1000
    if on_gpu:
        name, memory = torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory)
    else:
        name, memory = f"this machine, {torch.get_num_threads()} threads", float(psutil.virtual_memory().available)
    return Device(
        name=name,
        memory=memory,
        half_rate=rates[torch.bfloat16],
        float_rate=rates[torch.float32],
        bandwidth=bandwidth,
        link=bandwidth,
        launch=launch,
        overlaps=on_gpu,
        source="measured just now; links between devices are not",
    )


def _best(what: Callable[[], object], device: torch.device, *, rounds: int = 6) -> float:
    """Least seconds of a few rounds; the first is not counted."""
    seconds = []
    for _ in range(rounds):
        started = _now(device)
        what()
        seconds.append(_now(device) - started)
    return min(seconds[1:])


def _now(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize()
    return time.perf_counter()
