"""Files that are whole or not there, values as JSON holds them, and the record of a run as it is
read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sis_jax.types import SisError, UsageError

TEMPORARY = ".sis-tmp"


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The run.json of a folder; raises UsageError when there is none or it is no run.json."""
    file = Path(path) / "run.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{os.fspath(path)} is not a run folder: it has no run.json") from None
    except (NotADirectoryError, ValueError):
        raise UsageError(f"{file} cannot be read as a run.json; give another folder") from None
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
        raise UsageError(
            f"{file} was not written by sis_jax: it has no stages; give another folder"
        )
    return content


def plain(value: Any) -> Any:
    """`value` as JSON holds it, so that what was written and what is asked again compare equal."""
    if isinstance(value, type):
        raise TypeError(f"a class cannot be kept in a JSON file: {value!r}")
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and their scalars, of any library
        return plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be kept in a JSON file: {value!r}")


def write_atomic(path: Path, data: bytes, durable: bool = False) -> None:
    """Write under a temporary name beside the target, then rename: a killed process leaves the old
    file or the new one.

    durable: also survive a power cut. Raises SisError, in one sentence, for a full or closed disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about a full or closed disk into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SisError(
                f"the disk is full: {path} was not written; free space and give the same command "
                "again, it resumes"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise SisError(
                f"{path} cannot be written ({error.strerror}): give an --out you may write to"
            ) from error
        raise SisError(f"{path} could not be written or read: {error.strerror or error}") from error
