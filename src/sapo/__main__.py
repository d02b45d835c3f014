"""The program `sapo`, also as `python -m sapo`."""

from __future__ import annotations

import sys


def run() -> int:
    """Run a command; Ctrl-C is answered in one line from the first import on. Returns the exit status."""
    try:
        from sapo.commands.main import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130


if __name__ == "__main__":
    sys.exit(run())
