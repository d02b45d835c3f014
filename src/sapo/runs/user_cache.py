"""The user's cache: what several runs share, and can be made again."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "SAPO_CACHE_DIR"


def user_cache(part: str) -> Path:
    """The folder of `part`: in `$SAPO_CACHE_DIR`; without it in `sapo` in `$XDG_CACHE_HOME` or `~/.cache`."""
    named = os.environ.get(CACHE_VARIABLE)
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(named) if named else Path(general, "sapo")).expanduser() / part
