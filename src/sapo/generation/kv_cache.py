"""A key-value cache with room for the tokens to come.

transformers' dynamic layers build their whole cache anew for each token. On CPU that copy was half of
decoding at batch 1 and most of it at batch 64 (8.9M-parameter Llama). The final length being known, it need
not happen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 128
"""Tokens that a full buffer is extended by: copies become rare, and memory stays near what the rows need."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, as views of buffers with room for tokens to come.

    Serves the decode loop of this package only: it grows and loses rows, but cannot be cropped or repeated.

    Args:
        layer: the layer after the prompt went through it; its content is taken over.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.is_sliding = layer.is_sliding
        self._buffers = layer.keys, layer.values
        self._show(rows=layer.keys.shape[0], length=layer.keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, heads, tokens, size]`, and return all of them so far."""
        rows, _, start, _ = self.keys.shape
        stop = start + key_states.shape[2]
        if stop > self._buffers[0].shape[2]:
            self._buffers = _extended(self.keys, stop + _ROOM), _extended(self.values, stop + _ROOM)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, start:stop] = states
        self._show(rows, stop)
        return self.keys, self.values

    def move_rows(self, sources: Tensor, targets: Tensor, rows: int) -> None:
        """Copy rows `sources` to rows `targets`, then keep the first `rows`."""
        for states in (self.keys, self.values):
            states[targets] = states[sources]
        self._show(rows, self.keys.shape[2])

    def _show(self, rows: int, length: int) -> None:
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self._buffers)


def make_room(cache: Cache, new_tokens: int) -> None:
    """Let each layer of `cache` that grows do so in place; to be called once, after the prompt.

    Layers of other kinds stay as they are: recurrent states do not grow, and a window that slides within
    `new_tokens` is short.
    """
    if not isinstance(cache, DynamicCache):
        return
    for place, layer in enumerate(cache.layers):
        length = layer.get_seq_length() if isinstance(layer, DynamicLayer) else 0
        never_slides = type(layer) is DynamicSlidingWindowLayer and length + new_tokens < layer.sliding_window
        if length > 0 and (type(layer) is DynamicLayer or never_slides):
            cache.layers[place] = RoomyLayer(layer)


def surviving_rows(going: list[int]) -> list[int]:
    """An order of the rows `going` (ascending) that moves as few of them as possible.

    Rows among the first `len(going)` places stay where they are; the others fill the places left by finished
    rows.
    """
    count = len(going)
    staying = {place for place in going if place < count}
    movers = iter(going[len(staying) :])
    return [place if place in staying else next(movers) for place in range(count)]


def keep_rows(cache: Cache, kept: list[int], device: torch.device) -> None:
    """Keep the rows `kept` of `cache`, in the order that `surviving_rows` gave them."""
    everything = torch.tensor(kept, device=device)
    moved = [place for place, row in enumerate(kept) if place != row]
    targets = torch.tensor(moved, dtype=torch.long, device=device)
    if not isinstance(cache, DynamicCache):
        cache.reorder_cache(everything)
        return
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.move_rows(everything[targets], targets, len(kept))
        else:
            # Not batch_select_indices: in 5.23 hybrid layers inherit one that forgets their recurrent state.
            layer.reorder_cache(everything)


def _extended(states: Tensor, length: int) -> Tensor:
    """A buffer of `length` tokens that begins with `states` `[B, heads, tokens, size]`."""
    rows, heads, held, size = states.shape
    buffer = torch.empty(rows, heads, length, size, dtype=states.dtype, device=states.device)
    buffer[:, :, :held] = states
    return buffer
