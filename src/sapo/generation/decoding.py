"""A small decode loop over a transformers model.

It replaces transformers' `generate` for three reasons: each row has its own random numbers; finished rows leave the
batch; and it is faster (`benchmarks/generation.py`), because it filters inside the top-k slice and does not copy the
cache for each token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from sapo.errors import ConfigurationError, ModelError
from sapo.generation.forward import frozen, without_router_logits
from sapo.generation.kv_cache import can_join, joined, make_room, surviving_rows
from sapo.generation.protocol import check_request
from sapo.generation.sampling import INVALID_TOKEN, UNDECIDED_TOKEN, Sampling, host_computes
from sapo.generation.token_step import DecodingRows, replay_for
from sapo.generation.weight_layout import stored_by_input, weights_cast

TOKENS_PER_READ = 8
"""Number of tokens that an accelerator computes before the host reads them and checks which rows are finished."""


TOKENS_PER_PASS = 1024
"""Number of context tokens that a CPU reads in one pass: activations of more do not fit into its cache, and rows of
different lengths are padded."""


class TransformersGenerator:
    """A `Generator` that decodes with a transformers model in this process.

    Args:
        model_context: opens a context that yields the causal language model to decode with (the opponent's weights
            loaded, the right adapter active, sharded parameters gathered). It is entered exactly once per call,
            even if no row needs a token: with sharded weights it contains collectives, in which every process must
            take part. Inside it, processes may run different numbers of steps, including zero.
        sampling: how the next token is drawn.
        eos_ids: EOS tokens; may be empty.
        pad_token_id: any valid token id; pads shorter contexts on the left and is never attended to.
        batch_size: rows decoded together, None for all. When set, rows are grouped by context length.
        look: called before each token; may raise to abandon the call, which leaves the model unchanged.

    Raises:
        ConfigurationError: `batch_size` below 1, or a negative `pad_token_id`.
    """

    def __init__(
        self,
        model_context: Callable[[], AbstractContextManager[nn.Module]],
        sampling: Sampling,
        *,
        eos_ids: Collection[int],
        pad_token_id: int,
        batch_size: int | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size}: must be 1 or more, or None for all rows")
        if pad_token_id < 0:
            raise ConfigurationError(f"pad_token_id={pad_token_id}: must be a token id; any valid one works")
        self._model_context = model_context
        self._sampling = sampling
        self._end_ids = frozenset(eos_ids)
        self._pad_token_id = pad_token_id
        self._batch_size = batch_size
        self._look = look

    def generate(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Continue each context; see `Generator.generate`.

        The t-th token of a row is drawn with the t-th number of `random.Random(seed)`. The model is left
        unchanged, and no global random state is read or changed.

        Raises:
            ConfigurationError: a row without context or with a negative budget, or arguments of unequal
                lengths.
            ModelError: the model returned non-finite logits, or no key-value cache.
        """
        check_request(contexts, max_new_tokens, seeds)
        replies: list[list[int]] = [[] for _ in contexts]
        rows = [row for row, budget in enumerate(max_new_tokens) if budget > 0]
        size = self._batch_size or max(1, len(rows))
        if size < len(rows):
            rows.sort(key=lambda row: len(contexts[row]))
        longest = max(max_new_tokens, default=0)
        with (
            self._model_context() as model,
            frozen(model),
            _in_compute_type(model),
            stored_by_input(model, min(size, len(rows)), longest),
        ):
            for first in range(0, len(rows), size):
                together = rows[first : first + size]
                try:
                    self._decode(model, together, contexts, max_new_tokens, seeds, replies)
                except _UndecidedError:
                    for row in together:
                        replies[row].clear()
                    self._decode(model, together, contexts, max_new_tokens, seeds, replies, whole=True)
        return replies

    def _decode(
        self,
        model: nn.Module,
        rows: list[int],
        contexts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        seeds: Sequence[int],
        replies: list[list[int]],
        *,
        whole: bool = False,
    ) -> None:
        """Decode `rows` together, appending to their `replies`; `whole` as in `sample_tokens`."""
        self._look()
        device = next(model.parameters()).device
        state = DecodingRows(
            [contexts[row] for row in rows],
            [max_new_tokens[row] for row in rows],
            [seeds[row] for row in rows],
            pad_token_id=self._pad_token_id,
            sampling=self._sampling,
            device=device,
            whole=whole,
        )
        room = max(max_new_tokens[row] for row in rows)
        options = {"use_cache": True, "logits_to_keep": 1, "return_dict": True, **without_router_logits(model)}
        forward = functools.partial(model, **options)
        logits, cache = self._read_contexts(model, forward, state, [len(contexts[row]) for row in rows])
        make_room(cache, room)
        capture = replay_for(model, device) if state.hold(model, cache) else None
        if capture is not None:
            state.fix()
        state.draw(logits)
        del logits
        state.count += 1
        step, replay = functools.partial(state.advance, forward), None
        going: list[int | None] = list(rows)
        block = 1 if host_computes(device) else TOKENS_PER_READ
        seen = 0
        while True:
            left = [max_new_tokens[row] for row in going if row is not None]
            if state.count - seen == block or state.count == max(left):
                new = state.drawn[:, seen : state.count].tolist()
                going = [
                    self._take(row, tokens, max_new_tokens, replies) for row, tokens in zip(going, new, strict=True)
                ]
                places = [place for place, row in enumerate(going) if row is not None]
                seen = state.count
                if not places:
                    return
                # A CUDA graph has a fixed number of rows: capture a new one once at most half of them are left.
                if len(places) < len(going) and (capture is None or 2 * len(places) <= len(going)):
                    state.keep(places)
                    going, replay = [going[place] for place in surviving_rows(places)], None
            self._look()
            if capture is None:
                step()
            else:
                replay = replay or capture()
                replay(step)
            state.count += 1

    def _read_contexts(
        self, model: nn.Module, forward: Callable[..., Any], state: DecodingRows, lengths: list[int]
    ) -> tuple[Tensor, Cache]:
        """The logits of the next token `[B, V]`, and the cache, which the model creates with the type that it needs."""

        def read(rows: list[int] | None = None) -> tuple[Tensor, Cache]:
            width = None if rows is None else max(lengths[row] for row in rows)
            output = forward(**state.prompt(rows, width), past_key_values=None)
            cache = output.get("past_key_values")
            if not isinstance(cache, Cache):
                raise ModelError(
                    f"{type(model).__name__} returned no key-value cache, which decoding requires; "
                    "use a model whose forward pass returns past_key_values"
                )
            return output.logits[:, -1], cache

        parts = rows_of_passes(lengths) if host_computes(state.tokens.device) else []
        if len(parts) < 2:
            return read()
        found, caches = [], []
        for part in parts:
            self._look()
            logits, cache = read(part)
            if not can_join(cache):
                return read()
            found.append(logits)
            caches.append(cache)
        rows = torch.tensor([row for part in parts for row in part])
        return torch.cat(found)[rows.argsort()], joined(caches, rows)

    def _take(
        self, row: int | None, tokens: list[int], max_new_tokens: Sequence[int], replies: list[list[int]]
    ) -> int | None:
        """Append the valid part of `tokens` to the reply of `row`; None if the reply is complete, else the row."""
        if row is None:
            return None
        for token in tokens:
            if token == UNDECIDED_TOKEN:
                raise _UndecidedError
            if token == INVALID_TOKEN:
                raise ModelError(
                    f"row {row}: the opponent's logits for new token {len(replies[row])} are not finite; "
                    "lower the learning rate, or use bfloat16 or float32 in place of float16"
                )
            replies[row].append(token)
            if token in self._end_ids or len(replies[row]) == max_new_tokens[row]:
                return None
        return row


def rows_of_passes(lengths: Sequence[int]) -> list[list[int]]:
    """Rows whose contexts a CPU reads in one pass: alike in length, `TOKENS_PER_PASS` tokens at most, with padding.

    Args:
        lengths: tokens of the context of each row.
    """
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= TOKENS_PER_PASS:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


class _UndecidedError(Exception):
    """A token could not be drawn from the most probable ones alone."""


def _in_compute_type(model: nn.Module) -> AbstractContextManager[None]:
    """Decode a 4-bit model in the compute dtype of its layers; cast its other weights meanwhile.

    peft casts norms, embeddings and head to float32 for training, and a 4-bit layer returns the dtype of its input:
    keys, values and logits would be float32, at twice the memory and bandwidth. Adapters are not cast.
    """
    config = getattr(model, "config", None)
    quantized = config.to_dict().get("quantization_config") if config is not None else None
    dtype = getattr(torch, str((quantized or {}).get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch."))
    return weights_cast((weight for name, weight in model.named_parameters() if "lora_" not in name), dtype)
