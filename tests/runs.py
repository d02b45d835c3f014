"""What tests of commands and runs look at: the line that a command refuses with, and what a run logged."""

import json
from pathlib import Path

from sapo.commands.main import main


def refused(arguments, capsys, *, status=2):
    """The one line that the command refuses `arguments` with."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == status
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def metrics_of(folder, having=""):
    """What a run logged, oldest first; with `having` the lines that have this metric."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if not having or having in row]
