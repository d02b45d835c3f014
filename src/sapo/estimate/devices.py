"""What accelerators can do, by their makers' data sheets; and what this machine does, measured."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psutil
import torch
import torch.nn.functional as F  # noqa: N812

from sapo.errors import ConfigurationError, nearest

MATRIX_SHARE = 0.7
"""Share of a data sheet's matrix rate that large products are assumed to reach."""

BANDWIDTH_SHARE = 0.85
"""Share of a data sheet's memory bandwidth that is assumed to be reached."""

LINK_SHARE = 0.7
"""Share of a link's rate that collectives are assumed to reach."""

LAUNCH = 15e-6
"""Seconds in which Python and PyTorch are assumed to start one operation of a model on a GPU."""

MODULES = 1.6
"""What modules, autocast and autograd add to starting an operation: a reference pass of 135 million weights took 13
microseconds an operation on an H200 where bare ones took 9."""

LEAST = 2.5e-6
"""Seconds that an operation takes on a GPU at least, in a CUDA graph too: 135 million weights wrote a token of 8 rows
in 3.6 milliseconds, which are 1,370 operations (H200)."""


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
        reached: shares of the promised matrix rate and bandwidth that the two rates and the bandwidth are.
        thin_rates: operations a second in float32 and bfloat16 of products one of whose dimensions is thin, by that
            dimension, ascending; empty where arithmetic and traffic alone decide.
        attention_shares: shares of the two rates, of float32 and bfloat16, that fused attention reaches.
        fault: seconds a byte of memory that the allocator takes from the system, above its traffic.
        least: seconds that the smallest operation takes on the device itself, however it is started.
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
    reached: tuple[float, float] = (1.0, 1.0)
    thin_rates: tuple[tuple[int, float, float], ...] = ()
    attention_shares: tuple[float, float] = (1.0, 1.0)
    fault: float = 0.0
    least: float = 0.0

    def limit(self, flops: float, moved: float, *, half: bool) -> float:
        """Seconds below which products of `flops` operations cannot come, nor moving `moved` bytes once."""
        matrix, memory = self.reached
        rate = (self.half_rate if half else self.float_rate) / matrix
        return max(flops / rate, moved * memory / self.bandwidth)

    def rate(self, thin: int, width: int, *, attention: bool = False) -> float:
        """Operations a second of matrix products.

        Args:
            thin: the product's smallest dimension; 0 for other operations than products.
            width: bytes of an element of the result.
            attention: whether they are those of fused attention.
        """
        column = 2 if width == 2 else 1
        most = self.half_rate if width == 2 else self.float_rate
        if attention:
            return most * self.attention_shares[column - 1]
        if not (thin and self.thin_rates):
            return most
        # On a log scale between the measured dimensions.
        known = [(row[0], row[column]) for row in self.thin_rates]
        if thin <= known[0][0]:
            return known[0][1]
        for (low, slower), (high, faster) in itertools.pairwise(known):
            if thin <= high:
                share = math.log(thin / low) / math.log(high / low)
                return float(slower ** (1 - share) * faster**share)
        return min(most, known[-1][1]) if thin == known[-1][0] else most


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
        reached=(MATRIX_SHARE, BANDWIDTH_SHARE),
        least=LEAST,
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
    """A device of the table, or `here`: this machine, measured."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key == "here":
        return measure()
    if key not in DEVICES:
        raise ConfigurationError(f"--gpu {name}: known are {', '.join(DEVICES)}, and here{nearest(key, DEVICES)}.")
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
    in_place = _best(lambda: large.add_(1.0), device)
    bandwidth = 2 * large.nbytes / in_place
    launch = _best(_small_block(device), device) / _SMALL_OPERATIONS * (MODULES if on_gpu else 1.0)
    if on_gpu:
        name, memory = torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory)
    else:
        threads = torch.get_num_threads()
        name = f"this machine, {threads} thread{'' if threads == 1 else 's'}"
        memory = float(psutil.virtual_memory().available)
    return Device(
        name=name,
        memory=memory,
        half_rate=rates[torch.bfloat16],
        float_rate=rates[torch.float32],
        bandwidth=bandwidth,
        link=bandwidth,
        launch=launch,
        overlaps=on_gpu,
        source="measured just now, links between devices excepted",
        thin_rates=() if on_gpu else tuple(_thin_rates(dimension) for dimension in _THIN),
        attention_shares=(1.0, 1.0) if on_gpu else _attention_shares(rates),
        fault=0.0 if on_gpu else max(0.0, _best(lambda: large.add(1.0), device) - in_place) / large.nbytes,
        least=LEAST if on_gpu else 0.0,
    )


_THIN = (1, 4, 16, 64, 256)
"""Dimensions of products that a processor is slow at: the rows of decoding, the rank of an adapter."""
_SMALL_ROUNDS, _SMALL_OPERATIONS = 50, 50 * 12


def _thin_rates(dimension: int) -> tuple[int, float, float]:
    """Operations a second, in float32 and bfloat16, of `dimension` rows times a weight larger than the cache."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        weight, rows = torch.randn(8192, 2048).to(dtype), torch.randn(dimension, 2048).to(dtype)
        rates.append(2 * dimension * weight.numel() / _best(partial(F.linear, rows, weight), torch.device("cpu")))
    return (dimension, *rates)  # type: ignore[return-value]


def _attention_shares(rates: dict[torch.dtype, float]) -> tuple[float, float]:
    """Shares of `rates`, in float32 and bfloat16, that causal attention of 512 tokens reaches, both ways."""
    heads, tokens, size = 8, 512, 64
    # Two products forwards and five backwards, of which a causal kernel skips half.
    flops = 2 * 7 * heads * tokens**2 * size / 2
    shares = []
    for dtype, rate in rates.items():
        states = [torch.randn(1, heads, tokens, size).to(dtype).requires_grad_() for _ in range(3)]

        def run(states: list[torch.Tensor] = states) -> None:
            query, key, value = states
            F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]

        shares.append(min(1.0, flops / _best(run, torch.device("cpu")) / rate))
    return shares[0], shares[1]


def _small_block(device: torch.device) -> Callable[[], None]:
    """Layers too small to compute anything: what remains is Python, PyTorch and starting an operation."""
    layer = torch.nn.Linear(8, 8, bias=False, device=device)
    gain, given = torch.ones(8, device=device), torch.ones(1, 1, 8, device=device)

    def run() -> None:
        with torch.no_grad():
            for _ in range(_SMALL_ROUNDS):
                states = given.to(torch.float32)
                states = gain * (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6))
                states = F.silu(layer(states)) * layer(states)
                states = (given + states).view(1, 1, 2, 4).transpose(1, 2).contiguous()

    return run


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
