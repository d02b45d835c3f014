"""Log-probabilities under a model, computed only at scored positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sapo.errors import ModelError
from sapo.generation.forward import frozen, unwrapped, without_router_logits
from sapo.preference.batches import Layout, PairBatch, ScoredRows, collate_pairs
from sapo.preference.embedding_gradients import embedding_gradients_in_place
from sapo.preference.objectives import token_logps
from sapo.preference.pairs import Pair
from sapo.preference.segments import Segment
from sapo.preference.shared_prefix import attention_arguments, shared_layout_unsupported_reason, use_shared_attention


class PairScores(NamedTuple):
    """Summed log-probabilities in nats and numbers of scored tokens, each `[B]`.

    `all_positions_nll` is ORPO's likelihood term as published, only if the batch has `all_positions`. `weighted_logps`
    are the chosen log-probabilities with each token weighted by its probability, and `divergences` the sums of
    KL(reference || policy) over the chosen tokens, in nats; both `[B]`, only if they were asked for.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    all_positions_nll: Tensor | None = None
    weighted_logps: Tensor | None = None
    divergences: Tensor | None = None


def score(model: nn.Module, batch: PairBatch, *, fused_lm_head: bool = False) -> PairScores:
    """Score the pairs of `batch`; gradients flow if they are enabled.

    Args:
        model: a causal language model, wrapped or not.
        batch: batch on the model's device.
        fused_lm_head: see `summed_logps`.
    """
    sums, lengths = summed_logps(model, batch, fused_lm_head=fused_lm_head)
    pairs, nll = len(batch), None
    if batch.all_positions:
        nll = -(sums[:pairs].sum() + sums[-1]) / batch.all_positions
    shared, shared_lengths = sums[2 * pairs : 3 * pairs], lengths[2 * pairs : 3 * pairs]
    return PairScores(
        sums[:pairs] + shared,
        sums[pairs : 2 * pairs] + shared,
        lengths[:pairs] + shared_lengths,
        lengths[pairs : 2 * pairs] + shared_lengths,
        nll,
    )


def summed_logps(model: nn.Module, rows: ScoredRows, *, fused_lm_head: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability in nats and number of scored tokens of each sum of `rows`; see `scored_logps`.

    Returns:
        `[sums]` in float32 at least, for any dtype of the model, and `[sums]` integers.
    """
    logps = scored_logps(model, rows, fused_lm_head=fused_lm_head)
    return sums_by_owner(logps, rows.owners.flatten()[rows.places], rows.sums), rows.lengths


def sums_by_owner(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """Sum of `values` `[M]` by owner, `[count]`, in the dtype of `values`.

    A GPU adds in no fixed order. The sums are made in float64, where the order is below the rounding of the result; MPS
    has no float64.
    """
    exact = values.dtype if values.device.type == "mps" else torch.float64
    sums = torch.zeros(count, dtype=exact, device=values.device).index_add(0, owners, values.to(exact))
    return sums.to(values.dtype)


def scored_logps(model: nn.Module, rows: ScoredRows, *, fused_lm_head: bool = False) -> Tensor:
    """Log-probability in nats of the token at each scored position of `rows`.

    The language-model head runs only at scored positions: other logits are never computed.

    Args:
        model: a causal language model, wrapped or not.
        rows: rows on the model's device.
        fused_lm_head: compute with trl's fused head, which `model` must have (`trl.trainer.utils.add_fused_lm_head`):
            a Triton kernel on CUDA that computes logits in tiles and never materializes all.

    Returns:
        `[M]` in float32 at least, for any dtype of the model.

    Raises:
        ModelError: the logits are not computed from the output embeddings alone.
    """
    places = rows.places
    targets = rows.targets.flatten()[places]
    inputs = model_inputs(model, rows)
    if fused_lm_head:
        output = model(**inputs, shift_labels=rows.targets, fused_lm_head=True)
        logps: Tensor = output.log_probs.flatten()[places]
    else:
        with head_at(model, places), embedding_gradients_in_place(model):
            logits = model(**inputs, use_cache=False).logits
        if logits.shape[:2] != (1, len(places)):
            raise ModelError(
                f"{type(unwrapped(model)).__name__} does not compute its logits from its output "
                "embeddings alone, so it cannot be scored."
            )
        # The gradient of an index would be a second tensor of this size, zeros filled in.
        logps = token_logps(logits.squeeze(0), targets)
    # A sum of hundreds of bfloat16 numbers is off by several nats.
    return logps if logps.dtype == torch.float64 else logps.float()


def model_inputs(model: nn.Module, rows: ScoredRows) -> dict[str, Any]:
    """Keyword arguments of the forward pass of `model` on `rows`."""
    inner = unwrapped(model)
    inputs: dict[str, Any] = {"input_ids": rows.input_ids, **without_router_logits(inner)}
    if rows.prefixes is None:
        # Padding is on the right, where nothing that is scored sees it; without a mask causal kernels are used, and
        # transformers does not wait for the device to look at it.
        sees_padding = isinstance(rows, PairBatch) and rows.all_positions
        return {**inputs, "attention_mask": rows.attention_mask} if sees_padding else inputs
    attention = attention_arguments(inner, rows.prefixes, rows.input_ids.device)
    return {**inputs, "position_ids": rows.position_ids, **attention}


@contextmanager
def head_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Pass only the hidden states at `places` of the flattened rows to the head, as one row `[1, M, H]`."""
    head = unwrapped(model).get_output_embeddings()

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1)[places][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


_LEAST_TOLERANCE = 1e-3
"""Maximum difference in nats of sums over eight tokens, in float32."""
_NOISES, _TIMES_NOISE = 3, 4
_BFLOAT16_ROUNDING = 2.0**-8
"""Relative error of rounding to bfloat16."""


def prepare_shared_layout(model: nn.Module, *, fused_lm_head: bool = False) -> str | None:
    """Prepare `model` for shared prefixes, and check on a small pair that both layouts agree.

    Architectures differ in the arguments that they pass to their attention; where a prefix cannot be shared, the
    layouts disagree. They are compared in float32, also under autocast and with weights of fewer bits. Where that is
    impossible (quantized or FSDP2-sharded weights), differences beyond the model's own rounding count.

    Args:
        model: a causal language model, wrapped or not.
        fused_lm_head: also check one call with trl's fused head.

    Returns:
        The reason why the model cannot share prefixes, or None.
    """
    inner = unwrapped(model)
    reason = shared_layout_unsupported_reason(inner)
    if reason is not None:
        return reason
    use_shared_attention(inner)
    exact = _can_compute_in_float32(inner)
    with frozen(model), _in_float32(inner) if exact else nullcontext():
        plain = _probe(model, "plain")
        try:
            shared = _probe(model, "shared")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  whatever the architecture raises is the reason
            return f"{type(inner).__name__} does not support a shared prefix ({type(error).__name__}: {error})"
        tolerance = _LEAST_TOLERANCE if exact else _rounding_noise(model, plain, _BFLOAT16_ROUNDING)
    if fused_lm_head:
        with frozen(model):
            _probe(model, "shared", fused_lm_head=True)
    difference = float((plain - shared).abs().max())
    if not difference <= tolerance:
        return f"{type(inner).__name__} returns other log-probabilities with a shared prefix (by {difference:.2g} nats)"
    return None


def heads_disagree(model: nn.Module) -> str | None:
    """Why trl's fused head of `model` differs from its own head; None if they agree.

    trl knows how some architectures scale their logits; another's would be scored without its scale. A head with an
    adapter must not be fused: the fused head ignores it, and a new adapter does not change values yet.
    """
    name = type(unwrapped(model)).__name__
    with frozen(model):
        own = _probe(model, "plain")
        difference = float((own - _probe(model, "plain", fused_lm_head=True)).abs().max())
        if not difference <= _rounding_noise(model, own):
            return f"the fused head of {name} gives other log-probabilities than its own (by {difference:.2g} nats)"
    return None


def _probe(model: nn.Module, layout: Layout, *, fused_lm_head: bool = False) -> Tensor:
    """Log-probabilities of a small pair in `layout`."""
    inner = unwrapped(model)
    vocabulary = inner.config.get_text_config().vocab_size
    tokens = tuple((7 * place + 3) % vocabulary for place in range(24))
    chosen, rejected = tokens[8:16], (*tokens[8:11], *tokens[17:21])
    pair = Pair(0, 0, tokens[:8], chosen, rejected, Segment(3, 8), Segment(3, 7))
    batch = collate_pairs([pair, pair], pad_token_id=tokens[0], layout=layout).to(_device(inner))
    scores = score(model, batch, fused_lm_head=fused_lm_head)
    return torch.cat([scores.chosen_logps, scores.rejected_logps])


def _can_compute_in_float32(inner: nn.Module) -> bool:
    weights = list(inner.parameters())
    if any(isinstance(module, BaseTunerLayer) for module in inner.modules()) and hasattr(weights[0], "ds_tensor"):
        # ZeRO-3 gathers the factors after their layer has cast its input.
        return False
    return all(type(weight.data) is Tensor and weight.is_floating_point() for weight in weights)


@contextmanager
def _in_float32(inner: nn.Module) -> Iterator[None]:
    """Compute in float32 at least, without autocast; one module's weights at a time are up-cast."""
    handles = []
    held: dict[nn.Parameter, Tensor] = {}

    def cast(module: nn.Module, args: Any, kwargs: Any) -> None:
        # A LoRA layer casts its input to the type of its factors before they are called.
        for weight in module.parameters(recurse=isinstance(module, BaseTunerLayer)):
            if weight.dtype in (torch.bfloat16, torch.float16) and weight not in held:
                held[weight] = weight.data
                weight.data = weight.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for weight in module.parameters(recurse=isinstance(module, BaseTunerLayer)):
            if weight in held:
                weight.data = held.pop(weight)

    for module in inner.modules():
        if isinstance(module, BaseTunerLayer) or any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(cast, with_kwargs=True))
            handles.append(module.register_forward_hook(restore, prepend=True, always_call=True))
    # accelerate's patched forward would enable autocast again.
    patched = inner.__dict__.get("forward")
    if "_original_forward" in inner.__dict__:
        inner.forward = inner.__dict__["_original_forward"]
    try:
        with torch.autocast(_device(inner).type, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()
        if patched is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = patched


def _rounding_noise(model: nn.Module, plain: Tensor, rounding: float | None = None) -> float:
    """Difference of `plain` in nats that rounding can explain, measured by adding noise of that size.

    `rounding` is relative; None for that of each module's output dtype.
    """
    inner = unwrapped(model)
    # On the device: a head's outputs of a large vocabulary take seconds to draw on the host.
    random = torch.Generator(_device(inner)).manual_seed(0)

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        size = rounding or torch.finfo(output.dtype).eps / 2
        noise = torch.rand(output.shape, generator=random, device=output.device).mul_(2).sub_(1)
        return (output + output.float() * noise * size).to(output.dtype)

    leaves = [module for module in inner.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(disturb) for leaf in leaves]
    try:
        others = [_probe(model, "plain") for _ in range(_NOISES)]
    finally:
        for handle in handles:
            handle.remove()
    return max(_LEAST_TOLERANCE, _TIMES_NOISE * max(float((other - plain).abs().max()) for other in others))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
