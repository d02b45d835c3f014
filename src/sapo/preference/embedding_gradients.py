"""Gradients of input embeddings on a CPU, added where they belong.

PyTorch makes a gradient of the size of the vocabulary in each backward pass, zeros but for the tokens of the pass, and
adds it to that of the head, where both share their weights, and then to those of the passes before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from sapo.generation.forward import unwrapped


@contextmanager
def embedding_gradients_in_place(model: nn.Module) -> Iterator[None]:
    """Let backward passes of what is computed meanwhile add the gradients of tokens to `weight.grad` directly.

    Only on a CPU, in one process, for PyTorch's own embeddings: elsewhere hooks wait for the gradient, or the order of
    sums would not be fixed. The sums are the same up to rounding.
    """
    embedding = unwrapped(model).get_input_embeddings()
    if not (torch.is_grad_enabled() and _is_plain(embedding)):
        yield
        return

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        starts_graph = torch.empty(0, requires_grad=True)
        found: Tensor = _Embeddings.apply(output.detach(), starts_graph, embedding, args[0])  # type: ignore[no-untyped-call]
        return found

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _is_plain(embedding: Any) -> bool:
    if type(embedding) is not nn.Embedding or torch.distributed.is_initialized():
        return False
    weight = embedding.weight
    return (
        type(weight) in (nn.Parameter, FakeTensor)  # fake ones are traced by the estimate
        and weight.requires_grad
        and weight.device.type == "cpu"
        and weight._post_accumulate_grad_hooks is None
        and not weight._backward_hooks
        and not (embedding.scale_grad_by_freq or embedding.sparse or embedding.max_norm)
    )


class _Embeddings(torch.autograd.Function):
    """`states` `[R, L, H]`, the rows `ids` `[R, L]` of an embedding, which have been looked up."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, starts_graph: Tensor, embedding: nn.Embedding, ids: Tensor) -> Tensor:
        ctx.embedding, ctx.ids = embedding, ids
        return states.view_as(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        weight, ids = ctx.embedding.weight, ctx.ids.flatten()
        rows = grad.flatten(0, -2).to(weight.dtype)
        if ctx.embedding.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.embedding.padding_idx)[:, None], 0.0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows)
        return None, None, None, None
