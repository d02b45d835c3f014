"""A small decode loop over a transformers model.

It exists beside `generate` for three reasons: each row draws from its own uniform numbers; rows that are done
leave the batch; and it is faster (`benchmarks/generation.py`), by filtering inside the top-k slice and by a
cache that is not copied for each token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import Cache

from sapo.errors import ConfigurationError, ModelError
from sapo.generation.kv_cache import keep_rows, make_room, surviving_rows
from sapo.generation.protocol import check_request
from sapo.generation.sampling import INVALID_TOKEN, Sampling, sample_tokens


class TransformersGenerator:
    """A `Generator` that decodes with a transformers model in this process.

    Args:
        model_context: opens a context that yields the causal language model to decode with, its weights in
            place (an opponent; a PEFT model with the right adapter active; sharded parameters gathered). It
            is entered exactly once a call, also when no row wants a token: under sharding it holds
            collectives, in which every process must take part. Processes may then take different numbers of
            steps, zero included.
        sampling: how the next token is drawn.
        eos_ids: tokens that end a row; may be empty.
        pad_token_id: any valid token id; it fills the space before shorter contexts and is never attended to.
        batch_size: rows decoded together, None for all. When set, rows are grouped by context length.

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
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size}: must be 1 or more, or None for all rows")
        if pad_token_id < 0:
            raise ConfigurationError(f"pad_token_id={pad_token_id}: must be a token id; any valid one will do")
        self._model_context = model_context
        self._sampling = sampling
        self._end_ids = frozenset(eos_ids)
        self._pad_token_id = pad_token_id
        self._batch_size = batch_size

    def generate(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Continue each context; see `Generator.generate`.

        The t-th token of a row is drawn with the t-th number of `random.Random(seed)`. The model is left as
        it was found, and no global random state is read or changed.

        Raises:
            ConfigurationError: a row without context or with a negative budget, or arguments of unequal
                lengths.
            ModelError: the model gave logits that are not finite, or keeps no key-value cache.
        """
        check_request(contexts, max_new_tokens, seeds)
        replies: list[list[int]] = [[] for _ in contexts]
        rows = [row for row, budget in enumerate(max_new_tokens) if budget > 0]
        size = self._batch_size or max(1, len(rows))
        if size < len(rows):
            rows.sort(key=lambda row: len(contexts[row]))
        with self._model_context() as model, _decoding(model):
            for first in range(0, len(rows), size):
                self._decode(model, rows[first : first + size], contexts, max_new_tokens, seeds, replies)
        return replies

    def _decode(
        self,
        model: nn.Module,
        rows: list[int],
        contexts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        seeds: Sequence[int],
        replies: list[list[int]],
    ) -> None:
        """Decode `rows` together, appending to their `replies`."""
        device = next(model.parameters()).device
        room = max(max_new_tokens[row] for row in rows)
        batch = _left_padded([contexts[row] for row in rows], self._pad_token_id, room)
        tokens, attended, positions = (tensor.to(device) for tensor in batch)
        length = tokens.shape[1]
        uniforms = [random.Random(seeds[row]).random for row in rows]
        cache: Cache | None = None
        while rows:
            output = model(
                input_ids=tokens,
                attention_mask=attended[:, :length],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
            )
            if cache is None:
                # The model made it at its first step, and knows which kind of cache its layers need.
                cache = output.get("past_key_values")
                if not isinstance(cache, Cache):
                    raise ModelError(
                        f"{type(model).__name__} returned no key-value cache, which decoding needs; "
                        "use a model whose forward returns past_key_values"
                    )
                make_room(cache, room)
            draws = torch.tensor([uniform() for uniform in uniforms], dtype=torch.float64)
            drawn = sample_tokens(output.logits[:, -1], draws, self._sampling)
            going = []
            for place, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
                if token == INVALID_TOKEN:
                    raise ModelError(
                        f"row {row}: the opponent's logits for new token {len(replies[row])} are not finite; "
                        "lower the learning rate, or use bfloat16 or float32 in place of float16"
                    )
                replies[row].append(token)
                if token not in self._end_ids and len(replies[row]) < max_new_tokens[row]:
                    going.append(place)
            positions = positions[:, -1:] + 1
            if 0 < len(going) < len(rows):
                going = surviving_rows(going)
                keep_rows(cache, going, device)
                kept = torch.tensor(going, device=device)
                drawn, attended, positions = drawn[kept], attended[kept], positions[kept]
                uniforms = [uniforms[place] for place in going]
            rows = [rows[place] for place in going]
            tokens = drawn[:, None]
            length += 1


def _left_padded(contexts: list[Sequence[int]], pad: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids `[B, L]`, attention mask `[B, L + room]` and positions `[B, L]` of right-aligned contexts.

    The mask follows from lengths alone, because a prompt may itself hold the pad token. It covers all steps
    to come, whose tokens are attended to.
    """
    width = max(map(len, contexts))
    ids = torch.tensor([[pad] * (width - len(context)) + list(context) for context in contexts])
    empty = torch.tensor([[width - len(context)] for context in contexts])
    attended = (torch.arange(width + room) >= empty).long()
    positions = (torch.arange(width) - empty).clamp_(min=0)
    return ids, attended, positions


@contextmanager
def _decoding(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module's own training flag is as it was.

    Evaluation mode also switches gradient checkpointing off: a transformers layer asks for `training` before
    it checkpoints. `no_grad`, not `inference_mode`: under FSDP2, parameters first gathered in inference mode
    broke later training.
    """
    training = [module for module in model.modules() if module.training]
    try:
        # One flag at a time, because eval() and train() carry a parent's flag to its children.
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
