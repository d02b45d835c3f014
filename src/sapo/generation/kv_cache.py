"""A key-value cache with preallocated memory.

transformers' dynamic layers copy their full cache for each token. On a CPU the copy took half of the decoding time at
batch size 1 and most of it at 64 (8.9M-parameter Llama). Preallocation avoids it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 128
"""Number of tokens by which a full buffer is extended: few copies, and little unused memory."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, as views of preallocated buffers.

    For the decode loop of this package only: tokens can be appended and rows removed, but not cropped or repeated.

    Args:
        layer: the layer after the prompt's forward pass; its content moves into the buffers.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.is_sliding = layer.is_sliding
        self.window = window_of(layer)
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


class FixedLayer(RoomyLayer):
    """One layer's keys and values in buffers of fixed length, written at the column given by a tensor.

    Every step uses the same memory, as a CUDA graph requires. The attention mask must hide columns that are not
    written yet, and columns outside the window, which are all kept.

    Args:
        layer: the layer after the prompt's forward pass; its content moves into the buffers.
        length: number of columns, including the prompt's.
        column: `[1]`, the index at which `update` writes.
    """

    def __init__(self, layer: DynamicLayer, length: int, column: Tensor) -> None:
        super().__init__(layer)
        held = layer.keys.shape[2]
        stop = layer.get_seq_length()
        rows, heads, _, size = layer.keys.shape
        # Zeros, because a hidden column has weight 0, and 0 times uninitialized memory may be NaN.
        self._buffers = (
            layer.keys.new_zeros(rows, heads, length, size),
            layer.values.new_zeros(rows, heads, length, layer.values.shape[-1]),
        )
        for buffer, states in zip(self._buffers, (layer.keys, layer.values), strict=True):
            buffer[:, :, stop - held : stop] = states
        self._column = column
        self._show(rows, length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values `[B, heads, 1, size]`, and return the buffers."""
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values


def window_of(layer: object) -> int | None:
    """Window of `layer` in tokens, including the newest; None without a window."""
    if isinstance(layer, RoomyLayer):
        return layer.window
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None


def attends_only(cache: Cache) -> bool:
    """Whether all layers of `cache` contain only keys and values, of all tokens or of a window."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer, FixedLayer)
    return type(cache) is DynamicCache and all(
        type(layer) in kinds and layer.get_seq_length() > 0 for layer in cache.layers
    )


def fix_length(cache: Cache, length: int, column: Tensor) -> None:
    """Give every layer of `cache` buffers of `length` columns (see `FixedLayer`); requires `attends_only(cache)`."""
    cache.layers = [FixedLayer(layer, length, column) for layer in cache.layers]


def make_room(cache: Cache, new_tokens: int) -> None:
    """Preallocate the growing layers of `cache`; call once, after the prompt.

    Other layers are not changed: recurrent states do not grow, and a window that slides within `new_tokens` is short.
    """
    if not isinstance(cache, DynamicCache):
        return
    for place, layer in enumerate(cache.layers):
        length = layer.get_seq_length() if isinstance(layer, DynamicLayer) else 0
        never_slides = type(layer) is DynamicSlidingWindowLayer and length + new_tokens < layer.sliding_window
        if length > 0 and (type(layer) is DynamicLayer or never_slides):
            cache.layers[place] = RoomyLayer(layer)


def can_join(cache: Cache) -> bool:
    """Whether caches like this one, of different rows, can be made one by `joined`."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def joined(caches: list[Cache], order: Tensor) -> Cache:
    """One cache of the rows of all, right-aligned to the widest; requires `can_join` of each.

    Args:
        caches: emptied layer by layer, so that no more than one layer is held twice.
        order: `[B]`, which of their rows, one after another, is the first, the second and so on.
    """
    whole, *_ = caches
    width = max(cache.get_seq_length() for cache in caches)
    for place, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in layers]
            rows, (_, heads, _, size) = len(order), parts[0].shape
            # Zeros, because a hidden column has weight 0, and 0 times uninitialized memory may be NaN.
            states, start = parts[0].new_zeros(rows, heads, width, size), 0
            for part, layer in zip(parts, layers, strict=True):
                where = order[start : start + len(part)]
                states[where, :, width - part.shape[2] :] = part
                start += len(part)
                setattr(layer, name, part.new_empty(0))  # a view would keep the memory
            setattr(whole.layers[place], name, states)
    return whole


def surviving_rows(going: list[int]) -> list[int]:
    """An order of the rows `going` (ascending) that moves as few of them as possible.

    Rows among the first `len(going)` keep their index; the others fill the indices of finished rows.
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
            # Not batch_select_indices: hybrid layers of transformers 5.23 inherit one without recurrent state.
            layer.reorder_cache(everything)


def _extended(states: Tensor, length: int) -> Tensor:
    """A buffer of `length` tokens that begins with `states` `[B, heads, tokens, size]`."""
    rows, heads, held, size = states.shape
    buffer = torch.empty(rows, heads, length, size, dtype=states.dtype, device=states.device)
    buffer[:, :, :held] = states
    return buffer
