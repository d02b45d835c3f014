"""A live report: a page served on this machine only, rebuilt when the run's files change."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from sapo.errors import ConfigurationError, SapoError, brief
from sapo.report.page import render, report_data, script_json
from sapo.runs.layout import CONFIG_FILE, METRICS_FILE, PAIRS_FILE, RUN_FILE
from sapo.runs.reading import broke_off

HOST = "127.0.0.1"


class LiveReport:
    """The data of a report, reloaded when a file of its runs changes; `version` counts the changes."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = list(runs)
        self._lock = Lock()
        self._seen: list[tuple[object, ...]] | None = None
        self._data: dict[str, Any] = {}
        self._version = 0

    def data(self) -> dict[str, Any]:
        """The current data of the page.

        Raises:
            ConfigurationError: a folder contains no run.
        """
        with self._lock:
            seen = [(*(_stamp(run / name) for name in _FILES), broke_off(run)) for run in self._runs]
            if seen != self._seen:
                self._version += 1
                self._data = report_data(self._runs) | {"version": self._version}
                self._seen = seen
            return self._data


_FILES = (METRICS_FILE, PAIRS_FILE, RUN_FILE, CONFIG_FILE)


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except FileNotFoundError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone away is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(runs: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Create a server of the live page on 127.0.0.1, unreachable from other machines; not yet serving.

    Args:
        runs: run folders.
        port: 0 for any free port.

    Raises:
        ConfigurationError: a folder contains no run, or the port is in use.
    """
    live = LiveReport(runs)
    live.data()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, own = self.connection.getsockname()
            # DNS rebinding: another site's name can resolve to this address, but its Host header still names that site.
            if self.headers.get("Host") not in (f"{HOST}:{own}", f"localhost:{own}"):
                self.send_error(HTTPStatus.FORBIDDEN)
            elif self.path not in ("/", "/data.json"):
                self.send_error(HTTPStatus.NOT_FOUND)
            else:
                self._answer_with_data()

        def _answer_with_data(self) -> None:
            try:
                data = live.data()
            except (SapoError, OSError) as error:
                # The folder was moved, or is being replaced: it may be there again at the next request.
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=brief(error))
                return
            if self.path == "/":
                self._answer("text/html; charset=utf-8", render(data, live=True))
            else:
                self._answer("application/json", script_json(data).encode("utf-8", "replace"))

        def _answer(self, kind: str, body: bytes) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: the terminal belongs to the caller."""

    try:
        return _Server((HOST, port), Handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ConfigurationError(f"port {port} of {HOST} is in use. Choose another with --port.") from error
