"""Laws of the key-value cache: it has room, rows move within it, and caches are joined."""

import torch
import transformers

from sapo.estimate.tracing import Account
from sapo.generation.kv_cache import RoomyLayer, joined, keep_rows, make_room, surviving_rows
from tests.decoding import GREEDY, Spy, built, generator_for, greedy_text, request


def test_a_cache_grows_past_its_room(monkeypatch):
    monkeypatch.setattr("sapo.generation.kv_cache._ROOM", 3)
    model = built("llama")
    contexts, budgets, seeds = request(seed=5)
    expected = [greedy_text(model, c, b) for c, b in zip(contexts, budgets, strict=True)]
    assert generator_for(model, GREEDY).generate(contexts, budgets, seeds) == expected


def test_layers_that_grow_are_given_room():
    for name, kinds in {"llama": [True, True], "mistral": [False, False], "gemma3": [False, True]}.items():
        model = built(name)
        spy = Spy(model)
        generator_for(model).generate([[5, 6, 7]], [6], [1])
        spy.handle.remove()
        assert [isinstance(layer, RoomyLayer) for layer in spy.caches[-1].layers] == kinds


def test_caches_are_joined_layer_by_layer():
    """No more than a layer's keys or values are held twice at a time."""
    with Account([]) as account:
        caches = [transformers.DynamicCache(), transformers.DynamicCache()]
        for layer in range(4):
            for rows, cache in zip((2, 1), caches, strict=True):
                cache.update(torch.full((rows, 1, 8, 64), rows), torch.full((rows, 1, 8, 64), rows), layer)
        whole = joined(caches, torch.tensor([2, 0, 1]))
    held = 2 * sum(layer.keys.nbytes for layer in whole.layers)
    assert whole.layers[-1].keys[:, 0, 0, 0].tolist() == [2, 1, 2]
    assert account.trace.bytes < 1.3 * held


def test_rows_move_only_into_free_places():
    assert surviving_rows([0, 1, 2]) == [0, 1, 2]
    assert surviving_rows([1, 2, 4, 5]) == [4, 1, 2, 5]
    assert surviving_rows([3]) == [3]


def test_caches_of_other_kinds_are_reordered():
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    cache.self_attention_cache.update(torch.arange(3.0)[:, None, None, None], torch.zeros(3, 1, 1, 1), 0)
    make_room(cache, 4)
    keep_rows(cache, [2, 1], torch.device("cpu"))
    assert cache.self_attention_cache.layers[0].keys.flatten().tolist() == [2.0, 1.0]
