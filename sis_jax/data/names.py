"""Names from files (archive members, metadata, indices) as places below a folder, or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from sis_jax.types import SisError

MAX_PART = 255  # bytes of one part of a path, on every common file system
_MAX_PATH = 4095  # bytes, on Linux
_MAX_FLAT = 200  # bytes of a file name made here: prefixes and suffixes are still to come
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?")
# Control characters, and those that some reader of a list takes for the end of a line.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def problem(name: str) -> str:
    """Why `name` is no place below a folder, or ""; both slashes separate parts."""
    parts = re.split(r"[/\\]", name)
    if not name or set(parts) <= {"", "."}:
        return "it has no name"
    if "\0" in name:
        return "its name holds a NUL"
    if not parts[0]:
        return "its name is an absolute path"
    if re.match("[A-Za-z]:", name):
        return "its name starts with a drive"
    if ".." in parts:
        return "its name leads out of the folder"
    if any(_RESERVED.fullmatch(part) for part in parts):
        return "its name is reserved on Windows"
    sizes = [len(os.fsencode(_encodable(part))) for part in parts]
    if max(sizes) > MAX_PART or sum(sizes) + len(sizes) > _MAX_PATH:
        return "its name is longer than a file system allows"
    return ""


def tidy(name: str) -> str:
    """The same place without "." and empty parts: "./a//b.jpg" is "a/b.jpg"."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def below(folder: Path, name: object, whose: str | os.PathLike[str]) -> Path:
    """The path of `name` below `folder`; SisError, naming its file, where it leads elsewhere."""
    why = problem(name) if isinstance(name, str) else "it is no text"
    if why:
        raise SisError(f"{os.fspath(whose)} names the file {str(name)[:80]!a}, refused: {why}")
    return folder / str(name)


def check_parents(folder: Path, path: Path) -> None:
    """SisError where a link inside `folder` would lead a file written at `path` out of it."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise SisError(
            f"{path.parent} is a link that leads out of {folder}: remove it, or give another --out"
        )


def too_long(path: Path) -> str:
    """Why a file system does not take this path, "" where it does."""
    absolute = os.fsencode(os.path.abspath(path))
    if len(absolute) > _MAX_PATH or max(map(len, absolute.split(b"/"))) > MAX_PART:
        return f"its result would have a longer name than a file system allows ({path.name[:40]}…)"
    return ""


def key(name: str) -> str:
    """Equal for names that some file system takes for one (case, accents, dots at the end)."""
    parts = (part.rstrip(". ") or part for part in name.split("/"))
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", "/".join(parts)).casefold())


def twins(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that one file would be written for, None where there are none."""
    seen: dict[str, str] = {}
    for name in names:
        if key(name) in seen:
            return seen[key(name)], name
        seen[key(name)] = name
    return None


def flat(name: str) -> str:
    """One file name for any name: folders joined by "_", which hides no file; bytes that are no
    UTF-8 as %E9.

    A long name is cut and gets a digest; two names may become one, see `twins`.
    """
    joined = name.replace("\\", "/").strip("/").replace("/", "_")
    text = _CONTROL.sub("_", re.sub("[\ud800-\udfff]", _percent, joined))
    text = text[: len(text) - len(text.lstrip(" "))].replace(" ", "_") + text.lstrip(" ")
    text = text.rstrip(" ") + "_" * (len(text) - len(text.rstrip(" ")))
    text = f"_{text[1:]}" if text.startswith(".") else text
    if len(text.encode()) > _MAX_FLAT:
        digest = hashlib.sha256(os.fsencode(_encodable(name))).hexdigest()[:8]
        text = text.encode()[: _MAX_FLAT - 9].decode("utf-8", "ignore") + f"-{digest}"
    return f"_{text}" if _RESERVED.fullmatch(text) else text


def printable(text: str) -> str:
    """Text that every UTF-8 file takes, on one line."""
    return " ".join(_CONTROL.sub(" ", re.sub("[\ud800-\udfff]", _percent, text)).split())


def _percent(match: re.Match) -> str:
    code = ord(match[0])
    return f"%{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"%u{code:04X}"


def _encodable(text: str) -> str:
    """Surrogates that stand for no byte cannot be part of a path; they count as three bytes."""
    return re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
