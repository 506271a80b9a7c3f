"""One process at a time in a run folder, with a lock that a killed process cannot leave behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from sis_jax.data.files import parse_json
from sis_jax.types import SisError

# Locks this process holds: path -> [lock, holders]. A second opening in the same process shares the
# lock.
_held: dict[str, list[Any]] = {}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """Holds `path` until `release`, garbage collection or the end of the process.

    The lock is the operating system's; the file only names the holder. On a file system without
    such locks the file itself is the lock. Raises SisError when another process holds it.
    """

    def __init__(self, path: Path):
        self._key = os.path.realpath(path)
        if self._key in _held:
            _held[self._key][1] += 1
        else:
            _held[self._key] = [_acquire(self._key), 1]
        self._finalizer = weakref.finalize(self, _release, self._key, os.getpid())

    @property
    def held(self) -> bool:
        return self._finalizer.alive

    def release(self) -> None:
        self._finalizer()


def _acquire(path: str) -> FileLock | SoftFileLock:
    try:
        lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
        lock.acquire()
    except Timeout:
        raise _busy(path, _owner(path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return _acquire_soft(path)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    with contextlib.suppress(OSError):  # on a full disk the lock holds, without a name
        Path(path).write_text(json.dumps(about), "utf-8")
    return lock


def _acquire_soft(path: str) -> SoftFileLock:
    """Beside the file of the system's lock, whose leftover means nothing here."""
    lock = SoftFileLock(f"{path}.soft", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise _busy(path, {}) from None
    return lock


def _release(key: str, pid: int) -> None:
    if (
        os.getpid() != pid or key not in _held
    ):  # a forked child does not let go of its parent's lock
        return
    _held[key][1] -= 1
    if _held[key][1] == 0:
        lock, _ = _held.pop(key)
        try:
            with contextlib.suppress(OSError):
                os.unlink(key)
        finally:
            lock.release()


def _owner(path: str) -> dict:
    try:
        owner = parse_json(Path(path).read_bytes() or b"{}")
    except (OSError, ValueError):
        owner = {}
    return owner if isinstance(owner, dict) else {}


def _busy(path: str, owner: dict) -> Exception:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'some machine')}"
    return SisError(
        f"{os.path.dirname(path)} is in use by {who}: wait until it is done, or give another --out"
    )
