"""Log-probabilities under a model, formed only where they are scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from sapo.errors import ModelError
from sapo.preference.batches import PairBatch, ScoredRows, collate_pairs
from sapo.preference.objectives import token_logps
from sapo.preference.pairs import Pair
from sapo.preference.segments import Segment
from sapo.preference.shared_prefix import attention_arguments, shared_layout_unsupported_reason, use_shared_attention


class PairScores(NamedTuple):
    """Summed log-probabilities in nats and numbers of scored tokens, each `[B]`.

    `all_positions_nll` is ORPO's likelihood term as published, only when the batch asks for it.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    all_positions_nll: Tensor | None = None


def score(model: nn.Module, batch: PairBatch, *, fused_lm_head: bool = False) -> PairScores:
    """Score the pairs of `batch`; gradients flow if they are enabled.

    Args:
        model: a causal language model, wrapped or not.
        batch: on the model's device.
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
    """Log-probability in nats and number of scored tokens of each of the sums that `rows` asks for.

    The language-model head runs at scored positions only: logits of other positions are never formed.

    Args:
        model: a causal language model, wrapped or not.
        rows: on the model's device.
        fused_lm_head: compute with trl's fused head, which `model` must have (`trl.trainer.utils.add_fused_lm_head`):
            a Triton kernel on CUDA that forms logits in tiles, and never all of them.

    Returns:
        `[sums]` in float32 at least, and `[sums]` whole numbers.
    """
    places = rows.places
    targets, owners = rows.targets.flatten()[places], rows.owners.flatten()[places]
    inputs = model_inputs(model, rows)
    if fused_lm_head:
        output = model(**inputs, shift_labels=rows.targets, fused_lm_head=True)
        logps = output.log_probs.flatten()[places]
    else:
        with head_at(model, places):
            logits = model(**inputs, use_cache=False).logits
        if logits.shape[:2] != (1, len(places)):
            raise ModelError(
                f"{type(extract_model_from_parallel(model)).__name__} does not form its logits from its output "
                "embeddings alone; it cannot be scored."
            )
        logps = token_logps(logits[0], targets)
    sums = torch.zeros(rows.sums, dtype=logps.dtype, device=logps.device).index_add(0, owners, logps)
    return sums, rows.lengths


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """No gradients and evaluation mode, the model's mode restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)


def model_inputs(model: nn.Module, rows: ScoredRows) -> dict[str, Any]:
    """Keyword arguments with which `model` computes `rows`, without their scores."""
    inputs: dict[str, Any] = {"input_ids": rows.input_ids}
    if rows.prefixes is None:
        return {**inputs, "attention_mask": rows.attention_mask}
    inner = extract_model_from_parallel(model)
    attention = attention_arguments(inner, rows.prefixes, rows.input_ids.device)
    return {**inputs, "position_ids": rows.position_ids, **attention}


@contextmanager
def head_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Let the head see the hidden states at `places` of the flattened rows only, as one row `[1, M, H]`."""
    head = extract_model_from_parallel(model).get_output_embeddings()

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1)[places][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


def prepare_shared_layout(model: nn.Module, *, fused_lm_head: bool = False) -> str | None:
    """Make `model` ready for shared prefixes, and try on a small pair that they change nothing.

    Architectures differ in what they hand through to their attention; where a prefix cannot be shared, the two
    layouts disagree.

    Returns:
        What keeps the model from sharing prefixes, or None.
    """
    inner = extract_model_from_parallel(model)
    reason = shared_layout_unsupported_reason(inner)
    if reason is not None:
        return reason
    use_shared_attention(inner)
    vocabulary = inner.config.get_text_config().vocab_size
    tokens = tuple((7 * place + 3) % vocabulary for place in range(24))
    chosen, rejected = tokens[8:16], (*tokens[8:11], *tokens[17:21])
    pair = Pair(0, 0, tokens[:8], chosen, rejected, Segment(3, 8), Segment(3, 7))
    with frozen(model):
        scores = []
        for layout in ("plain", "shared"):
            batch = collate_pairs([pair, pair], pad_token_id=tokens[0], layout=layout).to(_device(inner))
            scores.append(score(model, batch, fused_lm_head=fused_lm_head))
    difference = max(float((a - b).abs().max()) for a, b in zip(scores[0][:2], scores[1][:2], strict=True))
    tolerance = _PROBE_TOLERANCE.get(next(inner.parameters()).dtype, 0.5)
    if torch.is_autocast_enabled(_device(inner).type):
        tolerance = 0.5
    if not difference <= tolerance:
        return f"{type(inner).__name__} gives other log-probabilities with a shared prefix (by {difference:.2g} nats)"
    return None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
