"""Run a computation without data, and keep account of what it would hold and do.

Under torch's FakeTensorMode each operation gives tensors of the right shape and type and computes nothing, so a model
of any size runs in seconds. What is seen is the very computation of a step, autograd and recomputation included.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_PICKING = ("aten.embedding", "aten.index", "aten.gather", "aten.slice_scatter", "aten.select_scatter")
"""Operations that read as much of their source as they give out."""

_ADDING = ("aten.index_add",)
"""Operations that change the rows of their target that an index names."""

_PRODUCTS = ("aten.mm", "aten.addmm")
"""Matrix products; the factors are their last two tensors. Batched ones belong to attention, bound by its traffic."""


_LARGE_BLOCK = 32 * 2**20
"""Bytes from which glibc's allocator takes a block from the system each time, which clears it page by page."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one operation does: floating-point operations, bytes read and written, bytes of a result's element.

    `thin` is the smallest dimension of a matrix product, 0 for everything else; `attention` is whether it is a fused
    attention; `fresh` is the bytes of large new blocks.
    """

    flops: int
    moved: int
    width: int
    thin: int = 0
    attention: bool = False
    fresh: int = 0


@dataclass(slots=True)
class Trace:
    """What a computation held and did.

    Attributes:
        peak: most bytes at one time that were not there before, by what they are ("activations", "logits",
            "gradients", "working").
        most: the same of each kind at its own time.
        work: of each operation that computes, in turn.
    """

    peak: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    work: list[Work] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Most bytes at one time."""
        return sum(self.peak.values())

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiplication and an addition being two."""
        return sum(work.flops for work in self.work)


class Account(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storage of every tensor made inside it until that is freed.

    Args:
        known: tensors that were there before; their storage is not counted.
        vocabulary: a tensor whose last dimension this is, made while activations are, holds logits.
    """

    def __init__(self, known: Iterable[Tensor], vocabulary: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        """What was held and done so far."""
        self.making = "activations"
        """What tensors made from now on are: a kind of `Trace.peak`."""
        self._vocabulary = vocabulary
        self._live: Counter[str] = Counter()
        self._kinds: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._kinds[tensor.untyped_storage()] = []

    def call(self, what: str, tensor: Tensor) -> None:
        """Count the storage of `tensor` as `what` from now on."""
        kind = self._kinds.get(tensor.untyped_storage())
        if kind and kind[0] != what:
            size = tensor.untyped_storage().nbytes()
            self._live[kind[0]] -= size
            self._live[what] += size
            self.trace.most[what] = max(self.trace.most[what], self._live[what])
            kind[0] = what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run(func, args, kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in made if tensor.untyped_storage() not in self._kinds]
        if new or func._schema.is_mutable:
            sizes = [tensor.untyped_storage().nbytes() for tensor in new]
            fresh = sum(size for size in sizes if size >= _LARGE_BLOCK)
            self.trace.work.append(_work(func, args, kwargs or {}, result, given, made, fresh))
        for tensor in new:
            self._begin(tensor)
        if new and self._live.total() > self.trace.bytes:
            self.trace.peak = +self._live
        return result

    def _begin(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._kinds:
            return
        wide = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
        kind = ["logits" if wide and self.making == "activations" else self.making]
        size = storage.nbytes()
        self._kinds[storage] = kind
        self._live[kind[0]] += size
        self.trace.most[kind[0]] = max(self.trace.most[kind[0]], self._live[kind[0]])
        weakref.finalize(storage, self._end, kind, size)

    def _end(self, kind: list[str], size: int) -> None:
        self._live[kind[0]] -= size


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if "_grouped_mm" not in str(func) or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    # The experts of a mixture. Without data torch takes bfloat16 only, where its kernels take float32 too.
    left, right = (tensor.new_empty_strided(tensor.shape, tensor.stride(), dtype=torch.bfloat16) for tensor in args[:2])
    return func(left, right, *args[2:], **kwargs).to(args[0].dtype)


def _work(func: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor], made: list[Tensor], fresh: int) -> Work:
    name = str(func)
    if name.startswith("aten.logsumexp"):
        # Four operations: the largest, the difference in a new tensor, its exponential in place, the sum.
        size = _bytes(given[0])
        return Work(0, 6 * size, given[0].element_size(), fresh=size if size >= _LARGE_BLOCK else 0)
    written = sum(map(_bytes, made))
    moved = 2 * written if name.startswith(_PICKING) else written + sum(map(_bytes, given))
    if name.startswith(_ADDING):
        # The source is read, and as many rows of the target are read and written.
        moved = 3 * _bytes(given[-1])
    width = made[0].element_size() if made else 4
    thin = min(*given[-2].shape[-2:], *given[-1].shape[-2:]) if name.startswith(_PRODUCTS) else 0
    flops = _flops(func, name, args, kwargs, result)
    return Work(flops, moved, width, thin, name.startswith("aten._scaled_dot_product"), fresh)


def _flops(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    if name.startswith("aten._scaled_dot_product_flash_attention_for_cpu"):
        backward = "backward" in name
        query, key = (args[1], args[2]) if backward else (args[0], args[1])
        causal = args[7] if backward else (args[4] if len(args) > 4 else kwargs.get("is_causal", False))
        products = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3]
        # Two products forwards, five backwards; a causal kernel skips the half that is not seen.
        return int(products * 2 * (5 if backward else 2) // (2 if causal else 1))
    if "_grouped_mm" in name:
        # Each row goes through the matrix of one expert; of weights' gradients, rows are summed over.
        left, right = args[0].shape, args[1].shape
        return int(2 * left[-2] * left[-1] * right[-1])
    counter = flop_registry.get(func._overloadpacket)
    return int(counter(*args, **kwargs, out_val=result)) if counter is not None else 0


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor is read once.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
