"""One decoding step of a batch, as a function of tensors at fixed addresses.

A step reads and writes the tensors of `DecodingRows` and the cache in place, without synchronizing with the device. So
it can run many times before the host reads the tokens, and it can be captured as a CUDA graph.
"""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from sapo.generation.kv_cache import attends_only, fix_length, keep_rows, surviving_rows, window_of
from sapo.generation.sampling import Sampling, sample_tokens

Replay = Callable[[Callable[[], None]], None]
"""Runs a step. It gets the same step each time, and may record and replay it."""


class DecodingRows:
    """State of the rows that are decoded together, between two tokens.

    Args:
        contexts: token ids to continue, at least one each; right-aligned in the batch.
        budgets: new tokens of each row, 1 or more.
        seeds: seed of each row.
        pad_token_id: pads shorter contexts on the left.
        sampling: how a token is drawn.
        device: of the model.
        whole: see `sample_tokens`.

    Attributes:
        tokens: `[B, L]` contexts at first, then `[B, 1]` newest tokens.
        positions: same shape as `tokens`.
        drawn: `[B, room]` new tokens, as `sample_tokens` returns them.
        count: new tokens so far.
    """

    def __init__(
        self,
        contexts: Sequence[Sequence[int]],
        budgets: Sequence[int],
        seeds: Sequence[int],
        *,
        pad_token_id: int,
        sampling: Sampling,
        device: torch.device,
        whole: bool = False,
    ) -> None:
        self._sampling, self._whole = sampling, whole
        self._width, room = max(map(len, contexts)), max(budgets)
        width = self._width
        empty = torch.tensor([[width - len(context)] for context in contexts])
        ids = [[pad_token_id] * (width - len(context)) + list(context) for context in contexts]
        # By length, because a prompt may contain the pad token. Future columns count as attended.
        attended = (torch.arange(width + room) >= empty).long()
        uniforms = [[draw() for _ in range(room)] for draw in (random.Random(seed).random for seed in seeds)]
        last = torch.tensor([[len(c) + budget - 1] for c, budget in zip(contexts, budgets, strict=True)])
        self.tokens = _sent(torch.tensor(ids), device)
        self.positions = _sent((torch.arange(width) - empty).clamp_(min=0), device)
        self._attended = _sent(attended, device)
        # A finished row is computed until the host reads the tokens; its position must stay valid.
        self._last = _sent(last, device)
        # All at once: one transfer per call. MPS has no float64, so its tokens are drawn on the host.
        self._uniforms = torch.tensor(uniforms, dtype=torch.float64)
        if device.type != "mps":
            self._uniforms = _sent(self._uniforms, device)
        self.drawn = torch.zeros(len(contexts), room, dtype=torch.long, device=device)
        self._next = torch.zeros(1, dtype=torch.long, device=device)
        self._column = self._next + (width - 1)
        self.count = 0
        self._fixed = False
        self._hidden: Tensor | None = None
        self._windows: dict[str, int | None] = {}

    def prompt(self, rows: Sequence[int] | None = None, width: int | None = None) -> dict[str, Tensor]:
        """Model arguments for the forward pass over the contexts.

        Args:
            rows: whose contexts; None for all.
            width: tokens of the longest of these; None for that of all.
        """
        chosen = slice(None) if rows is None else torch.tensor(rows, device=self.tokens.device)
        start = 0 if width is None else self._width - width
        return {
            "input_ids": self.tokens[chosen, start:],
            "attention_mask": self._attended[chosen, start : self._width],
            "position_ids": self.positions[chosen, start:],
        }

    def hold(self, model: nn.Module, cache: Cache) -> bool:
        """Set the cache that the prompt filled; call once, after the prompt.

        Returns:
            Whether attention masks are built here, once, so that steps do not synchronize. With another attention
            implementation, or a cache with more than keys and values, transformers builds one from the
            two-dimensional mask at every step.
        """
        self._cache = cache
        self._windows = _windows(model, cache)
        if self._windows:
            keys = cache.layers[0].keys
            self._hidden = torch.zeros(self._attended.shape, dtype=keys.dtype, device=keys.device)
            self._hidden = self._hidden.masked_fill(self._attended == 0, -math.inf)[:, None, None]
        return bool(self._windows)

    def fix(self) -> None:
        """Allocate the cache at its final length, so that every step uses the same memory; needs masks of `hold`."""
        fix_length(self._cache, self._attended.shape[1], self._column)
        self._fixed = True

    def draw(self, logits: Tensor) -> None:
        """Draw the next token of each row from `logits` `[B, V]`."""
        uniforms = self._uniforms.index_select(1, self._next.to(self._uniforms.device))[:, 0]
        drawn = sample_tokens(logits, uniforms, self._sampling, whole=self._whole)[:, None]
        self.drawn.index_copy_(1, self._next, drawn)
        # The host raises on an invalid token when it reads it; until then the id must have an embedding.
        drawn = drawn.clamp(min=0)
        if self.tokens.shape == drawn.shape:
            self.tokens.copy_(drawn)
        else:
            self.tokens = drawn
        positions = torch.minimum(self.positions[:, -1:] + 1, self._last)
        if self.positions.shape == positions.shape:
            self.positions.copy_(positions)
        else:
            self.positions = positions
        self._next.add_(1)
        self._column.add_(1)

    def advance(self, step: Callable[..., Any]) -> None:
        """Run `step` (the model's forward pass with fixed options) on the newest tokens, and draw the next ones."""
        output = step(
            input_ids=self.tokens,
            attention_mask=self._mask(),
            position_ids=self.positions,
            past_key_values=self._cache,
        )
        self.draw(output.logits[:, -1])

    def keep(self, going: list[int]) -> None:
        """Keep the rows `going` (ascending) in the order of `surviving_rows`."""
        kept = surviving_rows(going)
        device = self.tokens.device
        index = _sent(torch.tensor(kept), device)
        keep_rows(self._cache, kept, device)
        for name in ("tokens", "positions", "drawn", "_attended", "_last", "_hidden"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index))
        self._uniforms = self._uniforms.index_select(0, index.to(self._uniforms.device))

    def _mask(self) -> Tensor | dict[str, Tensor]:
        if self._hidden is None:
            return self._attended[:, : self._width + self.count]
        masks = {kind: self._hidden_by(window) for kind, window in self._windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _hidden_by(self, window: int | None) -> Tensor:
        """Additive attention mask, `[B, 1, 1, keys]`: 0 or -inf."""
        assert self._hidden is not None
        if not self._fixed:
            stop = self._width + self.count
            return self._hidden[..., 0 if window is None else max(0, stop - window) : stop]
        columns = torch.arange(self._hidden.shape[-1], device=self._hidden.device)
        outside = columns > self._column
        if window is not None:
            outside |= columns <= self._column - window
        return self._hidden.masked_fill(outside, -math.inf)


class CudaGraph:
    """A `Replay` that captures a step as a CUDA graph: one launch per token.

    The first step runs uncaptured on a side stream as a warm-up; the second is captured. A step that cannot be captured
    runs without a graph, with a warning that gives the reason.

    Args:
        device: of the step's tensors. A stream of another device would capture nothing, and replay nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: Any = None
        self._warm = self._failed = False

    def __call__(self, step: Callable[[], None]) -> None:
        """Run `step` or replay its graph."""
        if self._failed:
            step()
            return
        with torch.cuda.device(self._device):
            if not self._warm:
                self._warm_up(step)
                return
            if self._graph is None:
                self._graph = self._captured(step)
            if self._graph is not None:
                self._graph.replay()
                return
        step()

    def _warm_up(self, step: Callable[[], None]) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        self._warm = True

    def _captured(self, step: Callable[[], None]) -> Any:
        """The graph of `step`, which has not run; None if it cannot be captured."""
        graph, cached = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        # Casts cached outside the capture would be freed before a replay reads them.
        torch.set_autocast_cache_enabled(False)
        try:
            # What other threads do with the device meanwhile is not captured, and does not disturb.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            self._failed = True
            warnings.warn(
                f"Decoding without a CUDA graph, which is slower: capturing a step failed ({error}).", stacklevel=3
            )
            return None
        finally:
            torch.set_autocast_cache_enabled(cached)
        return graph


def replay_for(model: nn.Module, device: torch.device) -> Callable[[], Replay] | None:
    """Factory of a `Replay` for `model`; None to run steps uncaptured. `DecodingRows` must build the masks.

    Not captured: models that transformers cannot compile as one graph (some mixtures of experts, whose routing runs on
    the host), and quantized models.
    """
    if device.type != "cuda" or not model._can_compile_fullgraph:
        return None
    quantized = model.config.to_dict().get("quantization_config")  # type: ignore[union-attr, operator]
    return None if quantized else functools.partial(CudaGraph, device)


def _windows(model: nn.Module, cache: Cache) -> dict[str, int | None]:
    """Window of each attention layer type of `model`; empty if masks cannot be built for it."""
    if not attends_only(cache) or not model._supports_attention_backend:
        return {}
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    implementation = config._attn_implementation
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS or (
        ALL_MASK_ATTENTION_FUNCTIONS[implementation] not in (sdpa_mask, eager_mask)
    ):
        return {}
    windows = {window_of(layer) for layer in cache.layers}
    if len(windows) == 1:
        return {"": windows.pop()}
    if len(windows) > 2 or set(config.to_dict().get("layer_types") or ()) != {"full_attention", "sliding_attention"}:
        return {}
    return {"full_attention": None, "sliding_attention": next(window for window in windows if window is not None)}


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, copied without synchronizing."""
    return tensor.to(device, non_blocking=True)
