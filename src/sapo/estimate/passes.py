"""The parts of a step, each run without data: training, reference, prompt and one token of generation."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sapo.config import HAS_ACTIVATION_CHECKPOINTING, SAPOConfig
from sapo.estimate.tracing import Account, Trace
from sapo.generation.decoding import rows_of_passes
from sapo.generation.kv_cache import can_join, make_room
from sapo.generation.sampling import Sampling
from sapo.generation.token_step import DecodingRows
from sapo.preference.batches import Layout, PairBatch, collate_pairs, pass_tokens
from sapo.preference.pairs import Pair
from sapo.preference.scoring import head_at, model_inputs, summed_logps, sums_by_owner
from sapo.preference.segments import Segment
from sapo.preference.shared_prefix import shared_layout_unsupported_reason, use_shared_attention
from sapo.weights.footprint import RunModels

_TILE = (4096, 32768)
"""Positions and vocabulary entries that trl's fused head works on at a time."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a pair: prompt, what comes before the segment, the segment, what follows it."""

    prompt: int
    before: int
    segment: int
    after: int

    @property
    def response(self) -> int:
        """Tokens of the response."""
        return self.before + self.segment + self.after

    @property
    def context(self) -> int:
        """Tokens that the opponent reads."""
        return self.prompt + self.before


@dataclass(frozen=True, slots=True)
class Passes:
    """Traces of one pass each; a None is a part that the run does not have.

    Attributes:
        training: the policy's forward and backward pass over the pairs of a micro-batch.
        reference: the reference's scores of them.
        prefill: the opponent reads the contexts of all rows that are decoded together, on a CPU in several passes.
        token: it decodes a token of each of them.
        cache: bytes of their keys and values.
        cast: bytes of weights that are cast for a call.
        masked: whether the masks of all tokens are made once, so that a token waits for no device.
        captured: whether CUDA would launch a token's operations as one graph.
        pairs: in one pass.
        layout: how they are laid out.
        why_plain: why not as `shared`; None where they are, or were not asked to be.
    """

    training: Trace
    reference: Trace | None
    prefill: Trace | None
    token: Trace | None
    cache: int
    cast: int
    masked: bool
    captured: bool
    pairs: int
    layout: Layout
    why_plain: str | None


def trace_passes(
    roles: RunModels, lengths: Lengths, *, rows: int, fused_lm_head: bool, on_gpu: bool, pairs: int | None = None
) -> Passes:
    """Trace the passes of a step.

    Args:
        roles: of the run; the policy's architecture stands for all three.
        lengths: of every pair.
        rows: decoded together; 0 without generation.
        fused_lm_head: as trl's kernel on CUDA would, in tiles.
        on_gpu: else on a CPU, which reads contexts in several passes, and adds gradients of embeddings in place.
        pairs: in one pass; unset, see `pairs_of_a_pass`.
    """
    args = roles.args
    pairs = pairs or pairs_of_a_pass(roles, lengths)
    why = _why_plain(roles)
    layout: Layout = "plain" if why else "shared"
    # Where it is scored cannot be found without data.
    laid_out = _batch(lengths, pairs, layout, args)
    with FakeTensorMode() as mode:
        policy = _with_storage(roles.policy)
        if why is None:
            use_shared_attention(policy)
        batch = _fake(laid_out, mode)
        scores = _fused_scores if fused_lm_head else summed_logps
        training = _training(policy, batch, roles, scores, on_gpu=on_gpu)
        reference = prefill = token = None
        cache = cast = 0
        masked = False
        policy.eval()
        if args.reference != "none":
            with _computing(policy, roles), _account(policy) as account, torch.no_grad():
                scores(policy, batch)
            reference = account.trace
        if rows:
            prefill, token, cache, cast, masked = _generation(policy, roles, lengths, rows, on_gpu=on_gpu)
    captured = masked and bool(policy._can_compile_fullgraph) and not roles.quantized
    return Passes(training, reference, prefill, token, cache, cast, masked, captured, pairs, layout, why)


def pairs_of_a_pass(roles: RunModels, lengths: Lengths) -> int:
    """Pairs that one forward pass holds by `pairs_per_forward` and `tokens_per_forward`; see `trace_passes`."""
    args = roles.args
    most = min(args.pairs_per_forward or args.pairs_per_micro_batch, args.pairs_per_micro_batch)
    if args.tokens_per_forward is None:
        return int(most)
    layout: Layout = "plain" if _why_plain(roles) else "shared"
    return max(1, min(int(most), int(args.tokens_per_forward) // pass_tokens([_pair(lengths, args)], layout)))


def _why_plain(roles: RunModels) -> str | None:
    args, attention = roles.args, roles.model_args.attn_implementation
    if args.layout == "plain" or args.nll_scope == "all":
        return "layout=plain" if args.layout == "plain" else "nll_scope=all"
    if attention is not None and attention not in ("sdpa", "flex_attention"):
        return f"attn_implementation is {attention}"
    return shared_layout_unsupported_reason(roles.policy)


def _training(policy: Any, batch: PairBatch, roles: RunModels, scores: Any, *, on_gpu: bool) -> Trace:
    args, strategy = roles.args, roles.strategy
    policy.train()
    if args.gradient_checkpointing is True:
        # As transformers does by default; and random state does not matter without data.
        options = {"use_reentrant": False, **(args.gradient_checkpointing_kwargs or {}), "preserve_rng_state": False}
        if HAS_ACTIVATION_CHECKPOINTING:
            policy.activation_checkpointing_enable(options)
        else:
            policy.gradient_checkpointing_enable(options)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    # Gradients that a hook waits for are not added in place, nor are those of several processes.
    in_place = [] if on_gpu or strategy.processes > 1 else [policy.get_input_embeddings().weight]
    with _account(policy) as account:

        def arrived(weight: Tensor) -> None:
            if strategy.shards_gradients:
                weight.grad = None
                return
            for one in (weight, *in_place):
                if one.grad is not None:
                    account.call("gradients", one.grad)

        hooked = [weight for weight in trained if all(weight is not one for one in in_place)]
        handles = [weight.register_post_accumulate_grad_hook(arrived) for weight in hooked]
        # Of several passes, all but the first find gradients there.
        accumulates = args.gradient_accumulation_steps > 1 or len(batch) < args.pairs_per_micro_batch
        for _ in range(2 if accumulates and not strategy.shards_gradients else 1):
            account.making = "activations"
            account.trace.work.clear()
            with _autocast(args):
                sums, _ = scores(policy, batch)
                loss = sums.sum()
            account.making = "working"
            loss.backward()
            del sums, loss
            for weight in in_place:
                arrived(weight)
        for handle in handles:
            handle.remove()
    for weight in trained:
        weight.grad = None
    return account.trace


def _generation(
    policy: Any, roles: RunModels, lengths: Lengths, rows: int, *, on_gpu: bool
) -> tuple[Trace, Trace, int, int, bool]:
    """The decode loop's own first two tokens: the contexts are read, and one token more."""
    state = DecodingRows(
        [[0] * lengths.context] * rows,
        [lengths.segment] * rows,
        [0] * rows,
        pad_token_id=0,
        # top-k looks at values on a CPU. The sort that top-p takes on an accelerator is in the trace.
        sampling=Sampling(roles.args.temperature, 0, roles.args.top_p),
        device=torch.device("cpu"),
    )
    forward = functools.partial(policy, use_cache=True, logits_to_keep=1, return_dict=True)
    with torch.no_grad(), _computing(policy, roles, generates=True) as cast:
        parts = [list(range(rows))] if on_gpu else rows_of_passes([lengths.context] * rows)
        reading, logits, cache = _read(policy, state, forward, parts)
        make_room(cache, lengths.segment)
        holds = state.hold(policy, cache)
        state.draw(logits)
        state.count += 1
        del logits
        held = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        # The first token makes room for those to come, so both are counted with the larger cache.
        with _account(policy, held) as token:
            state.advance(forward)
        size = sum(s.untyped_storage().nbytes() for layer in cache.layers for s in (layer.keys, layer.values))
    # Traced by another attention, which transformers would make no mask for at each token.
    holds = holds and roles.model_args.attn_implementation in (None, "sdpa", "eager")
    return reading, token.trace, size, cast, holds


def _read(
    policy: Any, state: DecodingRows, forward: Callable[..., Any], parts: list[list[int]]
) -> tuple[Trace, Tensor, Any]:
    """All passes over the contexts, which have one length: their trace, the next token's logits, and the cache.

    Passes of as many rows are alike, so the first and the last are traced.
    """

    def traced(part: list[int]) -> tuple[Trace, Any]:
        with _account(policy) as account:
            output = forward(**state.prompt(part), past_key_values=None)
        return account.trace, output

    first, *more = parts
    reading, output = traced(first)
    logits, cache = output.logits[:, -1], output.past_key_values
    if not more:
        return reading, logits, cache
    if not can_join(cache):
        everything, output = traced([row for part in parts for row in part])
        return everything, output.logits[:, -1], output.past_key_values
    last = traced(more[-1])[0] if len(more[-1]) < len(first) else reading
    rows = sum(map(len, parts))
    held = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    for layer in cache.layers:
        layer.keys, layer.values = (states.new_empty(rows, *states.shape[1:]) for states in (layer.keys, layer.values))
    # The keys and values of the passes before are held meanwhile.
    before = {id(reading): (len(more) - (last is not reading)) * held, id(last): len(more) * held}
    worst = max((reading, last), key=lambda trace: before[id(trace)] + trace.bytes)
    return (
        Trace(
            peak=worst.peak + Counter(activations=before[id(worst)]),
            most=worst.most + Counter(activations=before[id(worst)]),
            work=[*reading.work * len(more), *last.work],
        ),
        logits.new_empty(rows, logits.shape[-1]),
        cache,
    )


@contextmanager
def _computing(policy: Any, roles: RunModels, *, generates: bool = False) -> Iterator[int]:
    """The precision in which opponent and reference compute, here with the policy's weights.

    With mixed precision everything computes in it. Gathered copies of a sharded run have their weights in it; in other
    runs float32 weights are cast by autocast, but for a call that generates once, beside the originals.

    Yields:
        Bytes of the casts that lie beside the originals.
    """
    args, sharded = roles.args, roles.strategy.shards_weights
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    cast: list[tuple[Tensor, Tensor]] = []
    if half is not None and (sharded or generates):
        cast = [(weight, weight.data) for weight in policy.parameters() if weight.dtype == torch.float32]
    for weight, original in cast:
        weight.data = torch.empty(original.shape, dtype=half)
    try:
        with _autocast(args):
            yield 0 if sharded else sum(weight.data.nbytes for weight, _ in cast)
    finally:
        for weight, original in cast:
            weight.data = original


def _fused_scores(model: Any, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Stands for `summed_logps` with trl's fused head: logits in tiles, gradients of the head in float32."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    head = inner.get_output_embeddings()
    inner.set_output_embeddings(nn.Identity())
    try:
        with head_at(inner, batch.places):
            hidden = model(**model_inputs(model, batch), use_cache=False).logits[0]
    finally:
        inner.set_output_embeddings(head)
    weight = head.base_layer.weight if hasattr(head, "base_layer") else head.weight
    logps = _Tiled.apply(hidden, weight)  # type: ignore[no-untyped-call]
    owners = batch.owners.flatten()[batch.places]
    return sums_by_owner(logps, owners, batch.sums), batch.lengths


class _Tiled(torch.autograd.Function):
    """The products and buffers of trl.kernels.chunked_logprob, without its arithmetic between."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return _tiles(hidden, weight, None, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _tiles(hidden, weight, of_hidden, of_weight)
        return of_hidden.to(hidden.dtype), None if of_weight is None else of_weight.to(weight.dtype)


def _tiles(hidden: Tensor, weight: Tensor, of_hidden: Tensor | None, of_weight: Tensor | None) -> Tensor:
    positions, entries = _TILE
    buffer = hidden.new_empty(min(len(hidden), positions), entries)
    for first in range(0, len(hidden), positions):
        part = hidden[first : first + positions]
        for start in range(0, len(weight), entries):
            rows = weight[start : start + entries].to(hidden.dtype)
            tile = buffer[: len(part), : len(rows)]
            torch.mm(part, rows.t(), out=tile)
            tile.mul_(1.0)
            if of_hidden is not None:
                torch.mm(tile, rows)
            if of_weight is not None:
                torch.mm(tile.t(), part)
    return hidden.new_empty(len(hidden), dtype=torch.float32)


def _pair(lengths: Lengths, args: SAPOConfig) -> Pair:
    whole = (1,) * lengths.response
    segment = Segment(lengths.before, lengths.before + lengths.segment)
    after = 0 if args.suffix == "drop" else lengths.after
    rejected = (1,) * (lengths.before + lengths.segment + after)
    return Pair(0, 0, (1,) * lengths.prompt, whole, rejected, segment, segment)


def _batch(lengths: Lengths, pairs: int, layout: Layout, args: SAPOConfig) -> PairBatch:
    return collate_pairs(
        [_pair(lengths, args)] * pairs,
        pad_token_id=0,
        suffix=args.suffix,
        layout=layout,
        score_shared=args.scores_shared,
        all_positions=args.nll_scope == "all",
    )


def _fake(batch: PairBatch, mode: FakeTensorMode) -> PairBatch:
    tensors: dict[str, Any] = {
        field.name: mode.from_tensor(value)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return dataclasses.replace(batch, **tensors)


def _with_storage(module: Any) -> Any:
    """The same module, its meta tensors replaced by fake ones; inside a FakeTensorMode."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)


@contextmanager
def _account(model: Any, more: Any = ()) -> Iterator[Account]:
    account = Account([*model.parameters(), *model.buffers(), *more], model.config.get_text_config().vocab_size)
    with account:
        yield account


def _autocast(args: SAPOConfig) -> torch.autocast:
    half = torch.bfloat16 if args.bf16 else torch.float16
    # Copies of weights are kept for the backward pass as it is; kept twice, they would outlive the trace.
    return torch.autocast("cpu", half, enabled=bool(args.bf16 or args.fp16), cache_enabled=False)
