"""The program `sapo`, also as `python -m sapo`."""

from __future__ import annotations

import os
import sys

_LONG = ("train", "generate")
"""Commands that work for long while they print."""


def run() -> int:
    """Run a command; Ctrl-C is answered in one line from the first import on. Returns the exit status."""
    # The working folder may be a model's: its types.py must not run in the processes that a command starts.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if os.environ.get("RANK", "0") != "0":
        # What torch itself warns of, all processes of a run would say; errors are shown.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A shell may start it with one of these closed (>&-).
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        from sapo.text.interrupts import watch
        from sapo.text.pipes import outlive_readers

        watch()
        command = next(iter(sys.argv[1:]), "")
        gone = f"sapo {command} goes on, but nothing reads its output any more: the pipe is closed."
        outlive_readers(gone if command in _LONG else None)
        from sapo.commands.main import main

        return main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("Interrupted.\n")
        return 130


if __name__ == "__main__":
    sys.exit(run())
