"""Files that are whole or not there, values as JSON, and a run's record as it is read."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sis_jax.types import SisError, UsageError

TEMPORARY = ".sis-tmp"


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads` of what anybody may have written: ValueError for all that it does not read."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unique(error: Callable[[str], str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """An `object_pairs_hook` of `parse_json` that refuses a key that an object has twice, of which
    readers silently keep the last: UsageError with the sentence error(key).
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise UsageError(error(key))
        return dict(pairs)

    return checked


def check_folder(path: str | os.PathLike[str]) -> None:
    """UsageError for a file, or for nothing, where the folder of a run is expected."""
    path = Path(path)
    if os.path.isdir(path):
        return
    if os.path.exists(path):
        run = next((place for place in path.parents if (place / "run.json").is_file()), None)
        raise UsageError(
            f"{path} is a file: " + (f"give its folder {run}" if run else "give a run folder")
        )
    try:
        beside = [place.name for place in path.parent.iterdir() if place.is_dir()]
    except OSError:
        beside = []
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside)]
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    raise UsageError(f"there is no folder {path}{hint}")


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The run.json of a folder; raises UsageError when there is none or it is no run.json."""
    file = Path(path) / "run.json"
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        check_folder(path)
        raise UsageError(f"{os.fspath(path)} is not a run folder: it has no run.json") from None
    except (OSError, ValueError):
        raise UsageError(f"{file} cannot be read as a run.json; give another folder") from None
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
        raise UsageError(
            f"{file} was not written by sis_jax: it has no stages; give another folder"
        )
    for name, record in content["stages"].items():
        if not _is_record(record):
            raise UsageError(f"{file} is damaged in the stage {name[:60]!a}: give another folder")
    return content


def command_of(record: Mapping[str, Any]) -> str | None:
    """The command in a stage's record, None unless it is one of ours and nothing beside it: it is
    shown to be typed, and run.json may come from anybody.
    """
    command = record.get("command")
    if not isinstance(command, str) or not command.isprintable():
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    ours = words[:2] == ["python", "-m"] and words[2:] and words[2].split(".")[0] == "sis_jax"
    return command if ours and shlex.join(words) == command else None


def _is_record(record: Any) -> bool:
    """Whether a stage's record has the fields that are read, each of its kind."""
    if not isinstance(record, dict) or not isinstance(record.get("config", {}), dict):
        return False
    files = record.get("files", [])
    return isinstance(files, list) and all(isinstance(file, str) for file in files)


def plain(value: Any) -> Any:
    """`value` as JSON holds it, so that a stored and a new request compare equal."""
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


def json_bytes(value: Any) -> bytes:
    """`plain(value)` as a JSON file: letters as they are, those outside UTF-8 escaped."""
    return utf8(json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def utf8(text: str) -> bytes:
    """Text as UTF-8; bytes that are no text as a backslash and their number, as in JSON."""
    return text.encode("utf-8", "backslashreplace")


class CannotWrite(SisError):
    """A disk that is full, a folder that may not be written."""


def write_atomic(path: Path, data: bytes, durable: bool = False) -> None:
    """Write under a temporary name beside the target, then rename.

    durable: also survive a power cut. Raises CannotWrite for a full or closed disk.
    """
    write_parts(path, [data], durable)


def write_parts(path: Path, parts: Iterable[bytes | memoryview], durable: bool = False) -> str:
    """As `write_atomic`, for parts that come one after another; returns the sha256 of the file."""
    temporary = _beside(path, TEMPORARY)
    digest = hashlib.sha256()
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
                    digest.update(part)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    return digest.hexdigest()


def make_room(path: Path, size: int) -> None:
    """A file of so many bytes, to be mapped; OSError where the disk lacks them: a process that
    writes to a map without room is killed.
    """
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        else:
            file.truncate(size)


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left unfinished below `folder`."""
    for left in folder.rglob(f".*{TEMPORARY}"):
        left.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    """A hidden name of this process beside `path`; a name near the system's limit is cut."""
    name = path.name if len(os.fsencode(path.name)) < 150 else _short(path.name)
    return path.with_name(f".{name}.{os.getpid()}{suffix}")


def _short(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


@contextlib.contextmanager
def replacing(folder: Path, mine: Collection[str] | None = None, last: str = "") -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends without an error.

    mine: names of the files that are replaced; others stay (None: everything goes). last: the file
        that marks it as complete. A kill leaves the old folder or the new one; between two renames
        the old one is called .NAME.*.old, and comes back the next time. Raises CannotWrite.
    """
    folder = folder.resolve()
    new = _beside(folder, f"-{secrets.token_hex(3)}.part")
    with disk_errors(folder):
        _recover(folder, mine)
        try:
            new.mkdir(parents=True)
            yield new
            _swap(new, folder, mine, last)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _recover(folder: Path, mine: Collection[str] | None) -> None:
    """Bring back what a killed process was replacing, and remove what it left unfinished."""
    left = re.compile(re.escape(_beside(folder, "").name.rpartition(".")[0]) + _LEFT)
    for path in list(folder.parent.glob(".*")):
        found = left.fullmatch(path.name)
        if not found or _alive(int(found[1])):
            continue
        if found[2] == "old" and not folder.exists():
            os.replace(path, folder)
        elif found[2] == "old":
            _keep_others(path, folder, mine)
        shutil.rmtree(path, ignore_errors=True)


_LEFT = r"\.(\d+)-[0-9a-f]{6}\.(part|old)"  # process, and which of the two folders


def _alive(process: int) -> bool:
    if os.name == "nt":  # there, asking would stop it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _keep_others(old: Path, folder: Path, mine: Collection[str] | None) -> None:
    """Move files that are not replaced from the old folder to the new one."""
    kept = () if mine is None else [path for path in old.iterdir() if path.name not in mine]
    for path in kept:
        os.replace(path, folder / path.name)


def _swap(new: Path, folder: Path, mine: Collection[str] | None, last: str) -> None:
    if not folder.exists():
        os.replace(new, folder)
        return
    if not any(folder.iterdir()):  # it may be where the user's shell stands, so it is kept
        for path in sorted(new.iterdir(), key=lambda path: path.name == last):
            os.replace(path, folder / path.name)
        return
    old = new.with_suffix(".old")
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    _keep_others(old, folder, mine)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's error about a full or closed disk into one sentence."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        if number in _FULL:
            raise CannotWrite(
                f"the disk is full: {path} was not written; free space and give the same command "
                "again, it resumes"
            ) from error
        if number in _CLOSED:
            raise CannotWrite(
                f"{path} cannot be written ({os.strerror(number)}): give an --out you may write to"
            ) from error
        if not isinstance(error, OSError):
            raise
        raise CannotWrite(
            f"{path} could not be written or read: {error.strerror or error}"
        ) from error


_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def _number_in(text: str) -> int | None:
    """The system's error that a library in another language, such as Orbax's, put into words."""
    return next((n for n in (*_FULL, *_CLOSED) if os.strerror(n) in text), None)
