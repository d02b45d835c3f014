"""Laws of several processes that need only one: what they agree on, and what is said of one that is gone."""

import io
import json
import logging
import signal
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch

import sapo.commands.main
from sapo import SAPOConfig
from sapo.commands.launch import ended, launch
from sapo.commands.main import interrupted, main
from sapo.commands.notices import held_notices
from sapo.errors import ConfigurationError, DatasetError, ModelError, RepeatedError, TrainingError, process_lost
from sapo.options.rendezvous import processes_told, waiting_line, waiting_told
from sapo.runs.folder import RunFolder, writing
from sapo.runs.layout import LOCK_FILE
from sapo.runs.world import World
from sapo.text.interrupts import raise_swallowed
from sapo.training.agreement import check_processes, described, different
from sapo.training.callbacks import StopOnSignal
from tests.tiny import tiny_llama

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9634. This is "
    "typically caused by a remote worker crashing."
)


class Together(World):
    """One of two processes, of which the other always says the same."""

    other = None

    def gather(self, value):
        other = type(self).other
        other = other(value) if callable(other) else other
        return [value, other] if self.first else [other, value]


def answering(other):
    return type("Answering", (Together,), {"other": staticmethod(other) if callable(other) else other})


# ---- Errors ----


@pytest.mark.parametrize("process", [0, 1])
def test_an_error_of_all_processes_is_reported_by_the_first_alone(process):
    world = answering(lambda said: said)(process, 2)
    with pytest.raises(DatasetError if process == 0 else RepeatedError, match="row 6"), world.agreeing():
        raise DatasetError("row 6")


def test_the_first_process_reports_the_error_of_another():
    world = answering("ModelError: no such folder")(0, 2)
    with pytest.raises(TrainingError, match=r"^process 1: ModelError: no such folder$"), world.agreeing():
        pass


def test_a_fault_of_this_process_alone_keeps_its_traceback_and_ends_the_first_too():
    with pytest.raises(KeyError), answering(None)(1, 2).agreeing():
        raise KeyError("a bug")
    with pytest.raises(RepeatedError, match="process 0: ModelError"), answering("ModelError: gone")(1, 2).agreeing():
        pass


def test_one_process_raises_its_own_and_asks_nobody():
    with pytest.raises(ModelError), World().agreeing():
        raise ModelError("gone")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(GLOO), "another process of this run has ended"),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), "ended"),
        (torch.distributed.DistBackendError("[Rank 0] Watchdog caught collective operation timeout"), "ddp_timeout"),
        (RuntimeError("gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"), "ddp_timeout"),
        (
            torch.distributed.DistNetworkError("The server socket has failed to listen: port: 29500, EADDRINUSE"),
            r"29500, EADDRINUSE). Choose another: --main_process_port",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ConnectionError("Connection reset by peer"), None),
    ],
)
def test_what_torch_says_of_an_ended_process_is_told_from_other_errors(error, said):
    told = process_lost(error)
    assert (told is None) == (said is None)
    assert said is None or said in str(told)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(GLOO), "TrainingError: another process of this run has ended; its own message"),
        (RepeatedError("process 0: DatasetError: row 6"), ""),
    ],
)
def test_the_command_line_says_one_line_of_another_process_or_none(error, line, monkeypatch, capsys):
    def fails(given):
        raise error

    monkeypatch.setattr(sapo.commands.main, "_dispatch", fails)
    monkeypatch.setattr(sapo.commands.main, "_AFTER_THE_FIRST", 0.0)
    assert main(["train"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == bool(line)


def test_only_the_first_process_removes_what_all_of_them_write_in(tmp_path):
    (tmp_path / "staging").mkdir()
    for staging, left in ((None, True), (tmp_path / "staging", False)):
        with pytest.raises(Exception, match="No space left"), writing(tmp_path / "checkpoint-2", staging):
            raise OSError(28, "No space left on device")
        assert (tmp_path / "staging").is_dir() is left
    with pytest.raises(RuntimeError, match="Connection"), writing(tmp_path / "checkpoint-2", None):
        raise RuntimeError(f"writev: {GLOO}")


def test_every_process_learns_the_place_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "barrier", lambda self: None)
    places = []
    RunFolder(tmp_path, World(1, 2)).save_checkpoint(2, lambda: None, lambda staged, place: places.append(place))
    assert places == [tmp_path / "checkpoint-2"]


def test_all_processes_resume_from_what_the_first_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "barrier", lambda self: None)
    (tmp_path / "checkpoint-4").mkdir()
    # The path of the folder is another in the first process.
    blind = answering(lambda own: "/elsewhere/checkpoint-6" if isinstance(own, str) else own)(1, 2)
    assert RunFolder(tmp_path, blind).find_checkpoint("auto") == tmp_path / "checkpoint-6"
    blind = answering(None)(1, 2)
    assert RunFolder(tmp_path, blind).find_checkpoint("auto") is None


# ---- What they agree on ----


@pytest.fixture
def context(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"process": 1}))
    policy = tiny_llama()
    args = SAPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    return lambda world: SimpleNamespace(world=world, args=args, roles=SimpleNamespace(policy=lambda: policy))


def test_equal_processes_are_taken(context, tmp_path):
    check_processes(context(answering(lambda own: own)(0, 2)), tmp_path, [1, 2], "a" * 64)
    check_processes(context(World()), tmp_path, [1, 2], "a" * 64)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("learning_rate", "0.1", "learning_rate: .* and 0.1"),
        ("training rows", "3 rows, bbb", "training rows: 2 rows, aaaaaaaaaaaa and 3 rows, bbb"),
        ("weights", "0", "weights: "),
    ],
)
def test_what_differs_between_processes_is_named_with_both_values(name, value, shown, context, tmp_path):
    world = answering(lambda own: own | {name: value} if isinstance(own, dict) and name in own else own)(0, 2)
    with pytest.raises(ConfigurationError, match=f"process 0 and process 1 differ in {shown}"):
        check_processes(context(world), tmp_path, [1, 2], "a" * 64)


def test_a_folder_that_another_process_does_not_see_is_refused(context, tmp_path, monkeypatch):
    monkeypatch.setattr("sapo.training.agreement._VISIBLE_WITHIN", 0.0)
    world = answering(lambda own: False if own is True else own)(0, 2)
    with pytest.raises(ConfigurationError, match="process 1 does not see"):
        check_processes(context(world), tmp_path, [1], "a")
    blind = answering(lambda own: own if own and "process" not in own else {"process": 2})(1, 2)
    with pytest.raises(ConfigurationError, match=r"process [01] does not see"):
        check_processes(context(blind), tmp_path, [1], "a")


def test_the_folder_may_have_a_path_of_its_own_in_each_process(context):
    own = SAPOConfig(output_dir="elsewhere", use_cpu=True, report_to="none")
    world = answering(lambda said: said)(0, 2)
    assert not different([described(context(world).args.to_dict()), described(own.to_dict())])


# ---- Stopping ----


def test_a_signal_to_any_process_stops_all(monkeypatch):
    stop = StopOnSignal()
    args = SimpleNamespace(world_size=2, device="cpu")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, _: flag.fill_(1.0))
    assert not stop.told
    assert stop.is_told(args)
    assert stop.told
    assert stop.received is None


def test_one_ctrl_c_that_a_terminal_and_a_launcher_both_send_is_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stop = StopOnSignal()
    stop.on_step_begin(SimpleNamespace(world_size=2, generation_backend="transformers"), SimpleNamespace(), None)
    stop._note(signal.SIGINT, None)
    stop._note(signal.SIGTERM, None)
    assert stop.received is signal.SIGINT
    monkeypatch.setattr("sapo.training.callbacks._ECHO", 0.0)
    with pytest.raises(KeyboardInterrupt):
        stop._note(signal.SIGINT, None)
    raise_interrupt_seen()


def raise_interrupt_seen():
    """Forget the interrupt, which is kept for the code after the next import."""
    with pytest.raises(KeyboardInterrupt):
        raise_swallowed()


@pytest.mark.parametrize(
    ("status", "asked", "said"),
    [
        (2, False, "process 1 ended with status 2; its own message is above"),
        (-9, False, "process 1 was ended by SIGKILL, as when the main memory"),
        (-11, True, "process 1 was ended by SIGSEGV. Continue"),
        (-15, False, "process 1 was ended by SIGTERM. Continue"),
    ],
)
def test_how_a_process_ended_is_said(status, asked, said):
    assert str(ended(1, status, asked=asked)).startswith(said)


@pytest.mark.parametrize("status", [-15, -2, 130])
def test_a_run_that_was_asked_to_end_before_its_first_step_is_interrupted(status):
    assert isinstance(ended(0, status, asked=True), KeyboardInterrupt)


def test_a_port_that_is_in_use_is_one_line(monkeypatch):
    def in_use(parsed):
        raise ConnectionError("Tried to launch on port `29500`, but another process is utilizing it.")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", in_use)
    with pytest.raises(ConfigurationError, match=r"29500.*Choose another: --main_process_port"):
        launch("train", {"--accelerate_config": "multi_gpu"}, [])


@pytest.mark.parametrize(("rank", "told"), [("0", "Interrupted.\n"), ("1", "")])
def test_of_several_processes_the_first_says_that_they_were_interrupted(rank, told, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    assert interrupted() == 130
    assert capsys.readouterr().err == told


# ---- What is said once ----


def test_of_several_processes_the_others_show_errors_alone(capsys):
    shown = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("tests.processes")
    logger.addHandler(shown)
    shown.stream = sys.stderr
    with held_notices() as notices:
        notices.dropped = True
        shown.stream = stream = io.StringIO()
        logger.warning("said by the first")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("said by the first", stacklevel=1)
        logger.error("its own")
    logger.removeHandler(shown)
    assert "UserWarning" not in capsys.readouterr().err
    assert stream.getvalue() == "its own\n"


# ---- The environment ----


def test_a_process_that_waits_for_others_says_so_with_what_to_unset(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with waiting_told(0.01):
        time.sleep(0.2)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "process 0 of 2, which meet at 10.0.0.1:29500" in told
    assert "unset WORLD_SIZE" in told
    with waiting_told(30.0):
        pass
    assert not capsys.readouterr().err


def test_one_process_waits_for_nobody(monkeypatch):
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes_told() == 1
    monkeypatch.setenv("WORLD_SIZE", "lots")
    assert processes_told() == 1
    assert "unset RANK MASTER_ADDR" in waiting_line({"RANK": "1", "MASTER_ADDR": "a", "WORLD_SIZES": "2"}, 2)


def test_a_backend_is_left_alone_in_one_process(tmp_path):
    config = SAPOConfig(output_dir=str(tmp_path), use_cpu=True, ddp_backend="gloo", report_to="none")
    assert config.world_size == 1
    assert config.ddp_backend == "gloo"
