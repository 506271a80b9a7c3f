"""Where photos come from: the files in a folder, an archive or an .npz.

Archives are read in memory and never extracted; nothing is unpickled. A name in an archive is one
only where it could be a file below a folder (`names.py`).
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sis_jax.data import names as file_names
from sis_jax.data.decode import MAX_BYTES, Unusable, because, decode, read_file, too_large
from sis_jax.data.npz import open_images
from sis_jax.types import SisError, UsageError

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm",
    ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# Photos to their owner, which nothing here decodes: each is named, never passed over.
_NOT_READ = (
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".dng", ".cr2", ".cr3",
    ".nef", ".arw", ".orf", ".rw2", ".raf", ".psd", ".tga", ".exr", ".hdr", ".dcm", ".svg", ".eps",
)  # fmt: skip
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".npz")
_LOOKED_AT = 10_000  # files of a folder that may be no folder of photos at all
_MAX_LINKS = 40  # one after another, as on Linux
_LINKS_AND_DEVICES = (
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
)  # fmt: skip
_MAX_FACTS, _FREE_MEMBERS = 2**20, 10**6
_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, OSError, EOFError, ValueError, OverflowError,
    NotImplementedError,
)  # fmt: skip

# ------------------------------------------------------------------------------------------ sources

# An encoded image, a decoded one, where to read it, or why not
Raw = bytes | np.ndarray | Path | Unusable


@dataclass(frozen=True)
class Listing:
    """The contents of one source. names: of the images, sorted, paths below a folder.

    others: counts of other extensions. stamp: name -> a value that changes with the content.
        refused: (name, reason). read: the wanted names -> (name, image) in the container's order.
    """

    path: Path
    names: tuple[str, ...]
    others: Counter
    stamp: Callable[[str], tuple]
    read: Callable[[set[str]], Iterator[tuple[str, Raw]]]
    refused: tuple[tuple[str, str], ...] = ()


def list_source(path: Path) -> Listing:
    if path.is_dir():
        return _list_folder(path)
    if not path.exists():
        if path.parts[:1] in (("http:",), ("https:",)):
            address = str(path).replace(":/", "://", 1)  # a path holds one slash of two
            raise UsageError(f"{address} is an address: download the file, and give its path")
        raise UsageError(f"there is no file or folder {path}")
    name = path.name.lower()
    if name.endswith(".npz"):
        return _list_npz(path)
    if name.endswith(".zip"):
        return _list_zip(path)
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return _list_tar(path)
    if name.endswith((*EXTENSIONS, *_NOT_READ)):
        names, others, refused = _sort_out([path.name])
        return Listing(
            path,
            names,
            others,
            lambda _: _file_stamp(path),
            lambda wanted: iter([(n, path) for n in names if n in wanted]),
            refused,
        )
    raise UsageError(
        f"{path} is neither a folder, an image ({' '.join(EXTENSIONS)}) nor an archive "
        f"({' '.join(ARCHIVES)})"
    )


def holds_photos(path: Path) -> bool:
    """Whether a folder (by its first files) or an archive holds photos, or a file is one."""
    if path.is_dir():
        names = (name for _, _, found in os.walk(path) for name in found if not _hidden(name))
        return any(map(_is_photo, islice(names, _LOOKED_AT)))
    if path.name.lower().endswith(ARCHIVES):
        try:
            return bool(list_source(path).names)
        except SisError:  # a checkpoint of that name, perhaps
            return False
    return _is_photo(path.name)


def _is_photo(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _hidden(name: str) -> bool:
    """Hidden files, and the copies macOS hides in archives, are no one's photos."""
    return any(
        part.startswith(".") or part == "__MACOSX" for part in name.split("/") if part != ".."
    )


def _sort_out(
    names: Iterable[str], refused: Iterable[tuple[str, str]] = ()
) -> tuple[tuple[str, ...], Counter, tuple[tuple[str, str], ...]]:
    """Image names in order, the extensions of the rest, and the unreadable ones."""
    photos, others = [], Counter()
    known = [(name, why) for name, why in refused if not _hidden(name)]
    for name in names:
        if _hidden(name):
            continue
        if _is_photo(name):
            photos.append(name)
        elif name.lower().endswith(_NOT_READ):
            known.append((name, "not a kind of image that is read here; save it as JPEG or PNG"))
        else:
            others[Path(name).suffix.lower() or "(none)"] += 1
    return tuple(sorted(photos)), others, tuple(sorted(known))


def _file_stamp(path: Path) -> tuple:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


# ------------------------------------------------------------------------------------------ folders


def _list_folder(path: Path) -> Listing:
    names, others, refused = _sort_out(*_walk(path))
    return Listing(
        path,
        names,
        others,
        lambda name: _file_stamp(path / name),
        lambda wanted: ((n, path / n) for n in names if n in wanted),
        refused,
    )


def _walk(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Every file below a folder once, and unreadable folders; linked folders come last."""
    found: list[str] = []
    refused: list[tuple[str, str]] = []
    above, seen = {_identity(parent) for parent in root.resolve().parents}, set()
    real, linked = deque([root]), deque()
    while real or linked:
        folder = real.popleft() if real else linked.popleft()
        name = folder.relative_to(root).as_posix()
        try:
            identity = _identity(folder)
            if identity in above:
                refused.append((name, "a link to a folder above"))
            if identity in seen | above:
                continue
            seen.add(identity)
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                path = folder / entry.name
                kind = _kind_of(entry)
                if kind == "folder":
                    real.append(path)
                elif kind == "link":
                    linked.append(path)
                elif kind == "file" or _is_photo(entry.name):
                    found.append(path.relative_to(root).as_posix())
                else:
                    refused.append((path.relative_to(root).as_posix(), kind))
        except OSError as error:
            refused.append((name, f"cannot be opened: {error.strerror or error}"))
    return found, refused


def _identity(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_dev, about.st_ino


def _kind_of(entry: os.DirEntry) -> str:
    """ "folder", "link" to one, "file", or why it is none of these."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        mode = entry.stat().st_mode
    except OSError as error:
        return "a link to nothing" if entry.is_symlink() else str(error.strerror or error)
    return "link" if stat.S_ISDIR(mode) else "file"


# ----------------------------------------------------------------------------------------- archives


def _members(pairs: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Name -> member of those whose name is a place below a folder; and the rest."""
    found: dict[str, Any] = {}
    refused: list[tuple[str, str]] = []
    for given, member in pairs:
        name, why = _member_name(given)
        if not why and name in found:
            why = "another photo in the archive has this name"
        if not why:
            found[name] = member
        elif name.lower().endswith((*EXTENSIONS, *_NOT_READ)):
            refused.append((name, why))
    return found, refused


def _member_name(given: str) -> tuple[str, str]:
    """A member's name with forward slashes, and why it is none."""
    why = file_names.problem(given)
    return (given if why else file_names.tidy(given.replace("\\", "/"))), why


def _list_zip(path: Path) -> Listing:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [(m.filename, m) for m in archive.infolist() if m.filename[-1:] != "/"]
    except _DAMAGED as error:
        raise SisError(f"{path} cannot be read as a zip archive: {because(error)}") from None
    members, refused = _members(infos)
    names, others, refused = _sort_out(members, refused)

    def read(wanted: set[str]) -> Iterator[tuple[str, Raw]]:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                if name in wanted:
                    yield name, _unpacked(archive, members[name])

    stamp = _file_stamp(path)
    return Listing(path, names, others, lambda _: stamp, read, refused)


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes | Unusable:
    if member.file_size > MAX_BYTES:
        return too_large(member.file_size)
    try:
        with archive.open(member) as file:
            data = file.read(MAX_BYTES + 1)  # the announced size can be wrong
    except Exception as error:  # encrypted, damaged, or packed in an unknown way
        return Unusable(f"cannot be unpacked: {because(error)}")
    return data if len(data) <= MAX_BYTES else too_large(len(data))


class _Member(tarfile.TarInfo):
    """A member of a tar archive; a block before it, which Python reads whole, is a few facts."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        plain = member.isfile() or member.isdir() or member.type in _LINKS_AND_DEVICES
        if member.type == tarfile.GNUTYPE_SPARSE:  # a list of pieces, which has no end of its own
            raise tarfile.ReadError(f"{member.name[:40]!a} is stored in pieces")
        if not plain and member.size > _MAX_FACTS:
            raise tarfile.ReadError(f"{member.name[:40]!a} is described in {member.size:,} bytes")
        return member


def _in_tar(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members: a small file can unpack to more of them than fit into memory."""
    most = _FREE_MEMBERS + path.stat().st_size // 64
    for number, member in enumerate(archive):
        if number >= most:
            raise tarfile.ReadError(f"it has more than {most:,} members")
        yield member


def _list_tar(path: Path) -> Listing:
    try:
        with tarfile.open(path, tarinfo=_Member) as archive:
            members = ((m.name, m) for m in _in_tar(archive, path) if not m.isdir())
            members, refused = _members(members)
    except _DAMAGED as error:
        raise SisError(f"{path} cannot be read as a tar archive: {because(error)}") from None
    real, left_out = _real_members(members)
    names, others, refused = _sort_out(real, [*refused, *left_out])

    def read(wanted: set[str]) -> Iterator[tuple[str, Raw]]:
        owners: dict[str, list[str]] = {}
        for name in names:
            if name in wanted:
                owners.setdefault(real[name], []).append(name)
        with (
            tarfile.open(path, tarinfo=_Member) as archive
            # in the archive's own order: going back in a .tar.gz would unpack it again from the
            # start
        ):
            for member in archive:
                name, why = _member_name(member.name)
                if why or not member.isfile() or name not in owners:
                    continue
                file = archive.extractfile(member) if member.size <= MAX_BYTES else None
                data = too_large(member.size) if file is None else file.read()
                yield from ((owner, data) for owner in owners.pop(name))

    stamp = _file_stamp(path)
    return Listing(path, names, others, lambda _: stamp, read, refused)


def _real_members(
    members: Mapping[str, tarfile.TarInfo],
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Name -> the member with the bytes, links followed inside the archive; and the others."""
    folders = {parent.as_posix() for name in members for parent in Path(name).parents}
    real: dict[str, str] = {}
    refused: list[tuple[str, str]] = []
    for name in members:
        at = name
        for _ in range(_MAX_LINKS):
            member = members.get(at)
            if member is None or not (member.islnk() or member.issym()):
                break
            start = posixpath.dirname(at) if member.issym() else ""
            at = posixpath.normpath(posixpath.join(start, member.linkname))
        member = members.get(at)
        if member is not None and member.isfile():
            real[name] = at
        elif at not in folders:
            link = members[name].islnk() or members[name].issym()
            why = "a link to nothing in the archive" if link else "not a plain file"
            refused.append((name, why))
    return real, refused


def _list_npz(path: Path) -> Listing:
    images = open_images(path, ("img", "image", "images"), lone=True)
    table = {f"{i:06d}": read for i, read in enumerate(images)}

    def read(wanted: set[str]) -> Iterator[tuple[str, Raw]]:
        for name, image in table.items():
            if name in wanted:
                pixels = image()
                if isinstance(pixels, np.ndarray) and (pixels.ndim, pixels.shape[-1]) != (3, 3):
                    pixels = Unusable(f"{list(pixels.shape)}, expected [h w 3]")
                yield name, pixels

    stamp = _file_stamp(path)
    return Listing(path, tuple(table), Counter(), lambda _: stamp, read)


def pixels_of(raw: Raw, decoded: Callable[[bytes | np.ndarray], np.ndarray]) -> np.ndarray:
    """The result of `decoded` for an image, wherever it is; raises `Unusable` with the reason."""
    if isinstance(raw, Unusable):
        raise raw
    return decoded(read_file(raw) if isinstance(raw, Path) else raw)


def readable(listing: Listing, wanted: set[str]) -> Iterator[tuple[str, np.ndarray | str]]:
    """The wanted images of a source at their own size, one at a time: (name, uint8[h w 3]), or
    (name, why it cannot be used).
    """
    for name, read in unread(listing, wanted):
        try:
            yield name, read()
        except Unusable as reason:
            yield name, str(reason)


def unread(
    listing: Listing, wanted: set[str]
) -> Iterator[tuple[str, Callable[[], UInt8[np.ndarray, "h w 3"]]]]:
    """The wanted images of a source as (name, function that decodes it at its own size, or raises
    `Unusable`), so that several can be decoded at a time.
    """
    for name, raw in listing.read(wanted):
        yield name, partial(pixels_of, raw, _whole)


def _whole(data: bytes | np.ndarray) -> np.ndarray:
    return decode(data, None)


def nothing_found(label: str, listings: Sequence[Listing]) -> str:
    others = sum((x.others for x in listings), Counter())
    seen = ", ".join(f"{ext} ({count:,})" for ext, count in others.most_common(6)) or "no files"
    refused = [row for x in listings for row in x.refused]
    seen = f"{seen}; left out {len(refused)}: {left_out(refused)}" if refused else seen
    return (
        f"no photos in {label}: looked for {' '.join('*' + e for e in EXTENSIONS)} in every "
        f"folder below, found {seen}"
    )


def left_out(rows: Sequence[tuple[str, str]]) -> str:
    """The first few skipped ones, for a sentence."""
    shown = ", ".join(f"{name} ({reason})" for name, reason in rows[:3])
    return shown + (", ..." if len(rows) > 3 else "")
