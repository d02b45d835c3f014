"""Fake CUDA tensors on a PyTorch without CUDA. Import this before torch, in a process of its own.

    python -m tests.gpu_without_gpu.fake_cuda GUARD.so

runs the checks below and prints those that fail, where a GPU would: tensors of two devices, a type that does not fit.
"""

from __future__ import annotations

import copy
import ctypes
import json
import sys
import traceback

if __name__ == "__main__":
    assert "torch" not in sys.modules, "torch looks its CUDA hooks up once"
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)

import torch
import torch.cuda.amp.common
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sapo import Pair, Segment
from sapo.preference import shared_prefix
from sapo.preference.batches import collate_pairs
from sapo.preference.scoring import score
from sapo.preference.shared_prefix import use_shared_attention
from sapo.weights.opponent import ModelCopy, policy_tensors, squared_distance
from tests.tiny import tiny_llama

DEVICE = torch.device("cuda", 0)
MODE = FakeTensorMode()


def deepcopied(self, memo):
    """A fake tensor of the same shape: `ModelCopy` copies the policy."""
    if id(self) not in memo:
        with self.fake_mode:
            new = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
            memo[id(self)] = nn.Parameter(new, self.requires_grad) if isinstance(self, nn.Parameter) else new
    return memo[id(self)]


def faked(tensor, device=DEVICE):
    with MODE:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def on_cuda(model, dtype):
    """`model` with fake CUDA parameters and buffers."""
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        fake = faked(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    KINDS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        if name.removeprefix("_") in self.KINDS or name in self.KINDS:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def pairs():
    def pair(prompt, before, new, after):
        chosen = tuple(range(2, 2 + before + new + after))
        rejected = chosen[:before] + tuple(range(30, 30 + new)) + chosen[before + new :]
        span = Segment(before, before + new)
        return Pair(0, 0, tuple(range(2, 2 + prompt)), chosen, rejected, span, span)

    return [pair(9, 3, 4, 2), pair(12, 0, 5, 3), pair(7, 4, 3, 0)]


def batch(layout, *, device=DEVICE, all_positions=False):
    rows = collate_pairs(pairs(), pad_token_id=0, layout=layout, all_positions=all_positions)
    with MODE:
        return rows.to("cpu") if device.type == "cpu" else _to_fake(rows)


def _to_fake(rows):
    converted = {}

    def fake(value):
        if isinstance(value, torch.Tensor):
            if id(value) not in converted:
                converted[id(value)] = MODE.from_tensor(value)
            return converted[id(value)]
        if hasattr(value, "__dataclass_fields__"):
            new = copy.copy(value)
            for name in value.__dataclass_fields__:
                object.__setattr__(new, name, fake(getattr(value, name)))
            return new
        if isinstance(value, (tuple, list)):
            return type(value)(fake(one) for one in value)
        return value

    return fake(rows).to(DEVICE)


def model_for(layout, dtype, **options):
    model = on_cuda(tiny_llama(**options), dtype)
    if layout == "shared":
        use_shared_attention(model)
    return model


def scoring(layout, dtype):
    """Scores, loss and backward pass under autocast; no wait between them."""
    model, rows, waits = model_for(layout, dtype), batch(layout), Waits()
    with MODE, torch.autocast("cuda", torch.bfloat16), waits:
        scores = score(model, rows)
        (scores.chosen_logps - scores.rejected_logps).mean().backward()
    assert scores.chosen_logps.dtype is torch.float32
    assert scores.chosen_logps.device == DEVICE
    assert all(weight.grad is not None and weight.grad.device == DEVICE for weight in model.parameters())
    assert not waits.seen, waits.seen


def all_positions(layout, dtype):
    """ORPO's published likelihood term."""
    model, rows = model_for(layout, dtype), batch(layout, all_positions=True)
    with MODE, torch.autocast("cuda", torch.bfloat16):
        score(model, rows).all_positions_nll.backward()


def checkpointing(layout, dtype):
    """Recomputed activations."""
    model, rows = model_for(layout, dtype).train(), batch(layout)
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with MODE, torch.autocast("cuda", torch.bfloat16):
        score(model, rows).chosen_logps.sum().backward()


def averaging(layout, dtype):
    """The moving average with and without a float32 master, and its distance."""
    model = on_cuda(tiny_llama(), dtype)
    with MODE:
        for decay in (0.5, 0.99):
            shadow = ModelCopy(model, decay=decay)
            shadow.follow(policy_tensors(model), decay)
            shadow.copy_from(shadow.tensors())
            assert squared_distance(shadow.tensors(), policy_tensors(model)).device == DEVICE


def mixed(layout, dtype):
    """The control: rows left on the CPU must fail."""
    model = model_for(layout, dtype)
    rows = collate_pairs(pairs(), pad_token_id=0, layout=layout)
    try:
        with MODE:
            fake = _to_fake(rows).to("cpu")
            score(model, fake)
    except (RuntimeError, AssertionError) as error:
        if "device" in str(error).lower():
            return
        raise
    raise AssertionError("tensors of two devices were taken")


CHECKS = {check.__name__: check for check in (scoring, all_positions, checkpointing, averaging, mixed)}


CASES = [
    *(("scoring", layout, dtype) for layout in ("plain", "shared") for dtype in ("float32", "bfloat16")),
    ("all_positions", "plain", "bfloat16"),
    ("checkpointing", "shared", "bfloat16"),
    ("averaging", "plain", "bfloat16"),
    ("averaging", "plain", "float32"),
    ("mixed", "plain", "bfloat16"),
    ("mixed", "shared", "bfloat16"),
]


def lower_right(queries, keys):
    """The mask that `causal_lower_right` stands for: that is a tensor of a class of its own, which cannot be faked."""
    return torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).tril(keys - queries)


def main() -> None:
    FakeTensor.__deepcopy__ = deepcopied
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    shared_prefix.causal_lower_right = lower_right
    failed = {}
    for name, layout, dtype in CASES:
        try:
            CHECKS[name](layout, getattr(torch, dtype))
        except Exception:  # noqa: BLE001
            failed[f"{name}, {layout}, {dtype}"] = traceback.format_exc(limit=-4)
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
