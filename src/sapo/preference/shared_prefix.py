"""Attention over rows in which the two responses of a pair share their prefix.

A packed row contains each pair as `[P A B C | a* B' C']`: the chosen sequence, then a branch that repeats the last
shared token a* (so that every position predicts one token) and continues with the rejected tokens. The branch attends
to the prefix and itself; pairs do not attend to each other. Positions continue from the prefix in both.

Two ways to compute it, both exact: an attention function registered with transformers that computes each pair at its
own lengths (no padding, no mask of the full row), and a block mask for FlexAttention. Everything else in the model is
token-wise and needs no change.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARED_ATTENTION = "sapo_shared_prefix"
"""Name under which the attention function is registered; without shared prefixes it is sdpa."""

_LARGEST_FLASH_HEAD = 256
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class PairSpan:
    """Span of one pair in a packed row: chosen at `[start, middle)`, branch at `[middle, stop)`.

    The branch attends to itself and to the first `visible` tokens of the chosen sequence.
    """

    start: int
    middle: int
    stop: int
    visible: int


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """The pairs of one packed row, and their attention masks, built at first use."""

    spans: tuple[PairSpan, ...]
    _masks: dict[tuple[int, int, int | None, torch.device], Tensor] = field(default_factory=dict, repr=False)
    _sequences: dict[torch.device, Sequences] = field(default_factory=dict, repr=False)

    @property
    def lengths(self) -> list[int]:
        """Alternating lengths of chosen sequence and branch, to split the row."""
        return [size for span in self.spans for size in (span.middle - span.start, span.stop - span.middle)]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """Causal mask of the last `queries` of `keys` positions, `[queries, keys]`; True: attended."""
        what = (queries, keys, window, device)
        if what not in self._masks:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
            self._masks[what] = seen if window is None else seen.triu(keys - queries - window + 1)
        return self._masks[what]

    def sequences(self, device: torch.device) -> Sequences:
        """The row as sequences of unequal lengths, built at first use."""
        if device not in self._sequences:
            self._sequences[device] = Sequences.of(self.spans, device)
        return self._sequences[device]


@dataclass(frozen=True, slots=True)
class Sequences:
    """A packed row as 2n sequences of unequal lengths: of each pair the chosen one, then the branch after its prefix.

    Attributes:
        queries: `[2n + 1]` int32, cumulative number of queries.
        keys: `[2n + 1]` int32, cumulative number of keys; a branch has its prefix's before its own.
        longest: maximum number of queries and of keys of a sequence.
        tokens: `[K]`, the token of the row that each key is of.
        first: `[N]`, the first key of each token.
        again: `[V]`, the keys that a prefix has a second time, for its branch.
        shared: `[V]`, the tokens that these are of.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    tokens: Tensor
    first: Tensor
    again: Tensor
    shared: Tensor

    @classmethod
    def of(cls, spans: tuple[PairSpan, ...], device: torch.device) -> Sequences:
        """From the pairs of a row; copied to `device` without synchronizing."""
        queries, keys = [], []
        tokens: list[int] = []
        first: list[int] = []
        again: list[int] = []
        shared: list[int] = []
        for span in spans:
            chosen, branch = span.middle - span.start, span.stop - span.middle
            prefix = range(span.start, span.start + span.visible)
            at, then = len(tokens), len(tokens) + chosen
            tokens += [*range(span.start, span.middle), *prefix, *range(span.middle, span.stop)]
            first += [*range(at, then), *range(then + span.visible, len(tokens))]
            again += range(then, then + span.visible)
            shared += prefix
            queries += [chosen, branch]
            keys += [chosen, span.visible + branch]

        def sent(values: list[int], dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            queries=sent([0, *accumulate(queries)], torch.int32),
            keys=sent([0, *accumulate(keys)], torch.int32),
            longest=(max(queries), max(keys)),
            tokens=sent(tokens),
            first=sent(first),
            again=sent(again),
            shared=sent(shared),
        )


class _KeysOfSequences(torch.autograd.Function):
    """States `[N, heads, size]` of a row's tokens as those of its sequences' keys, `[K, heads, size]`.

    `index_select` alone would add gradients in an order that a GPU does not fix; a token has at most two here.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        return states.index_select(0, sequences.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.index_select(0, ctx.sequences.first)
        return own.index_add_(0, ctx.sequences.shared, grad.index_select(0, ctx.sequences.again)), None


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_prefixes: SharedPrefixes | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, pair by pair; plain sdpa without shared prefixes.

    Args:
        module: the attention layer.
        query: `[1, heads, N, size]`.
        key: `[1, key heads, N, size]`.
        value: `[1, key heads, N, size]`.
        attention_mask: ignored with shared prefixes.
        dropout: probability.
        scaling: of the scores; None for 1 / sqrt(size).
        shared_prefixes: passed through by the model from its keyword arguments.
        kwargs: `sliding_window` in tokens, None for all; other arguments are passed to sdpa.

    Returns:
        `[1, N, heads, size]` and None, as transformers expects.
    """
    if shared_prefixes is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    window: int | None = kwargs.get("sliding_window")
    return _pairs_attention(query, key, value, shared_prefixes, window, dropout, scaling), None


@functools.cache
def _varlen_attention() -> Callable[..., Any] | None:
    """PyTorch's attention of sequences of unequal lengths in one call, on CUDA; None before PyTorch 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        return None
    # Older versions take grouped keys without being told.
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


def _compute_dtype(states: Tensor) -> torch.dtype:
    """Of attention: that of autocast, where it is on. Rotary embeddings return float32 there."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _flash_kernel(query: Tensor, value: Tensor) -> Callable[..., Any] | None:
    """The function that computes all pairs in one call; None where device, dtype or sizes do not allow it."""
    size = query.shape[-1]
    if query.device.type != "cuda" or _compute_dtype(query) not in _FLASH_DTYPES or size != value.shape[-1] or size % 8:
        return None
    if torch.version.cuda is None or size > _largest_flash_head(torch.cuda.get_device_capability(query.device)):
        return None
    return _varlen_attention()


def _largest_flash_head(capability: tuple[int, int]) -> int:
    """Largest head whose gradients flash attention computes on a GPU of this kind; only data-center GPUs have all."""
    if capability < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return 0
    return _LARGEST_FLASH_HEAD if capability in ((8, 0), (9, 0), (10, 0)) else 192


def _sequences_attention(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: SharedPrefixes,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """As `_pairs_attention`, in one call: a row of many short pairs would start many small kernels one by one."""
    sequences, dtype = prefixes.sequences(query.device), _compute_dtype(query)
    own, keys, values = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    output: Tensor = kernel(
        own,
        _KeysOfSequences.apply(keys, sequences),  # type: ignore[no-untyped-call]
        _KeysOfSequences.apply(values, sequences),  # type: ignore[no-untyped-call]
        sequences.queries,
        sequences.keys,
        *sequences.longest,
        scale=scaling,
        # Counted from a sequence's last key; the token itself is not in the window's size here.
        window_size=(-1 if window is None else window - 1, 0),
    )
    return output[None]


# torch.compile would recompile for every length of every pair, so it skips this function.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _pairs_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: SharedPrefixes,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    kernel = None if dropout else _flash_kernel(query, value)
    if kernel is not None:
        return _sequences_attention(kernel, query, key, value, prefixes, window, scaling)
    # split, not slices: the backward of a split is one concatenation, that of each slice a tensor of the full row.
    sizes = prefixes.lengths
    queries, keys, values = (torch.split(states, sizes, 2) for states in (query, key, value))
    outputs = []
    for pair, span in enumerate(prefixes.spans):
        chosen, branch = 2 * pair, 2 * pair + 1
        seen_keys = torch.cat([keys[chosen][:, :, : span.visible], keys[branch]], 2)
        seen_values = torch.cat([values[chosen][:, :, : span.visible], values[branch]], 2)
        for q, k, v in (
            (queries[chosen], keys[chosen], values[chosen]),
            (queries[branch], seen_keys, seen_values),
        ):
            how = attention_options(q, k, window, prefixes)
            if q.shape[1] != k.shape[1] and "enable_gqa" not in how:
                k, v = (repeat_kv(states, q.shape[1] // k.shape[1]) for states in (k, v))
            outputs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, **how))
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def attention_options(query: Tensor, key: Tensor, window: int | None, prefixes: SharedPrefixes) -> dict[str, Any]:
    """Arguments of scaled dot-product attention for the last of `key`'s tokens, causal and within `window`.

    A CPU supports grouped keys with any mask. On an accelerator only the flash kernels do, for 16-bit dtypes and causal
    masks; otherwise keys are repeated and an explicit mask is used.
    """
    own, keys, device = query.shape[2], key.shape[2], query.device
    windowed = window is not None and window < keys
    on_host = device.type == "cpu"
    flash = _compute_dtype(query) in _FLASH_DTYPES and query.shape[-1] <= _LARGEST_FLASH_HEAD
    options: dict[str, Any] = {}
    if not windowed and own == keys:
        options["is_causal"] = True
    elif not windowed and flash and device.type == "cuda":
        options["attn_mask"] = causal_lower_right(own, keys)
    else:
        options["attn_mask"] = prefixes.mask(own, keys, window if windowed else None, device)
    if query.shape[1] != key.shape[1] and (on_host or (flash and type(options.get("attn_mask")) is not Tensor)):
        options["enable_gqa"] = True
    return options


AttentionInterface.register(SHARED_ATTENTION, shared_prefix_attention)
# For calls without shared prefixes, generation among them.
AttentionMaskInterface.register(SHARED_ATTENTION, sdpa_mask)


def may_attend(prefixes: SharedPrefixes, window: int | None, device: torch.device | str) -> Callable[..., Tensor]:
    """Attention rule for FlexAttention: (batch, head, query, key) indices to True or False."""
    pair_of, branch_of, position_of = [], [], []
    for pair, span in enumerate(prefixes.spans):
        chosen, branch = span.middle - span.start, span.stop - span.middle
        pair_of += [pair] * (chosen + branch)
        branch_of += [0] * span.visible + [1] * (chosen - span.visible) + [2] * branch
        position_of += [*range(chosen), *range(span.visible, span.visible + branch)]
    pairs, branches, positions = (torch.tensor(x, device=device) for x in (pair_of, branch_of, position_of))

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (pairs[query] == pairs[key])
        seen = seen & ((branches[key] == 0) | (branches[key] == branches[query]))
        return seen if window is None else seen & (positions[query] - positions[key] < window)

    return rule


def attention_arguments(model: nn.Module, prefixes: SharedPrefixes, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of `model` for attention with `prefixes`."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if config._attn_implementation != "flex_attention":
        # transformers passes any 4D mask on unchanged, so this unused one avoids a causal mask of the full row.
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return {"attention_mask": unread, "shared_prefixes": prefixes}
    window = config.to_dict().get("sliding_window")
    types = set(config.to_dict().get("layer_types") or ())
    if len(types) > 1:
        return {
            "attention_mask": {
                "full_attention": _block_mask(prefixes, None, device),
                "sliding_attention": _block_mask(prefixes, window, device),
            }
        }
    slides = types == {"sliding_attention"} or (not types and window is not None)
    return {"attention_mask": _block_mask(prefixes, window if slides else None, device)}


def _block_mask(prefixes: SharedPrefixes, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = prefixes.spans[-1].stop
    return create_block_mask(may_attend(prefixes, window, device), None, None, tokens, tokens, device=str(device))


_ALIBI = ("bloom", "mpt")


def shared_layout_unsupported_reason(model: nn.Module) -> str | None:
    """The reason in the configuration why `model` cannot share prefixes; None without one."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    attention = config._attn_implementation
    if attention not in ("sdpa", SHARED_ATTENTION, "flex_attention"):
        return f"attn_implementation is {attention}; sdpa and flex_attention support shared prefixes"
    if config.model_type in _ALIBI or getattr(config, "alibi", False):
        return f"{config.model_type} builds ALiBi's biases from a mask of one row per text"
    other = set(config.to_dict().get("layer_types") or ()) - _LAYER_TYPES
    if other:
        return f"{config.model_type} has layers of type {', '.join(sorted(other))}"
    return None


def use_shared_attention(model: nn.Module) -> None:
    """Make `model` use the registered attention function instead of sdpa."""
    if model.config.get_text_config()._attn_implementation == "sdpa":  # type: ignore[union-attr, operator]
        model.set_attn_implementation(SHARED_ATTENTION)  # type: ignore[operator]
