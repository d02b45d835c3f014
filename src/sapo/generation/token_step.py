"""One token of each row of a batch, as a function of tensors that stay where they are.

A step reads and writes the tensors of `DecodingRows` and the cache, in place, and asks the device for nothing. So it
can run many times before the host looks at the tokens, and it can be captured as a CUDA graph.
"""

from __future__ import annotations

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
"""Runs a step. It is given the same step each time, and may record it and repeat what it recorded."""


class DecodingRows:
    """The rows of a batch that are decoded together, between two tokens.

    Args:
        contexts: token ids to continue, right-aligned here, at least one each.
        budgets: new tokens of each row, 1 or more.
        seeds: seed of each row.
        pad_token_id: fills the space before shorter contexts.
        sampling: how a token is drawn.
        device: of the model.

    Attributes:
        tokens: `[B, L]` contexts at first, then `[B, 1]` the newest token.
        positions: like `tokens`.
        drawn: `[B, room]` new tokens; `INVALID_TOKEN` where a row had no distribution.
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
    ) -> None:
        self._sampling = sampling
        self._width, room = max(map(len, contexts)), max(budgets)
        width = self._width
        empty = torch.tensor([[width - len(context)] for context in contexts])
        ids = [[pad_token_id] * (width - len(context)) + list(context) for context in contexts]
        # By length alone, because a prompt may itself hold the pad token. Tokens to come are attended to.
        attended = (torch.arange(width + room) >= empty).long()
        uniforms = [[draw() for _ in range(room)] for draw in (random.Random(seed).random for seed in seeds)]
        last = torch.tensor([[len(c) + budget - 1] for c, budget in zip(contexts, budgets, strict=True)])
        self.tokens = _sent(torch.tensor(ids), device)
        self.positions = _sent((torch.arange(width) - empty).clamp_(min=0), device)
        self._attended = _sent(attended, device)
        # A row is computed beyond its end until the host has looked; its position must still be one.
        self._last = _sent(last, device)
        # All at once: one transfer a call. MPS has no float64, and its tokens are drawn on the host.
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

    def prompt(self) -> dict[str, Tensor]:
        """Arguments with which a model reads the contexts."""
        return {
            "input_ids": self.tokens,
            "attention_mask": self._attended[:, : self._width],
            "position_ids": self.positions,
        }

    def hold(self, model: nn.Module, cache: Cache) -> bool:
        """Take the cache that the prompt filled; to be called once, after it.

        Returns:
            Whether attention masks are made here, once, so that steps wait for nothing. Where they are not, because
            the attention is of another kind or the cache holds something else than keys and values,
            transformers makes one from the two-dimensional mask at every step.
        """
        self._cache = cache
        self._windows = _windows(model, cache)
        if self._windows:
            keys = cache.layers[0].keys
            self._hidden = torch.zeros(self._attended.shape, dtype=keys.dtype, device=keys.device)
            self._hidden = self._hidden.masked_fill(self._attended == 0, -math.inf)[:, None, None]
        return bool(self._windows)

    def fix(self) -> None:
        """Give the cache its final length, so that every step touches the same memory; needs masks made here."""
        fix_length(self._cache, self._attended.shape[1], self._column)
        self._fixed = True

    def draw(self, logits: Tensor) -> None:
        """Draw the next token of each row from `logits` `[B, V]`."""
        uniforms = self._uniforms.index_select(1, self._next.to(self._uniforms.device))[:, 0]
        drawn = sample_tokens(logits, uniforms, self._sampling)[:, None]
        self.drawn.index_copy_(1, self._next, drawn)
        # An invalid token ends the call when the host sees it; until then it must be one that has an embedding.
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
        """Compute the newest tokens with `step`, the model's forward and its fixed options, and draw the next ones."""
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
        """What is added to the scores, `[B, 1, 1, keys]`: 0 or -inf."""
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
    """A `Replay` that captures a step as a CUDA graph: one launch a token.

    The first step runs as it is, on a side stream, and warms up what must not happen in a capture; the second is
    captured. A step that cannot be captured goes on without, with a warning that says why.
    """

    def __init__(self) -> None:
        self._graph: Any = None
        self._warm = self._failed = False

    def __call__(self, step: Callable[[], None]) -> None:
        """Run `step`, or what was captured of it."""
        if self._failed:
            step()
            return
        if not self._warm:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            self._warm = True
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            cached = torch.is_autocast_cache_enabled()
            # Casts kept from outside would be read from memory that is free by the time of a replay.
            torch.set_autocast_cache_enabled(False)
            try:
                with torch.cuda.graph(graph):
                    step()
            except RuntimeError as error:
                self._failed = True
                warnings.warn(
                    f"Decoding launches its kernels one by one: a step cannot be captured as a CUDA graph ({error}).",
                    stacklevel=2,
                )
                step()
                return
            finally:
                torch.set_autocast_cache_enabled(cached)
            self._graph = graph
        self._graph.replay()


def replay_for(model: nn.Module, device: torch.device) -> Callable[[], Replay] | None:
    """What makes a `Replay` for `model`, of which masks are made by `DecodingRows`; None for steps one by one.

    Not captured: models that transformers does not compile whole (some mixtures of experts, whose routing the host
    must see), and quantized ones.
    """
    if device.type != "cuda" or not model._can_compile_fullgraph:
        return None
    quantized = model.config.to_dict().get("quantization_config")  # type: ignore[union-attr, operator]
    return None if quantized else CudaGraph


def _windows(model: nn.Module, cache: Cache) -> dict[str, int | None]:
    """Each kind of attention layer that `model` has, with its window; empty where masks cannot be made for it."""
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
    """`tensor` on `device`, without waiting for what was launched there."""
    return tensor.to(device, non_blocking=True)
