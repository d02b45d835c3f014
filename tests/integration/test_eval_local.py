import pytest
import torch

from sapo.errors import ConfigurationError
from sapo.training.local_eval import LocalSignals
from tests.runs import metrics_of
from tests.tiny import tiny_llama, tiny_rows

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}


def logged(trainer):
    return metrics_of(trainer.run_folder.path, "eval_loss")


def make(make_trainer, name, *, local, **options):
    extra = {"eval_local": True, "eval_local_size": 4, "eval_local_max_time_fraction": 1.0} if local else {}
    model = tiny_llama(attention_dropout=0.3)
    settings = EVALUATED | {"disable_dropout": False, "model": model, "eval_rows": tiny_rows(6, seed=5)}
    return make_trainer(name, **(settings | extra | options))


@pytest.mark.parametrize(
    "options", [{}, {"lora": True}, pytest.param({"objective": "orpo", "layout": "plain"}, marks=pytest.mark.slow)]
)
def test_local_measures_leave_the_training_undisturbed(make_trainer, options):
    ends = []
    for name, local in (("without", False), ("with", True)):
        trainer = make(make_trainer, name, local=local, **options)
        trainer.train()
        ends.append((trainer, list(trainer.policy().parameters())))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    without, with_local = (logged(trainer) for trainer, _ in ends)
    assert [row["eval_loss"] for row in without] == [row["eval_loss"] for row in with_local]
    assert all("eval_local/nll" in row and "eval_local/prefers_data_to_opponent" in row for row in with_local)
    assert all(0 < row["eval_local/time_share"] <= 1 for row in with_local)


def test_same_rows_and_seeds_at_every_evaluation(make_trainer):
    trainer = make(make_trainer, "run", local=True, learning_rate=0.0)
    trainer.train()
    first, *others = [{k: v for k, v in row.items() if "local/" in k and "time" not in k} for row in logged(trainer)]
    assert len(others) == 2
    assert len(first) > 15
    assert all(row == first for row in others)


class Clock:
    """Time passes where the test says, and a second in each measurement."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_measurements_wait_until_their_share_allows_them(make_trainer, monkeypatch):
    trainer = make(make_trainer, "run", local=True, eval_local_max_time_fraction=0.1)
    clock = Clock()
    signals = LocalSignals(trainer._context, trainer._averages["eval"], trainer.eval_dataset, clock)
    measured = []
    whole = LocalSignals._measure

    def timed(self, places):
        clock.now += 0.5 * len(places)
        measured.append(len(places))
        return whole(self, places)

    monkeypatch.setattr(LocalSignals, "_measure", timed)
    signals.begin()
    shares = []
    for step in range(2, 62, 2):
        clock.now += 2.0
        signals.observe(last=step == 60)
        shares.append(trainer._averages["eval"].drain()["local/time_share"])
    # 4 rows take 2 s: at the first and the last evaluation, and as often as a tenth of the time allows.
    assert set(measured) == {4}
    assert 3 <= len(measured) <= 5
    assert shares[0] == 0.5
    assert all(share <= 0.1 + 1e-9 for share in shares[12:-1])
    assert shares[-1] > shares[-2]


def test_a_short_run_measures_at_its_first_and_last_evaluation(make_trainer):
    trainer = make(make_trainer, "run", local=True, eval_local_max_time_fraction=0.0, max_steps=7)
    trainer.train()
    rows = logged(trainer)
    assert [row["step"] for row in rows if "eval_local/nll" in row] == [2, 7]
    assert [row["step"] for row in rows] == [2, 4, 6, 7]


def test_local_measures_without_evaluations_are_refused(make_trainer):
    with pytest.raises(ConfigurationError, match="eval_strategy"):
        make_trainer(eval_local=True)


def test_paired_data_has_no_opponent_to_face(make_trainer):
    trainer = make(
        make_trainer,
        "run",
        local=True,
        pair_source="paired",
        rows=tiny_rows(paired=True),
        reference="none",
        eval_rows=tiny_rows(6, seed=5, paired=True),
    )
    trainer.train()
    (first, *_) = logged(trainer)
    assert "eval_local/prefers_data_to_own" in first
    assert "eval_local/prefers_data_to_opponent" not in first
