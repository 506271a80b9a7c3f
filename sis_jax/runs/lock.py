"""One process at a time in a run folder, with a lock that a killed process cannot leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import weakref
from pathlib import Path

from sis_jax.types import SisError

# Locks this process holds: path -> [file descriptor, holders]. A second opening in the same process
# shares the lock.
_held: dict[str, list[int]] = {}


class FolderLock:
    """Holds `path` from construction to `release`, to garbage collection, or to the end of the
    process, whichever is first.

    The lock is the operating system's (flock), so it ends with its process; the file only names the
    holder for the message. On a file system without such locks the file decides: the lock is taken
    when the process it names is dead. Raises SisError when another process holds it.
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


def _acquire(path: str) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        owner = _owner(fd)
        taken = _flock(fd)
        if taken is None:
            taken = not _alive(owner)
        if not taken:
            os.close(fd)
            raise _busy(path, owner)
        # The holder before us may have removed the file between our opening and locking it: then
        # our lock guards nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                break
        os.close(fd)
    os.ftruncate(fd, 0)
    os.pwrite(
        fd,
        json.dumps(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        ).encode(),
        0,
    )
    return fd


def _release(key: str, pid: int) -> None:
    if (
        os.getpid() != pid or key not in _held
    ):  # a forked child does not let go of its parent's lock
        return
    _held[key][1] -= 1
    if _held[key][1] == 0:
        fd, _ = _held.pop(key)
        with contextlib.suppress(OSError):
            os.unlink(key)
        os.close(fd)


def _flock(fd: int) -> bool | None:
    """True: ours. False: another process has it. None: locks do not exist here."""
    try:
        import fcntl  # late: not on Windows
    except ImportError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _owner(fd: int) -> dict:
    try:
        owner = json.loads(os.pread(fd, 4096, 0) or b"{}")
    except ValueError:
        owner = {}
    return owner if isinstance(owner, dict) else {}


def _alive(owner: dict) -> bool:
    """Whether the process that wrote the file still runs; one on another machine is believed to."""
    if not owner.get("pid"):
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _busy(path: str, owner: dict) -> Exception:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'some machine')}"
    return SisError(
        f"{os.path.dirname(path)} is in use by {who}: wait until it is done, or give another --out"
    )
