"""`sapo report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sapo.errors import ConfigurationError
from sapo.report.page import write_report
from sapo.report.serve import HOST, make_server
from sapo.runs.layout import REPORT_FILE
from sapo.runs.reading import expand_rounds


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"sapo report: {message}.")


def report(arguments: Sequence[str]) -> None:
    """Write the report of run folders, or serve it while they grow.

    Raises:
        ConfigurationError: an unknown option, a folder without a run, a port that is taken.
    """
    parser = _Parser(prog="sapo report", allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run; several are overlaid"
    )
    parser.add_argument("--output", type=Path, help="file to write (default: report.html in the first run's folder)")
    parser.add_argument("--serve", action="store_true", help="show a live page on 127.0.0.1 instead")
    parser.add_argument("--port", type=int, default=8017, help="of the live page (default 8017); 0 for any")
    options = parser.parse_args(list(arguments))
    runs = expand_rounds(options.runs)
    if not options.serve:
        file = options.output or options.runs[0] / REPORT_FILE
        write_report(file, runs)
        sys.stdout.write(f"{file}\n")
        return
    with make_server(runs, options.port) as server:
        sys.stdout.write(f"http://{HOST}:{server.server_address[1]}/ (Ctrl-C ends it)\n")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            sys.stdout.write("\n")
