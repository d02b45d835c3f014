"""Laws of precision: every role computes alike, and every trained weight moves."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sapo import SAPOConfig, SAPOTrainer
from sapo.config import HAS_FUSED_LM_HEAD
from sapo.errors import CheckpointError, ConfigurationError
from sapo.weights.master import MasterWeights, MovedSample, needs_master, with_masters
from sapo.weights.rounding import rounded as rounded_to
from tests.runs import metrics_of
from tests.tiny import tiny_llama

PUBLISHED = {"optim": "rmsprop", "learning_rate": 5e-7, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def lines(trainer):
    return metrics_of(trainer.run_folder.path, "loss")


def roles_in_bfloat16(trainer):
    """The roles with a module of their own, after a run in which nothing computed in another type."""
    assert trainer._scorer.layout == "shared"  # which is tried out in float32
    seen = set()

    def watch(module, role):
        layer = next(part for name, part in module.named_modules() if name.endswith("layers.0.mlp.down_proj"))
        layer.register_forward_hook(lambda _, args, output: seen.add((role, output.dtype)))

    watch(trainer.policy(), "policy")
    for role, copied in (("opponent", trainer.opponent), ("reference", trainer.reference)):
        if copied.own_module:
            watch(copied.model, role)
    trainer.train()
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    return {role for role, _ in seen}


def check_first_margin(trainer):
    trainer.train()
    (first,) = lines(trainer)
    assert first["rewards/margins"] == 0
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize(
    ("reference", "layout"), [("initial", "plain"), ("opponent_copy", "shared"), ("opponent", "shared")]
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["plain", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_first_margin_is_exactly_zero(dtype, bf16, lora, reference, layout, make_trainer):
    options = {"max_steps": 1, "bf16": bf16, "reference": reference, "layout": layout, "pairs_per_forward": 1}
    check_first_margin(make_trainer(model=tiny_llama(dtype=dtype), lora=lora, **options))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_every_role_computes_in_bfloat16(dtype, bf16, lora, make_trainer):
    trainer = make_trainer(model=tiny_llama(dtype=dtype), lora=lora, max_steps=2, bf16=bf16)
    assert roles_in_bfloat16(trainer) == ({"policy"} if lora else {"policy", "opponent", "reference"})


def test_generation_reads_one_bfloat16_copy_and_gives_the_float32_weights_back(make_trainer):
    trainer = make_trainer(bf16=True)
    before = {name: weight.clone() for name, weight in trainer.opponent.tensors().items()}
    with trainer._context.roles.opponent_module() as module:
        assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError, match="lost"), trainer._context.roles.policy_module():
        raise RuntimeError("lost")
    for weights in (trainer.opponent.tensors(), dict(trainer.policy().named_parameters())):
        assert all(torch.equal(weights[name], weight) for name, weight in before.items())
    assert all(weight.requires_grad for weight in trainer.policy().parameters())


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="trl 1.16 or newer")
def test_log_probabilities_are_summed_in_float32(dtype, bf16, make_trainer, monkeypatch):
    from sapo.preference import scoring

    sums, original = [], scoring.summed_logps

    def watched(*args, **kwargs):
        found = original(*args, **kwargs)
        sums.append(found[0].dtype)
        return found

    monkeypatch.setattr(scoring, "summed_logps", watched)
    for fused in (False, True):
        trainer = make_trainer(
            f"fused-{fused}", model=tiny_llama(dtype=dtype), bf16=bf16, max_steps=1, fused_lm_head=fused
        )
        trainer.train()
    assert set(sums) == {torch.float32}


# ---- Masters ----


def end(make_trainer, folder, dtype, *, master=True, **options):
    settings = PUBLISHED | {"max_steps": 12, "objective": "orpo", "bf16": False} | options
    trainer = make_trainer(folder, model=tiny_llama().to(torch.bfloat16).to(dtype), **settings)
    if not master:
        trainer._context.roles._keeps_master = False
    start = {name: weight.detach().clone() for name, weight in trainer._context.roles.policy_tensors().items()}
    trainer.train()
    moved = trainer._context.roles.policy_tensors()
    return trainer, torch.cat([(moved[name].detach() - weight).flatten().float() for name, weight in start.items()])


def test_bfloat16_weights_with_masters_move_as_float32_ones_do(make_trainer):
    exact, expected = end(make_trainer, "float32", torch.float32)
    rounded, moved = end(make_trainer, "bfloat16", torch.bfloat16)
    none, still = end(make_trainer, "without", torch.bfloat16, master=False)
    along = [float(change @ expected / (expected @ expected)) for change in (moved, still)]
    assert along[0] == pytest.approx(1, abs=0.05)
    # The steps that do change a weight change it by much more than they should, so movement alone is no measure.
    assert float((still != 0).float().mean()) < 0.2 < 0.9 < float((moved != 0).float().mean())
    shares = [[row["optimizer/moved_fraction"] for row in lines(trainer)][-1] for trainer in (exact, rounded, none)]
    assert shares[1] == pytest.approx(shares[0], abs=0.02)
    assert shares[2] < 0.05 < 0.8 < shares[0]
    weights = dict(rounded.policy().named_parameters())
    for name, master in rounded._context.roles.policy_tensors().items():
        assert master.dtype == torch.float32
        assert torch.equal(weights[name], rounded_to(master, torch.bfloat16))


def test_what_bfloat16_weights_compute_with_and_save_moves_as_the_masters_do(make_trainer):
    start = {name: weight.float() for name, weight in tiny_llama(dtype=torch.bfloat16).state_dict().items()}
    trainer, moved = end(make_trainer, "run", torch.bfloat16)
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(trainer.run_folder.path, dtype=torch.bfloat16).state_dict()
    steps, names = trainer._context.roles.policy_tensors(), list(trainer._context.roles.policy_tensors())
    change = torch.cat([(saved[name].float() - start[name]).flatten() for name in names])
    nearest = torch.cat([(steps[name].detach().bfloat16().float() - start[name]).flatten() for name in names])
    along = [float(one @ moved / (moved @ moved)) for one in (change, nearest)]
    # A few thousand of these weights move.
    assert along[0] == pytest.approx(1, abs=0.1)
    # To the nearest bfloat16 number, most of the movement would be in no weight.
    assert along[1] < 0.7


def test_the_opponent_follows_the_masters(make_trainer):
    trainer, _ = end(make_trainer, "run", torch.bfloat16, ema_decay=0.9)
    own = {name: weight.clone() for name, weight in trainer.opponent.tensors().items()}
    trainer._context.roles.follow(1)
    for name, master in trainer._context.roles.policy_tensors().items():
        torch.testing.assert_close(
            trainer.opponent.tensors()[name], 0.9 * own[name] + 0.1 * master, rtol=1e-6, atol=1e-9
        )
    assert not all(torch.equal(own[name], own[name].bfloat16().float()) for name in own)


def test_a_warning_says_that_weights_stand_still(make_trainer, caplog):
    end(make_trainer, "without", torch.bfloat16, master=False)
    said = [record.getMessage() for record in caplog.records if "optimizer/moved_fraction" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("optim", ["rmsprop", "adamw_torch", "adafactor", "adagrad"])
def test_a_resumed_run_with_masters_is_the_uninterrupted_one(optim, make_trainer):
    options = {"save_strategy": "steps", "save_steps": 1, "ema_decay": 0.9, "max_steps": 4, "optim": optim}
    whole, _ = end(make_trainer, "whole", torch.bfloat16, **options)
    again = make_trainer("again", model=tiny_llama(dtype=torch.bfloat16), objective="orpo", **PUBLISHED | options)
    again.train(resume_from_checkpoint=str(whole.run_folder.path / "checkpoint-2"))
    for tensors in (
        lambda trainer: trainer._context.roles.policy_tensors(),
        lambda trainer: trainer.opponent.tensors(),
    ):
        ours, theirs = tensors(again), tensors(whole)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert whole.optimizer.optimizer._masters[0].dtype == torch.float32


@pytest.mark.parametrize("stepped", [False, True])
def test_an_optimizer_that_was_passed_in_steps_masters_too(stepped, make_trainer):
    model = tiny_llama(dtype=torch.bfloat16)
    own = torch.optim.RMSprop(model.parameters(), lr=1e-5)  # a tenth of the spacing of these weights
    if stepped:
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        own.step()
        own.zero_grad()
    trainer = make_trainer(
        trainer=functools.partial(SAPOTrainer, optimizers=(own, None)), model=model, max_steps=4, bf16=False
    )
    trainer.train()
    assert lines(trainer)[-1]["optimizer/moved_fraction"] > 0.5
    assert {state["square_avg"].dtype for state in own.state.values()} == {torch.float32}
    assert len(own.state) == len(own.param_groups[0]["params"])


def test_optimizer_state_of_another_precision_is_refused():
    weights = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = with_masters(torch.optim.SGD(weights, lr=0.1))
    with pytest.raises(CheckpointError, match="lacks the float32 masters"):
        optimizer.load_state_dict(torch.optim.SGD(weights, lr=0.1).state_dict())


def test_masters_take_over_weights_that_were_loaded_since():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterWeights(torch.optim.SGD([weight], lr=1e-4))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.tolist() == [1, 1]
    with torch.no_grad():
        weight[1] = 3
    optimizer.take_changed_weights()
    assert optimizer.masters()[id(weight)].tolist() == pytest.approx([1 - 1e-4, 3], abs=1e-7)


def test_a_step_without_gradients_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterWeights(torch.optim.AdamW([weight], lr=0.1))
    weight.grad = torch.ones_like(weight)
    optimizer.zero_grad()
    optimizer.step()
    assert weight.tolist() == [1, 1]
    assert not optimizer.state


def test_a_scheduler_reaches_the_wrapped_optimizer():
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = MasterWeights(torch.optim.SGD([weight], lr=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        scheduler.step()
    assert weight.tolist() == [-1.5, -1.5]


@pytest.mark.parametrize(
    ("distributed", "mixed", "dtype", "expected"),
    [
        ("NO", "no", torch.bfloat16, True),
        ("MULTI_GPU", "bf16", torch.bfloat16, True),
        ("MULTI_GPU", "bf16", torch.float32, False),
        ("DEEPSPEED", "no", torch.bfloat16, False),
        ("FSDP", "bf16", torch.bfloat16, False),
        ("FSDP", "no", torch.bfloat16, r"FSDP2 and bf16=false.* Set bf16 to true, or dtype to float32"),
        ("FSDP", "no", torch.float32, False),
        ("NO", "no", torch.float16, r"dtype=float16.* Set dtype to bfloat16"),
    ],
)
def test_bfloat16_weights_have_a_master_of_ours_or_of_the_strategy_or_are_refused(distributed, mixed, dtype, expected):
    accelerator = SimpleNamespace(distributed_type=DistributedType(distributed), mixed_precision=mixed)
    if isinstance(expected, bool):
        assert needs_master(tiny_llama(dtype=dtype), accelerator) == expected
        return
    with pytest.raises(ConfigurationError, match=expected):
        needs_master(tiny_llama(dtype=dtype), accelerator)


def test_weights_that_cannot_have_a_master_are_refused(make_trainer):
    with pytest.raises(ConfigurationError, match="dtype=float16"):
        make_trainer(model=tiny_llama(dtype=torch.float16))


def test_a_sample_counts_what_changed():
    weights = [torch.zeros(1_500_000), torch.zeros(10)]
    sample = MovedSample(lambda: weights)
    sample.take()
    weights[0][:750_000] = 1
    share, count = sample.moved()
    assert share == pytest.approx(0.5, abs=1e-3)
    assert count <= MovedSample.LARGEST + 2


# ---- Heads ----


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="trl 1.16 or newer")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("adapter", "fused"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
    ],
)
def test_fused_and_gathered_heads_agree_under_an_adapter(adapter, fused, tied, make_trainer):
    found = []
    for asked in (False, True):
        model = get_peft_model(tiny_llama(tie_word_embeddings=tied), LoraConfig(r=4, **adapter))
        torch.manual_seed(1)
        for weight in model.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.3)
        if asked and not fused:
            with pytest.raises(ConfigurationError, match="LoRA on the output head"):
                make_trainer(f"fused-{asked}", model=model, fused_lm_head=asked)
            return
        trainer = make_trainer(f"fused-{asked}", model=model, fused_lm_head=asked, max_steps=1)
        trainer.train()
        found.append(lines(trainer)[0])
    for name in ("logps/chosen", "logps/rejected", "grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4)


@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="trl 1.16 or newer")
@pytest.mark.parametrize("asked", [True, None])
def test_a_fused_head_that_scores_otherwise_is_not_used(asked, make_trainer, caplog):
    """As of an architecture that scales its logits in a way that trl does not know."""
    model = tiny_llama()

    class LlamaForCausalLM(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    model.__class__ = LlamaForCausalLM
    trainer = make_trainer(model=model, max_steps=1, fused_lm_head=True)
    trainer.args.fused_lm_head = asked  # unset it is on by default on CUDA
    assert trainer._context.roles.fused_head
    if asked:
        with pytest.raises(ConfigurationError, match="gives other log-probabilities than its own"):
            trainer.train()
        return
    trainer.train()
    assert not trainer._context.roles.fused_head
    assert any("gathered head" in record.getMessage() for record in caplog.records)


# ---- Options ----


@pytest.mark.parametrize("use_cpu", [False, True])
def test_float16_needs_an_accelerator(use_cpu, tmp_path):
    with pytest.raises(ConfigurationError, match="fp16=true"):
        SAPOConfig(str(tmp_path), fp16=True, use_cpu=use_cpu)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**60], ids=["fits", "overflows"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_float16_begins_at_zero_and_steps_unless_the_scaled_gradients_overflow(lora, scale, make_trainer, monkeypatch):
    """As accelerate sets it up on a GPU: float16 under autocast, and a scaler of the loss."""
    monkeypatch.setattr(SAPOConfig, "_check_device", lambda self: None)
    trainer = make_trainer(lora=lora, fp16=True, max_steps=2)
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    start = {name: weight.clone() for name, weight in trainer._context.roles.policy_tensors().items()}
    seen = set()
    layer = next(part for name, part in trainer.policy().named_modules() if name.endswith("layers.0.mlp.down_proj"))
    layer.register_forward_hook(lambda _, args, output: seen.add(output.dtype))
    trainer.train()
    first, second = lines(trainer)
    assert first["rewards/margins"] == first["rewards/chosen"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert torch.float16 in seen
    overflows = scale > 2**30
    assert first["nonfinite_step_fraction"] == second["nonfinite_step_fraction"] == overflows
    moved = [not torch.equal(start[name], now) for name, now in trainer._context.roles.policy_tensors().items()]
    assert not any(moved) if overflows else any(moved)
    assert (first.get("optimizer/moved_fraction", 0) > 0.1) == (not overflows)
    assert (second["opponent/distance"] == 0) == overflows


@pytest.mark.parametrize(("matrix_units", "expected"), [(False, False), (True, True)])
def test_bfloat16_is_the_default_on_processors_with_units_for_it(matrix_units, expected, make_trainer, monkeypatch):
    """Capability alone decides: that such a processor is faster was not measured here, only that the run is right."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: matrix_units)
    # Slower than float32 (docs/performance.md), so these instructions decide nothing.
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    trainer = make_trainer(max_steps=1)
    assert (trainer.args.bf16, trainer.args.use_cpu) == (expected, True)
    assert make_trainer("off", bf16=False).args.bf16 is False
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
