"""Laws of decoding on an accelerator: the same text, seldom a wait, and a step that can be captured."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import sdpa_attention

from sapo.generation import decoding, sampling
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.generation.token_step import CudaGraph
from tests.decoding import (
    ARCHITECTURES,
    END,
    EVERY_ARCHITECTURE,
    GREEDY,
    PAD,
    built,
    generator_for,
    request,
)
from tests.gpu_without_gpu.recorder import Recorder
from tests.tiny import tiny_llama

CAPTURED = [name for name in ARCHITECTURES if name != "lfm2_recurrent"]


@pytest.fixture
def accelerator(monkeypatch):
    """Decode as where the host would have to wait for the device."""
    for module in (decoding, sampling):
        monkeypatch.setattr(module, "host_computes", lambda device: False)


@pytest.fixture
def recorder(monkeypatch, accelerator):
    class Own(Recorder):
        made = repeated = 0

    monkeypatch.setattr(decoding, "replay_for", lambda model, device: Own)
    return Own


@pytest.mark.parametrize("options", [Sampling(), GREEDY, Sampling(1.3, 0, 1.0)])
@EVERY_ARCHITECTURE
def test_reading_tokens_in_blocks_changes_no_text(name, options, monkeypatch):
    contexts, budgets, seeds = request(rows=10, seed=1)
    expected = generator_for(built(name), options, eos_ids=[END, 2]).generate(contexts, budgets, seeds)
    for module in (decoding, sampling):
        monkeypatch.setattr(module, "host_computes", lambda device: False)
    for block in (1, 3, 8):
        monkeypatch.setattr(decoding, "TOKENS_PER_READ", block)
        assert generator_for(built(name), options, eos_ids=[END, 2]).generate(contexts, budgets, seeds) == expected


@pytest.mark.parametrize("options", [Sampling(), GREEDY, Sampling(1.3, 0, 1.0)])
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_step_gives_the_same_text(name, options, recorder, monkeypatch):
    monkeypatch.setattr(decoding, "TOKENS_PER_READ", 3)
    contexts, budgets, seeds = request(rows=10, seed=1)
    got = generator_for(built(name), options, eos_ids=[END, 2]).generate(contexts, budgets, seeds)
    assert recorder.repeated > 5
    assert 1 < recorder.made < 6  # anew only when half of the rows are left
    monkeypatch.undo()
    assert got == generator_for(built(name), options, eos_ids=[END, 2]).generate(contexts, budgets, seeds)


def test_a_row_that_is_done_is_given_no_position_that_does_not_exist(accelerator):
    model = built("gpt2")
    longest = model.config.max_position_embeddings
    contexts = [[5] * (longest - 1), [6]]
    rows = generator_for(model).generate(contexts, [1, 20], [1, 2])
    assert [len(row) for row in rows] == [1, 20]


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("options", [Sampling(), GREEDY])
@pytest.mark.parametrize("name", CAPTURED)
def test_at_most_one_wait_in_eight_tokens(name, options, ragged, accelerator, monkeypatch):
    waits = []
    for method in ("tolist", "item", "__bool__", "__int__", "__float__"):
        real = getattr(torch.Tensor, method)
        monkeypatch.setattr(
            torch.Tensor, method, lambda self, real=real, name=method: (waits.append(name), real(self))[1]
        )

    def waits_for(tokens):
        waits.clear()
        model = built(name)
        generator = TransformersGenerator(lambda: contextlib.nullcontext(model), options, eos_ids=(), pad_token_id=PAD)
        generator.generate([[3] * 9, [4] * (5 if ragged else 9)], [tokens] * 2, [1, 2])
        return len(waits)

    assert waits_for(40) - waits_for(8) == 4


@pytest.mark.skipif(not hasattr(sdpa_attention, "pack_gqa"), reason="transformers that repeats keys in each step")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_grouped_keys_are_not_repeated_for_a_token(name, accelerator, monkeypatch):
    repeated, packed = [], []
    for method, seen in (("repeat_kv", repeated), ("pack_gqa", packed)):
        real = getattr(sdpa_attention, method)
        monkeypatch.setattr(sdpa_attention, method, lambda *a, real=real, seen=seen: (seen.append(0), real(*a))[1])
    generator_for(built(name)).generate([[3] * 9, [4] * 5], [1, 1], [1, 2])
    prompt = len(repeated)
    generator_for(built(name)).generate([[3] * 9, [4] * 5], [12, 12], [1, 2])
    assert packed
    assert len(repeated) == 2 * prompt


class Cuda:
    """Stands for `torch.cuda`: what is captured, on which device, and what is replayed."""

    def __init__(self, *, fails=False):
        self.now, self.seen, self.fails = torch.device("cuda", 0), [], fails
        self.capturing = False

    @contextlib.contextmanager
    def device(self, device):
        before, self.now = self.now, device
        yield
        self.now = before

    @contextlib.contextmanager
    def stream(self, stream):
        self.seen.append(("side stream", self.now.index))
        yield

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.capturing = True
        try:
            yield
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.seen.append(("captured", self.now.index))
        finally:
            self.capturing = False

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.seen.append(("replayed", self.now.index)))


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_captured_on_the_device_of_its_tensors(fails, monkeypatch):
    cuda, ran = Cuda(fails=fails), []
    for name in ("device", "stream", "graph", "Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    replay = CudaGraph(torch.device("cuda", 1))
    with pytest.warns(UserWarning, match="without a CUDA graph") if fails else contextlib.nullcontext():
        for _ in range(4):
            replay(lambda: None if cuda.capturing else ran.append(0))
    assert cuda.now.index == 0
    if fails:
        assert len(ran) == 4  # every token is computed
        assert cuda.seen == [("side stream", 1)]
    else:
        assert len(ran) == 1
        assert cuda.seen == [("side stream", 1), ("captured", 1), *[("replayed", 1)] * 3]


def test_rows_that_the_most_probable_tokens_do_not_decide_are_written_again(accelerator, monkeypatch):
    """With a head of zeros all tokens tie."""
    model, asked = tiny_llama(vocab_size=300), ([[4, 5], [6]], [5, 3], [1, 2])
    model.lm_head.weight.data.zero_()
    tied = generator_for(model).generate(*asked)
    monkeypatch.undo()
    assert generator_for(model).generate(*asked) == tied
    assert [len(row) for row in tied] == [5, 3]
