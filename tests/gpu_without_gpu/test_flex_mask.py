"""Laws of the block mask with which FlexAttention computes packed rows."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers.integrations.flex_attention import WrappedFlexAttention

from sapo.generation.forward import frozen
from sapo.preference.batches import collate_pairs
from sapo.preference.pairs import Pair
from sapo.preference.scoring import summed_logps
from sapo.preference.segments import Segment
from sapo.preference.shared_prefix import may_attend
from tests.unit.test_shared_prefix import VOCABULARY, make


def pairs(rng, count, longest=60):
    made = []
    for row in range(count):
        prompt, length, new = rng.randint(1, longest), rng.randint(2, longest), rng.randint(1, 20)
        start = rng.randrange(length - 1)
        stop = rng.randint(start + 1, length)
        chosen = tuple(rng.randrange(3, VOCABULARY) for _ in range(length))
        rejected = (*chosen[:start], *(rng.randrange(3, VOCABULARY) for _ in range(new)), *chosen[stop:])
        ids = tuple(rng.randrange(3, VOCABULARY) for _ in range(prompt))
        made.append(Pair(row, 0, ids, chosen, rejected, Segment(start, stop), Segment(start, start + new)))
    return made


def dense_mask(prefixes, window):
    """Which token sees which, pair by pair, written down without regard to how it is computed."""
    size = prefixes.spans[-1].stop
    seen = torch.zeros(size, size, dtype=torch.bool)
    for span in prefixes.spans:
        chosen = list(enumerate(range(span.start, span.middle)))
        branch = list(enumerate(range(span.middle, span.stop), start=span.visible))
        for keys, queries in ((chosen, chosen), (chosen[: span.visible] + branch, branch)):
            for position, query in queries:
                for before, key in keys:
                    if before <= position and (window is None or position - before < window):
                        seen[query, key] = True
    return seen


@pytest.mark.parametrize("seed", range(6))
def test_the_flex_mask_is_the_dense_mask(seed):
    rng = random.Random(seed)
    prefixes = collate_pairs(pairs(rng, rng.randint(1, 3), 90), pad_token_id=0, layout="shared").prefixes
    size = prefixes.spans[-1].stop
    for window in (None, rng.randint(1, 60)):
        expected, rule = dense_mask(prefixes, window), may_attend(prefixes, window, "cpu")
        assert torch.equal(create_mask(rule, None, None, size, size, device="cpu")[0, 0], expected)
        blocks = -(-size // 128)
        padded = torch.zeros(128 * blocks, 128 * blocks, dtype=torch.bool)
        padded[:size, :size] = expected
        by_block = padded.view(blocks, 128, blocks, 128).any(3).any(1)
        block_mask = create_block_mask(rule, None, None, size, size, device="cpu")
        assert torch.equal(block_mask.to_dense()[0, 0].bool(), by_block)


@pytest.mark.slow
def test_rows_of_every_length_share_a_few_compiled_graphs(monkeypatch):
    """Dynamo alone, without kernels: what it traces anew for another length it would compile anew on a GPU.

    Forward passes only: on a CPU FlexAttention has no gradients.
    """
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append([tuple(tensor.shape) for tensor in inputs if isinstance(tensor, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=backend))
    for name in ("_instance", "_compiled_flex_attention"):
        monkeypatch.setattr(WrappedFlexAttention, name, None)
    monkeypatch.setattr(WrappedFlexAttention, "_is_flex_compiled", False)
    model, rng = make("llama", attn_implementation="flex_attention").requires_grad_(False), random.Random(1)
    torch._dynamo.reset()
    for _ in range(10):
        rows = collate_pairs(pairs(rng, 2, 90), pad_token_id=0, layout="shared")
        # As a step does: the reference in evaluation mode, the policy in training mode.
        with frozen(model):
            summed_logps(model, rows)
        summed_logps(model.train(), rows)
    torch._dynamo.reset()
    assert 1 <= len(graphs) <= 6, graphs
