"""`sapo report RUN [RUN ...]`."""

from __future__ import annotations

import sys

from sapo.commands.parser import Parsed
from sapo.report.page import write_report
from sapo.report.serve import HOST, make_server
from sapo.runs.layout import REPORT_FILE
from sapo.runs.reading import expand_rounds


def run_report(given: Parsed) -> None:
    """Write the report of run folders, or serve it while they grow.

    Raises:
        ConfigurationError: a folder without a run, a port that is taken.
    """
    options = given.own
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
