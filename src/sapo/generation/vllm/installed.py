"""Whether vLLM is on this machine, and whether a server that does not answer could be one that starts."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from sapo.errors import ConfigurationError, is_installed

HOW_TO_INSTALL = 'python -m venv .venv-vllm && .venv-vllm/bin/pip install "vllm>=0.32"'
"""In an environment of its own, in which `sapo serve` looks for it."""

_HERE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")  # noqa: S104 - compared with, not listened on


def find_vllm() -> str | None:
    """An interpreter with vLLM: this one, or that of `.venv-vllm` in the working folder; None if there is neither."""
    if is_installed("vllm"):
        return sys.executable
    beside = Path(".venv-vllm/bin/python")
    return str(beside.absolute()) if beside.is_file() else None


def refuse_absent_servers(urls: Sequence[str]) -> None:
    """Refuse addresses of this machine at which nothing listens and nothing can be starting: there is no vLLM here."""
    if find_vllm() is not None or shutil.which("vllm") is not None:
        return
    for url in urls:
        address = urlsplit(url)
        if address.hostname in _HERE and not _listens(address.hostname, address.port or 80):
            raise ConfigurationError(
                f"generation_backend=vllm_server: no server listens at {url}, and vLLM is not installed here. Run: "
                f"{HOW_TO_INSTALL}, then sapo serve; or set vllm_server_timeout to wait for a server that starts."
            )


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except ConnectionRefusedError:
        return False
    except OSError:
        return True  # an answer that is late or odd is the client's to judge
