"""Laws of Ctrl-C while a command starts, and of output that nobody reads any more."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sapo.__main__ import run
from sapo.commands.main import main
from sapo.text.interrupts import interrupt, unwatch, watch


def test_a_closed_output_is_no_fault():
    started = f"{sys.executable} -m sapo recipes >&-"
    done = subprocess.run(["sh", "-c", started], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def piped(code: str, *arguments: str, merged: bool = False) -> tuple[int, str]:
    """Exit status and standard error of the program with `main` as in `code`, whose reader goes after a line."""
    program = (
        f"import sys, sapo.commands.main as m\n{code}\nm.main = main\nfrom sapo.__main__ import run\nsys.exit(run())"
    )
    errors = subprocess.STDOUT if merged else subprocess.PIPE
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as started:
        assert started.stdout.readline() == "first\n"
        started.stdout.close()
        error = "" if merged else started.stderr.read()
    return started.returncode, error


@pytest.mark.parametrize("printing", ["print(text, flush=True)", "console.print(text)"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_command_outlives_the_reader_of_its_output(merged, printing, tmp_path):
    file = tmp_path / "result"
    code = f"""def main():
    from pathlib import Path
    from rich.console import Console
    console = Console()
    for text in ["first", *["more " * 5000] * 20]:
        {printing}
        print("an error", file=sys.stderr)
    Path({str(file)!r}).write_text("done")
    return 3"""
    status, error = piped(code, "train", merged=merged)
    assert (status, file.read_text()) == (3, "done")
    notes = [line for line in error.splitlines() if line != "an error"]
    assert notes == (
        [] if merged else ["sapo train goes on, but nothing reads its output any more: the pipe is closed."]
    )
    status, error = piped(code, "recipes", merged=merged)
    assert (status, set(error.splitlines())) == (3, set() if merged else {"an error"})


def test_ctrl_c_that_a_library_swallows_ends_the_command_before_its_work(monkeypatch, tmp_path, capsys):
    def watch():  # and it comes at once, within an import that catches everything
        with contextlib.suppress(KeyboardInterrupt):
            interrupt(signal.SIGINT, None)

    monkeypatch.setattr("sapo.text.interrupts.watch", watch)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    monkeypatch.setattr(sys, "argv", ["sapo", "data", "check", str(rows), "--model_name_or_path", "sapo/none"])
    assert run() == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.default_int_handler])
def test_a_program_started_to_ignore_ctrl_c_goes_on_ignoring_it(before):
    kept = signal.signal(signal.SIGINT, before)
    try:
        watch()
        assert signal.getsignal(signal.SIGINT) is (interrupt if before is signal.default_int_handler else before)
        unwatch()
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, kept)


def test_ctrl_c_that_a_library_takes_for_a_missing_package_is_one_line(monkeypatch, capsys):
    def swallowing(given):
        with contextlib.suppress(KeyboardInterrupt):
            interrupt(signal.SIGINT, None)
        raise ImportError("is torch installed?")

    monkeypatch.setattr("sapo.commands.main._dispatch", swallowing)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    # Without Ctrl-C an error stays what it is.
    monkeypatch.setattr("sapo.commands.main._dispatch", lambda given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_ctrl_c_while_the_package_is_imported_is_one_line(monkeypatch, capsys):
    class Importing:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setattr("sapo.text.interrupts.watch", lambda: None)
    monkeypatch.setitem(sys.modules, "sapo.commands.main", Importing())
    assert run() == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert 'sapo = "sapo.__main__:run"' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
