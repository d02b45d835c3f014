"""The laws of placement, precision and decoding on a real GPU: `make test-gpu`. Skipped where there is none.

SAPO_TEST_DEVICE=cpu runs those that need no CUDA kernel on the processor, which tests this file.
"""

import contextlib
import math
import os
import random
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sapo import Pair, Segment
from sapo.config import HAS_FUSED_LM_HEAD
from sapo.generation import decoding
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.generation.token_step import CudaGraph
from sapo.preference.batches import collate_pairs
from sapo.preference.scoring import prepare_shared_layout, score
from tests.integration.test_precision import PUBLISHED, check_first_margin, lines, roles_in_bfloat16
from tests.runs import metrics_of
from tests.tiny import QUANTIZED, tiny_llama, tiny_tokenizer, write_rows

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device(os.environ.get("SAPO_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    not HAS_GPU and DEVICE.type == "cuda", reason="no CUDA GPU on this machine: nothing here was run"
)
NEEDS_CUDA = pytest.mark.skipif(not HAS_GPU, reason="needs CUDA kernels")
ON_DEVICE = {"use_cpu": DEVICE.type == "cpu"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# What the kernels of FlashAttention and FlexAttention take: a head of 64.
SIZE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


IN_4_BITS = ("--load_in_4bit", "--use_peft", "--lora_target_modules", "all-linear", "--dtype", "bfloat16")


def llama(dtype=torch.float32, **options):
    return tiny_llama(dtype=dtype, **SIZE | options)


def model_on_device(dtype=torch.float32, **options):
    return llama(dtype, **options).to(DEVICE)


def tensors_of(trainer):
    """Every tensor of every role."""
    yield from trainer.policy().state_dict().values()
    for role in (trainer.opponent, trainer.reference):
        yield from role.tensors().values()
        if role.own_module:
            yield from role.model.state_dict().values()


# ---- Placement ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_role_is_on_one_device(lora, make_trainer):
    trainer = make_trainer(model=llama(), lora=lora, max_steps=1, **ON_DEVICE)
    trainer.train()
    assert trainer.args.n_gpu <= 1
    assert {tensor.device.type for tensor in tensors_of(trainer)} == {DEVICE.type}
    assert len({tensor.device for tensor in tensors_of(trainer)}) == 1


def test_sapo_train_puts_a_model_on_one_gpu(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    command = [
        *(sys.executable, "-m", "sapo", "train", "--config", "lora-dpo", "--model_name_or_path", tmp_path / "model"),
        *("--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "run", "--max_steps", "2"),
        *("--max_length", "32", "--segment_length", "4", "--report_to", "none", "--logging_steps", "1"),
        *(("--use_cpu",) if DEVICE.type == "cpu" else ()),
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (torch.cuda.device_count() > 1) == ("GPUs are visible and one is used" in done.stderr)
    rows = metrics_of(tmp_path / "run")
    first = next(row for row in rows if "loss" in row)
    assert first["rewards/margins"] == first["rewards/chosen"] == 0


@NEEDS_CUDA
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("strategy", ["multi_gpu", "zero2", "zero3", "fsdp2"])
def test_every_strategy_begins_with_a_margin_of_zero(strategy, bits, tmp_path):
    """In two processes, or in one where there is one GPU."""
    processes = min(2, torch.cuda.device_count())
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    command = [
        *(
            sys.executable,
            "-m",
            "sapo",
            "train",
            "--model_name_or_path",
            tmp_path / "model",
            "--num_processes",
            str(processes),
        ),
        *("--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "run", "--max_steps", "2"),
        *("--accelerate_config", strategy, "--max_length", "32", "--segment_length", "4", "--report_to", "none"),
        *("--per_device_train_batch_size", "2", "--logging_steps", "1", "--learning_rate", "1e-3"),
        *(IN_4_BITS if bits == 4 else ()),
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = metrics_of(tmp_path / "run")
    first = next(row for row in rows if "loss" in row)
    assert first["rewards/margins"] == first["rewards/chosen"] == 0
    # Half of a new adapter's weights have no gradient yet.
    assert first["optimizer/moved_fraction"] > (0.3 if bits == 4 else 0.5)


# ---- Precision ----


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["plain", "bf16"])
@DTYPES
def test_the_first_margin_is_exactly_zero(dtype, bf16, lora, layout, make_trainer):
    options = {"max_steps": 1, "bf16": bf16, "layout": layout, "pairs_per_forward": 1}
    check_first_margin(make_trainer(model=llama(dtype), lora=lora, **options, **ON_DEVICE))


@NEEDS_CUDA
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_float16_begins_with_a_margin_of_zero(lora, make_trainer):
    check_first_margin(make_trainer(model=llama(), lora=lora, max_steps=1, fp16=True, **ON_DEVICE))


@NEEDS_CUDA
def test_bf16_is_on_by_default_where_the_gpu_has_it(make_trainer):
    trainer = make_trainer(model=llama(), **ON_DEVICE)
    assert trainer.args.bf16 == torch.cuda.is_bf16_supported(including_emulation=False)
    assert trainer._scorer.fused_head == HAS_FUSED_LM_HEAD


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@DTYPES
def test_every_role_computes_in_bfloat16(dtype, lora, make_trainer):
    trainer = make_trainer(model=llama(dtype), lora=lora, max_steps=2, bf16=True, **ON_DEVICE)
    assert "policy" in roles_in_bfloat16(trainer)


def test_bfloat16_weights_move_at_a_small_rate(make_trainer):
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        model = llama().to(torch.bfloat16).to(dtype)
        options = PUBLISHED | {"max_steps": 4, "objective": "orpo", "bf16": False}
        trainer = make_trainer(str(dtype), model=model, **options, **ON_DEVICE)
        trainer.train()
        shares.append(lines(trainer)[-1]["optimizer/moved_fraction"])
    assert shares[0] > 0.5
    assert shares[1] == pytest.approx(shares[0], abs=0.05)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", [*QUANTIZED, pytest.param("8-bit", marks=NEEDS_CUDA)])
def test_a_quantized_model_trains(kind, make_trainer, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "model")
    quantization = BitsAndBytesConfig(**QUANTIZED.get(kind, {"load_in_8bit": True}))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=quantization, device_map={"": DEVICE}
    )
    trainer = make_trainer(model=model, lora=True, max_steps=1, bf16=True, **ON_DEVICE)
    start = {name: w.detach().clone() for name, w in trainer.model.named_parameters() if "lora_B.default" in name}
    check_first_margin(trainer)
    weights = dict(trainer.model.named_parameters())
    assert start
    assert not [name for name in start if torch.equal(start[name], weights[name])]


# ---- Scores ----


def pairs(count=3, seed=0):
    draw = random.Random(seed)

    def pair():
        prompt = tuple(draw.randrange(2, 60) for _ in range(draw.randint(4, 9)))
        chosen = tuple(draw.randrange(2, 60) for _ in range(draw.randint(10, 14)))
        span = Segment(3, 8)
        return Pair(0, 0, prompt, chosen, (*chosen[:3], *(9,) * 5, *chosen[8:]), span, span)

    return [pair() for _ in range(count)]


def logps(model, layout, *, fused=False):
    """Sums, and the gradient of a weighted sum of them, in float32."""
    rows = collate_pairs(pairs(), pad_token_id=0, layout=layout).to(DEVICE)
    found = score(model, rows, fused_lm_head=fused)
    sums = torch.cat([found.chosen_logps, found.rejected_logps])
    (sums * torch.arange(1, len(sums) + 1, device=DEVICE)).sum().backward()
    gradient = torch.cat([weight.grad.flatten().float() for weight in model.parameters()])
    model.zero_grad()
    return sums.detach(), gradient / gradient.abs().max()


# transformers builds the plain layout's mask of FlexAttention with an argument that PyTorch has retired, and compiling
# imports what it has retired too.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flex_attention", marks=NEEDS_CUDA)])
@DTYPES
def test_both_layouts_give_the_same_scores_and_gradients(dtype, attention):
    model = model_on_device(dtype, attn_implementation=attention)
    plain, of_plain = logps(model, "plain")
    assert prepare_shared_layout(model) is None
    shared, of_shared = logps(model, "shared")
    assert plain.dtype == shared.dtype == torch.float32
    bounds = (1e-3, 1e-3) if dtype == torch.float32 else (0.5, 0.05)
    assert float((plain - shared).abs().max()) < bounds[0]
    assert float((of_plain - of_shared).abs().max()) < bounds[1]


@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="trl 1.16 or newer")
@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@DTYPES
def test_the_fused_head_is_the_gathered_one(dtype, tied, layout):
    from trl.trainer.utils import add_fused_lm_head

    model = model_on_device(dtype, tie_word_embeddings=tied)
    add_fused_lm_head(model)
    if layout == "shared":
        assert prepare_shared_layout(model, fused_lm_head=True) is None
    own, of_own = logps(model, layout)
    fused, of_fused = logps(model, layout, fused=True)
    bounds = (1e-3, 1e-3) if dtype == torch.float32 else (0.5, 0.05)
    assert fused.dtype == torch.float32
    assert float((own - fused).abs().max()) < bounds[0]
    assert float((of_own - of_fused).abs().max()) < bounds[1]


@NEEDS_CUDA
@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_scoring_a_pass_does_not_wait_for_the_device(layout):
    model = model_on_device()
    if layout == "shared":
        assert prepare_shared_layout(model) is None
    logps(model, layout)
    rows = collate_pairs(pairs(), pad_token_id=0, layout=layout).to(DEVICE)
    with warnings.catch_warnings(record=True) as caught, refusing_waits("warn"):
        warnings.simplefilter("always")
        with torch.autocast("cuda", torch.bfloat16):
            found = score(model, rows)
            (found.chosen_logps - found.rejected_logps).mean().backward()
    waits = [str(one.message) for one in caught if "synchronizing CUDA operation" in str(one.message)]
    # Of rows that are not packed transformers looks at the positions, to see whether they are.
    assert len(waits) <= (layout == "plain"), waits


# ---- Decoding ----


def generated(model, tokens=40, sampling=None, eos_ids=(1, 2)):
    generator = TransformersGenerator(
        lambda: contextlib.nullcontext(model), sampling or Sampling(), eos_ids=eos_ids, pad_token_id=0
    )
    return generator.generate([[3 + place] * (9 - place) for place in range(6)], [tokens] * 6, list(range(6)))


@NEEDS_CUDA
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0, 0, 1.0), Sampling(1.3, 0, 1.0)])
@DTYPES
def test_a_captured_step_gives_the_tokens_of_one_that_is_not(dtype, sampling, monkeypatch):
    model = model_on_device(dtype)
    graphs = []

    class Watched(CudaGraph):
        def __init__(self):
            super().__init__(DEVICE)
            graphs.append(self)

    monkeypatch.setattr(decoding, "replay_for", lambda model, device: Watched)
    captured = generated(model, sampling=sampling)
    assert graphs
    assert all(graph._graph is not None and not graph._failed for graph in graphs[:1])
    # The same step, of a cache of the same fixed length, launched operation by operation.
    monkeypatch.setattr(decoding, "replay_for", lambda model, device: lambda: lambda step: step())
    assert captured == generated(model, sampling=sampling)
    if dtype == torch.float32:
        # And with a cache that grows.
        monkeypatch.setattr(decoding, "replay_for", lambda model, device: None)
        assert captured == generated(model, sampling=sampling)


@NEEDS_CUDA
def test_at_most_one_wait_in_eight_tokens():
    model = model_on_device()
    generated(model)

    def waits(tokens):
        with warnings.catch_warnings(record=True) as caught, refusing_waits("warn"):
            warnings.simplefilter("always")
            generated(model, tokens, eos_ids=())
        return sum("synchronizing CUDA operation" in str(one.message) for one in caught)

    # Captures wait, and so does the prompt: as often for 8 tokens more or fewer.
    assert waits(48) - waits(16) <= 4


@NEEDS_CUDA
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu_than_the_current_one_generates_the_same():
    model = model_on_device()
    expected = generated(model)
    assert generated(model.to("cuda:1")) == expected


def test_the_opponent_generates_what_it_generates_alone(make_trainer):
    trainer = make_trainer(model=llama(), max_steps=1, bf16=True, **ON_DEVICE)
    with trainer._context.roles.opponent_module() as model:
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert next(model.parameters()).device.type == DEVICE.type
        assert generated(model) == generated(model)


@contextlib.contextmanager
def refusing_waits(mode="error"):
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # PyTorch's warning that this mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ---- The benchmark ----


def test_the_benchmark_runs():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--size", "tiny", "--rounds", "1", "--pairs", "2", "--rows", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ("not measured" in done.stdout) == (not HAS_GPU)
    assert "nan" not in done.stdout
    shares = [float(word.rstrip("%,")) for word in done.stdout.split() if word.rstrip(",").endswith("%")]
    assert shares
    # Of a tiny model a large GPU shows 0.0 %.
    assert all(0 <= share < 150 and math.isfinite(share) for share in shares), done.stdout
