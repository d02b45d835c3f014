"""Whether the Hub can be reached, by one short try before libraries retry each file; whether Git LFS has delivered."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sapo.errors import brief

_LFS_POINTER = b"version https://git-lfs"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what a clone without Git LFS has in place of its content.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as content:
        return content.read(len(_LFS_POINTER)) == _LFS_POINTER


@functools.cache
def hub_fault() -> str | None:
    """Why the Hub cannot be asked by this process, in a few words; None if it can.

    The first call sends one request without retries, with the Hub's own timeout (`HF_HUB_ETAG_TIMEOUT`, 10 s); any
    answer will do. Later calls repeat the first one's finding.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        # huggingface_hub's HTTP library depends on its version: errors of requests are OSErrors, of the others not.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        return brief(str(error) or type(error).__name__, 100).rstrip(".")
    return None


@contextmanager
def hub_or_cache(name: str) -> Iterator[None]:
    """Within it, libraries ask the Hub for `name` if it can be reached, and else read its cache on this machine alone.

    Args:
        name: of a model or dataset. Nothing is asked for one that is a local folder.
    """
    from huggingface_hub import constants

    if Path(name).exists() or constants.HF_HUB_OFFLINE or hub_fault() is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
