"""Laws of training with an engine, on an engine that needs no server."""

import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sapo.errors import CheckpointError, ConfigurationError, GenerationError
from tests.engines import FolderEngine, TurnsEngine
from tests.integration.test_resume import metrics, weights
from tests.tiny import tiny_llama, tiny_rows

VARIANTS = {
    "synchronous": {},
    "lora": {"lora": True},
    "lora-ahead": {"lora": True, "max_staleness": 2},
    "ahead-1": {"max_staleness": 1},
    "ahead-3": {"max_staleness": 3, "gradient_accumulation_steps": 3, "num_generations": 2},
    "rare-synchronous": {"sync_opponent_steps": 3},
    "sent": {"sync_opponent_steps": 2, "max_staleness": 2, "vllm_weights_transfer": "stream"},
    "rare": {"sync_opponent_steps": 2, "max_staleness": 3},
    "pooled": {"steps_per_generation": 3, "sync_opponent_steps": 2},
    "evaluated": {"max_staleness": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_rows": tiny_rows(5, seed=5)},
}


@pytest.fixture
def make(make_trainer):
    def with_engine(folder="run", engine=None, **options):
        engine = engine or FolderEngine()
        settings = {"generation_backend": "vllm_server"} | options
        trainer = make_trainer(folder, generator=engine, **settings)
        return trainer, engine

    return with_engine


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("options", [{}, {"lora": True}, {"objective": "orpo", "steps_per_generation": 2}])
def test_engine_without_staleness_equals_the_opponent_in_this_process(options, make, make_trainer):
    plain = make_trainer("plain", **options)
    plain.train()
    trainer, _ = make("engine", **options)
    trainer.train()
    assert same(weights(trainer), weights(plain))
    assert trainer.source.play.buffer.entries() == plain.source.buffer.entries()


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_reproduces_uninterrupted_run(variant, make):
    options = VARIANTS[variant] | {"save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    whole, _ = make("whole", **options)
    whole.train()
    for step in (2, 5):
        resumed, _ = make(f"from-{step}", **options)
        resumed.train(resume_from_checkpoint=str(whole.run_folder.path / f"checkpoint-{step}"))
        assert same(weights(resumed), weights(whole))
        assert resumed.source.play.buffer.entries() == whole.source.play.buffer.entries()
        # How many requests wait is a matter of time, like the time itself.
        queue = [
            [{k: v for k, v in row.items() if not k.startswith("engine/")} for row in metrics(trainer, step)]
            for trainer in (resumed, whole)
        ]
        assert queue[0] == queue[1]


@pytest.mark.parametrize(
    "options", [{}, {"lora": True}, {"sync_opponent_steps": 2}, {"generation_interval": 2, "skip_identical": False}]
)
def test_engine_that_takes_turns_equals_one_of_its_own(options, make):
    """It works only when its text is needed, with the weights that it should have had by then."""
    options = {"save_strategy": "steps", "save_steps": 1, **options}
    apart, engine = make("apart", **options)
    apart.train()
    settings = options | {"generation_backend": "vllm_colocate"}
    inside, turns = make("inside", TurnsEngine(), **settings)
    inside.train()
    assert same(weights(inside), weights(apart))
    in_memory = options.keys() == {"save_strategy", "save_steps"}
    assert [step for what, step in turns.events if what != "rows"] == [s for what, s in engine.events if what == "load"]
    assert ("tensors" in dict(turns.events)) == in_memory
    resumed, _ = make("resumed", TurnsEngine(), **settings)
    resumed.train(resume_from_checkpoint=str(inside.run_folder.path / "checkpoint-3"))
    assert same(weights(resumed), weights(inside))


@pytest.mark.parametrize("slow", ["rows", "load", "nothing"])
def test_which_opponent_writes_what_does_not_depend_on_speed(slow, make):
    options = {"max_staleness": 3, "sync_opponent_steps": 2, "max_steps": 6}
    usual, _ = make("usual", **options)
    usual.train()
    engine = FolderEngine()
    engine.before = lambda what: time.sleep(0.05 if what == slow else 0)
    trainer, _ = make("slow", engine, **options)
    trainer.train()
    assert same(weights(trainer), weights(usual))


@pytest.mark.parametrize(("staleness", "every"), [(0, 1), (0, 3), (1, 1), (3, 1), (3, 2), (4, 3)])
def test_no_pair_is_staler_than_allowed(staleness, every, make):
    trainer, engine = make(max_staleness=staleness, sync_opponent_steps=every, max_steps=9, skip_identical=False)
    trainer.train()
    # No pair left the buffer: its entries tell which opponent wrote those of each step, in order.
    steps = [entry.step for entry in trainer.source.play.buffer.entries()]
    ages = [place // 2 - step for place, step in enumerate(steps)]
    most = staleness or every - 1
    assert max(ages) == most
    assert min(ages) >= 0
    assert [step for what, step in engine.events if what == "load"] == list(range(0, 9, every))


def test_engine_writes_while_the_policy_trains(make):
    """With staleness allowed, a step does not wait for the pairs of the next: here these cannot come before it ends."""
    done = threading.Event()
    engine = FolderEngine()
    calls = []

    def second_batch_waits_for_the_first_step(what):
        if what == "rows":
            calls.append(what)
            if len(calls) == 2:
                assert done.wait(60)

    engine.before = second_batch_waits_for_the_first_step
    trainer, _ = make(engine=engine, max_staleness=1, max_steps=2)
    moved = trainer.source.opponent_moved

    def noted(step):
        moved(step)
        done.set()

    trainer.source.opponent_moved = noted
    trainer.train()
    assert trainer.state.global_step == 2


def test_requests_ahead_are_bounded(make):
    """An engine that writes nothing more is not asked for more than the steps of its window."""
    trainer, engine = make(max_staleness=3, max_steps=8)
    trainer.train()
    rows = [number for what, number in engine.events if what == "rows"]
    # The first step asks for its own pairs and those of three more; each later one for those of one more.
    assert rows == [2] * 8
    loads = [place for place, (what, _) in enumerate(engine.events) if what == "load"]
    assert loads[:2] == [0, 5]


@pytest.mark.parametrize("staleness", [0, 2])
def test_trouble_of_the_engine_ends_the_run_with_its_own_words(staleness, make):
    trainer, engine = make(max_staleness=staleness)
    engine.before = lambda what: setattr(engine, "trouble", "gone") if len(engine.events) > 3 else None
    with pytest.raises(GenerationError, match="gone"):
        trainer.train()
    assert engine.closed == 1


def test_weights_that_cannot_be_loaded_at_the_start_end_the_run(make):
    trainer, engine = make()

    def refuse(what):
        raise GenerationError("no room")

    engine.before = refuse
    with pytest.raises(GenerationError, match="no room"):
        trainer.train()
    assert engine.events == []
    assert engine.closed == 1


def test_weights_on_their_way_are_removed(make):
    trainer, _ = make(max_staleness=1)
    trainer.train()
    assert not (trainer.run_folder.path / "engine").exists()


def test_weights_are_handed_over_where_the_user_says(make, tmp_path):
    seen = []
    engine = FolderEngine()
    engine.before = lambda what: seen.append(sorted((tmp_path / "memory").glob("*/*")))
    trainer, _ = make(engine=engine, vllm_weights_dir=str(tmp_path / "memory"))
    trainer.train()
    assert all(1 <= len(folders) <= 2 for folders in seen)
    assert list((tmp_path / "memory").iterdir()) == []


@pytest.mark.parametrize("memory", [False, True])
def test_weights_that_a_killed_run_left_are_removed_and_nobody_elses(memory, make, tmp_path):
    """A whole model each time, in memory perhaps."""
    given = {"vllm_weights_dir": str(tmp_path / "memory")} if memory else {}
    killed, engine = make("run", **given)
    # Killed: it tidies nothing up.
    killed.source.begin(0)
    (left,) = (tmp_path / "memory").glob("*/*") if memory else (tmp_path / "run" / "engine").iterdir()
    other, _ = make("elsewhere/run", **given)
    other.train()
    assert left.exists()
    again, engine = make("run", **given, overwrite_output_dir=True)
    engine.before = lambda what: seen.append(left.exists())
    seen = []
    again.train()
    assert seen
    assert not any(seen)


def test_checkpoint_between_two_synchronizations_keeps_what_the_engine_had(make):
    trainer, _ = make(sync_opponent_steps=2, save_strategy="steps", save_steps=1, max_steps=4)
    trainer.train()
    kept = [(trainer.run_folder.path / f"checkpoint-{step}" / "engine").exists() for step in (1, 2, 3)]
    assert kept == [True, False, True]


def test_checkpoint_with_weights_of_a_later_step_is_refused(make):
    trainer, _ = make(sync_opponent_steps=4, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    from sapo.runs import checkpoint

    folder = trainer.run_folder.path / "checkpoint-2"
    (folder / "engine" / "opponent-0").rename(folder / "engine" / "opponent-9")
    checkpoint.seal(folder)
    again, _ = make("again", sync_opponent_steps=4)
    with pytest.raises(CheckpointError, match="not weights of a step before 2"):
        again.train(resume_from_checkpoint=str(folder))


def test_evaluation_alone_loads_the_opponent_and_lets_it_go(make):
    trainer, engine = make(eval_rows=tiny_rows(4, seed=3))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert engine.events[0] == ("load", 0)
    assert engine.closed == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"generation_backend": "transformers", "max_staleness": 2}, "max_staleness=2 with generation_backend=trans"),
        ({"generation_backend": "transformers", "sync_opponent_steps": 2}, "sync_opponent_steps=2 with generation_b"),
        ({"max_staleness": 1, "sync_opponent_steps": 2}, "Raise max_staleness to 2"),
        ({"max_staleness": 1, "steps_per_generation": 2}, "steps_per_generation=2 with max_staleness=1"),
        ({"generation_backend": "vllm_colocate", "max_staleness": 1}, "cannot generate and train at once"),
        ({"vllm_weights_transfer": "stream", "generation_backend": "vllm_colocate"}, "no server to send weights to"),
        ({"generation_batch_size": 2}, "vLLM forms its own batches"),
        ({"pair_source": "paired"}, "nothing is generated"),
    ],
)
def test_options_that_clash_are_refused(options, says, make):
    with pytest.raises(ConfigurationError, match=says):
        make(**options)


@pytest.mark.parametrize("backend", ["vllm_server", "vllm_colocate"])
@pytest.mark.parametrize(
    "adapter",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}],
)
def test_adapters_that_vllm_does_not_serve_are_refused_at_once(backend, adapter, make_trainer):
    policy = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], **adapter))
    with pytest.raises(ConfigurationError, match=rf"{next(iter(adapter))}=.* with generation_backend={backend}"):
        make_trainer(model=policy, generation_backend=backend)


def test_a_model_in_another_precision_is_still_the_same(make):
    """What the engine is given is a folder in the opponent's own precision."""
    trainer, engine = make(
        engine=FolderEngine(tiny_llama(dtype=torch.bfloat16)), model=tiny_llama(dtype=torch.bfloat16)
    )
    trainer.train()
    assert engine.events[0] == ("load", 0)


def test_what_was_submitted_is_done_at_the_end(make):
    """Processes wait for each other before each load: one that dropped its last would leave the others waiting."""
    trainer, engine = make(max_staleness=2, max_steps=4)
    engine.before = lambda what: time.sleep(0.2 if what == "load" else 0)
    trainer.train()
    assert [step for what, step in engine.events if what == "load"] == [0, 1, 2, 3]
    assert engine.closed == 1


def test_an_engine_that_fails_after_the_last_step_loses_nothing(make, caplog):
    trainer, engine = make(max_staleness=2, max_steps=4)

    def refuse_the_last(what):
        if what == "load" and len([one for one in engine.events if one[0] == "load"]) == 3:
            time.sleep(0.5)
            raise GenerationError("gone")

    engine.before = refuse_the_last
    trainer.train()
    assert trainer.state.global_step == 4
    assert "After the last step" in caplog.text
    assert "gone" in caplog.text
    assert engine.closed == 1
