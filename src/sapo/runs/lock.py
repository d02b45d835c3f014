"""One process a run folder: a lock that says whose it is, and that a dead owner does not keep."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import psutil
from transformers.utils import logging

from sapo.errors import ConfigurationError
from sapo.runs.layout import CONFIG_FILE, LOCK_FILE

logger = logging.get_logger(__name__)

_BEAT = 30.0
"""Seconds between two signs of life, for hosts that cannot ask the kernel of the owner."""
_DEAD = 10 * _BEAT
"""Seconds without a sign of life after which an owner on another host counts as dead."""

_held: dict[Path, Lock] = {}


class Lock:
    """The lock of a folder, held by this process.

    The kernel releases it when the process ends, however it ends, on this host and, over most network file systems, on
    others. Where it does not reach, the time of the file tells: the owner renews it twice a minute.
    """

    def __init__(self, folder: Path, stream: IO[str]) -> None:
        self._file = folder / LOCK_FILE
        self._stream = stream
        self._ended = threading.Event()
        self.owner: dict[str, Any] = {}
        self.holders = 0
        """Uses of the lock in this process, one within another; the last one releases it."""
        try:
            self.owner = _write_owner(stream)
            threading.Thread(target=self._beat, name="sapo-lock", daemon=True).start()
        except BaseException:
            # A full disk, or Ctrl-C just now.
            self.release()
            raise

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            # A network that is away for a moment must not end the run.
            with suppress(OSError):
                os.utime(self._stream.fileno())

    def is_there(self) -> bool:
        """Whether the lock file names this process, and no other one that has taken the folder over."""
        try:
            with self._file.open(encoding="utf-8") as stream:
                return _owner(stream) in ({}, self.owner)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # a network that is away for a moment

    def release(self) -> None:
        """Remove the lock file, then let go: in this order nobody finds a file that is about to vanish."""
        self._ended.set()
        if self.is_there():
            self._file.unlink(missing_ok=True)
        with suppress(OSError):
            # What a full disk has refused is written again, in vain.
            self._stream.close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is made; within one process it may be taken again."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _held.get(folder)
    if lock is None:
        lock = _held[folder] = Lock(folder, _take(folder))
    lock.holders += 1
    try:
        yield
    finally:
        lock.holders -= 1
        if not lock.holders:
            del _held[folder]
            lock.release()


def check_unlocked(folder: Path) -> None:
    """Refuse a folder, which need not exist, whose lock another process holds, before anything is loaded."""
    file = folder / LOCK_FILE
    if folder.absolute() in _held or not file.is_file():
        return
    with _opened(file, "r+") as stream:
        if not _lock(stream) or _other_host_alive(stream):
            raise _in_use(folder, stream)


def owner_of(folder: Path) -> dict[str, Any]:
    """What the lock of a folder says of its owner; empty if there is none."""
    try:
        with (folder / LOCK_FILE).open(encoding="utf-8") as stream:
            return _owner(stream)
    except OSError:
        return {}


def is_lost(folder: Path) -> bool:
    """Whether a folder whose lock this process holds was moved or removed, or has another owner now."""
    lock = _held.get(folder.absolute())
    if lock is None:
        return False
    # The lock alone may have been removed by hand.
    return not lock.is_there() and ((folder / LOCK_FILE).exists() or not (folder / CONFIG_FILE).is_file())


def _take(folder: Path) -> IO[str]:
    """Open and lock the lock file, over that of a dead owner if there is one."""
    file = folder / LOCK_FILE
    while True:
        stream = _opened(file, "a+")
        taken = _lock(stream)
        # Its last owner may have removed the file between these two lines: then nobody else would see this lock.
        with suppress(FileNotFoundError):
            if not taken or os.path.samestat(os.stat(file), os.fstat(stream.fileno())):
                break
        stream.close()
    if not taken or _other_host_alive(stream):
        error = _in_use(folder, stream)
        stream.close()
        raise error
    owner = _owner(stream)
    if owner and _is_alive(owner):
        logger.warning(f"{folder}: its lock names {_described(owner)}, which does not hold it: this folder is a copy.")
    elif owner:
        logger.warning(f"{folder}: broke the lock of {_described(owner)}, which has ended without removing it.")
    return stream


def _opened(file: Path, mode: str) -> IO[str]:
    """Open the lock file; that of another user is refused."""
    try:
        return file.open(mode, encoding="utf-8")
    except PermissionError as error:
        raise ConfigurationError(
            f"{file.parent} holds the lock of another user, whose run may be alive ({file}). Choose another folder."
        ) from error


def _lock(stream: IO[str]) -> bool:
    """Whether no process that the kernel knows holds the file."""
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: the owner's sign of life decides, whatever its host.
        return not _owner(stream) or _age(stream) > _DEAD
    return True


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process is there, on this host."""
    process = owner.get("process")
    return owner.get("host") == socket.gethostname() and isinstance(process, int) and bool(psutil.pid_exists(process))


def _other_host_alive(stream: IO[str]) -> bool:
    owner = _owner(stream)
    return bool(owner) and owner.get("host") != socket.gethostname() and _age(stream) <= _DEAD


def _age(stream: IO[str]) -> float:
    return time.time() - os.fstat(stream.fileno()).st_mtime


def _owner(stream: IO[str]) -> dict[str, Any]:
    stream.seek(0)
    try:
        found = json.loads(stream.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write_owner(stream: IO[str]) -> dict[str, Any]:
    stream.seek(0)
    stream.truncate()
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    stream.write(json.dumps(owner))
    stream.flush()
    return owner


def _described(owner: dict[str, Any]) -> str:
    return f"process {owner.get('process')} on {owner.get('host')} (since {owner.get('since')})"


def _in_use(folder: Path, stream: IO[str]) -> ConfigurationError:
    owner = _owner(stream)
    elsewhere = owner.get("host") not in (None, socket.gethostname())
    gone = f", or remove {folder / LOCK_FILE} if that process is gone" if elsewhere else ""
    return ConfigurationError(
        f"{folder} is in use by {_described(owner) if owner else 'another process'}. Wait for it or stop it{gone}; or "
        "choose another folder."
    )
