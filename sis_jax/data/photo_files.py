"""Where photos come from: one picture decoded to uint8[r r 3], and what lies in a folder, an
archive or an .npz.

`photos.py` puts the two together. Archives are read in memory and never extracted; nothing is
unpickled; no external program is started.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sis_jax.types import SisError, UsageError

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".ppm",
    ".avif",
    ".heic",
    ".heif",
)
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".npz")
MAX_BYTES = (
    256 * 2**20
)  # one encoded picture; an archive member that claims or yields more is refused
MAX_PIXELS = 200_000_000  # one decoded picture
# Pillow's other readers can start Ghostscript or read vector and document formats: a photo is none
# of those.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

Crop = Literal["center", "none"]


# -------------------------------------------------------------------------------------- one picture


class Unusable(Exception):
    """Why one picture is skipped, in a few words."""


def decode(
    data: bytes | UInt8[np.ndarray, "_ _ 3"],
    resolution: int | None,
    *,
    crop: Crop = "center",
    min_size: int = 0,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """One encoded picture (or one array) as uint8[r r 3], or at its own size for resolution None;
    raises `Unusable` with the reason.

    See `Photos.open` for the rules.
    """
    try:
        image = (
            Image.fromarray(data)
            if isinstance(data, np.ndarray)
            else Image.open(io.BytesIO(data), formats=_FORMATS)
        )
        short = min(image.size)
        if short < min_size:
            raise Unusable(f"{image.width}x{image.height} is smaller than {min_size}")
        if image.width * image.height > MAX_PIXELS:
            raise Unusable(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
        if resolution is not None and short > 4 * resolution and image.format in ("JPEG", "MPO"):
            # Decodes fewer DCT coefficients: three times faster for a camera's photo, and still
            # twice as fine as needed.
            image.draft(
                None,
                (2 * resolution * image.width // short, 2 * resolution * image.height // short),
            )
        image.load()
        with suppress(OSError, ValueError, TypeError, KeyError, SyntaxError, ArithmeticError):
            image = ImageOps.exif_transpose(
                image
            )  # a broken EXIF block says nothing about orientation; the pixels are fine
        return (
            np.asarray(_to_rgb(image))
            if resolution is None
            else _fit(_to_rgb(image), resolution, crop)
        )
    except Unusable:
        raise
    except Image.UnidentifiedImageError:
        raise Unusable("not a picture that can be read; save it as JPEG or PNG") from None
    except (
        Exception
    ) as error:  # hostile files break decoders in many ways, and one of them must not end the run
        raise Unusable(" ".join(str(error).split())[:120] or type(error).__name__) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which old files announce as 32-bit
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unusable("32-bit pixels, expected 8 or 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Unusable("floating-point pixels, expected 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _fit(image: Image.Image, resolution: int, crop: str) -> UInt8[np.ndarray, "r r 3"]:
    if crop == "center":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if image.size != (resolution, resolution):
        whole = image.width % resolution == 0 and image.height % resolution == 0
        image = image.resize(
            (resolution, resolution), Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
        )
    return np.asarray(image)


# ------------------------------------------------------------------------------------------ sources

Raw = (
    bytes | np.ndarray | Path | Unusable
)  # an encoded picture, a decoded one, where to read it, or why not


@dataclass(frozen=True)
class Listing:
    """What one source holds.

    names: of the pictures, sorted. others: how often each other extension occurs. stamp: name ->
        what changes with the content.
    read: the wanted names -> (name, picture) in whatever order suits the container."""

    path: Path
    names: tuple[str, ...]
    others: Counter
    stamp: Callable[[str], tuple]
    read: Callable[[set[str]], Iterator[tuple[str, Raw]]]


def list_source(path: Path) -> Listing:
    if path.is_dir():
        return _list_folder(path)
    if not path.exists():
        raise UsageError(f"there is no file or folder {path}")
    name = path.name.lower()
    if name.endswith(".npz"):
        return _list_npz(path)
    if name.endswith(".zip"):
        return _list_zip(path)
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return _list_tar(path)
    if _is_photo(path.name):
        return Listing(
            path,
            (path.name,),
            Counter(),
            lambda _: _file_stamp(path),
            lambda _: iter([(path.name, path)]),
        )
    raise UsageError(
        f"{path} is neither a folder, a picture ({' '.join(EXTENSIONS)}) nor an archive "
        f"({' '.join(ARCHIVES)})"
    )


def _is_photo(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _sort_out(names: Iterable[str]) -> tuple[tuple[str, ...], Counter]:
    """Picture names in order, and the extensions of the rest; hidden files (and the copies macOS
    hides in archives) are no one's photos.
    """
    shown = [
        n
        for n in names
        if not any(
            part.startswith(".") or part == "__MACOSX" for part in n.split("/") if part != ".."
        )
    ]
    photos = sorted(n for n in shown if _is_photo(n))
    return tuple(photos), Counter(
        Path(n).suffix.lower() or "(none)" for n in shown if not _is_photo(n)
    )


def _file_stamp(path: Path) -> tuple:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _list_folder(path: Path) -> Listing:
    found = [
        (Path(folder) / file).relative_to(path).as_posix()
        for folder, _, files in os.walk(path)
        for file in files
    ]
    names, others = _sort_out(found)
    return Listing(
        path,
        names,
        others,
        lambda name: _file_stamp(path / name),
        lambda wanted: ((n, path / n) for n in names if n in wanted),
    )


def too_large(size: int) -> Unusable:
    return Unusable(f"{size / 2**20:,.0f} MB, more than {MAX_BYTES // 2**20} MB")


def _list_zip(path: Path) -> Listing:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename: m for m in archive.infolist() if not m.is_dir()}
    except (zipfile.BadZipFile, OSError) as error:
        raise SisError(f"{path} cannot be read as a zip archive: {error}") from None

    def read(wanted: set[str]) -> Iterator[tuple[str, Raw]]:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                if name not in wanted:
                    continue
                if members[name].file_size > MAX_BYTES:
                    yield name, too_large(members[name].file_size)
                    continue
                try:
                    with archive.open(members[name]) as file:
                        data = file.read(MAX_BYTES + 1)  # the announced size can lie
                    yield name, data if len(data) <= MAX_BYTES else too_large(len(data))
                except Exception as error:  # encrypted, damaged, or packed in an unknown way
                    yield name, Unusable(f"cannot be unpacked: {error}")

    names, others = _sort_out(members)
    stamp = _file_stamp(path)
    return Listing(path, names, others, lambda _: stamp, read)


def _list_tar(path: Path) -> Listing:
    try:
        with tarfile.open(path) as archive:
            sizes = {m.name: m.size for m in archive if m.isfile()}
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise SisError(f"{path} cannot be read as a tar archive: {error}") from None

    def read(wanted: set[str]) -> Iterator[tuple[str, Raw]]:
        with (
            tarfile.open(path) as archive
            # in the archive's own order: going back in a .tar.gz would unpack it again from the
            # start
        ):
            seen = set()
            for member in archive:
                if not member.isfile() or member.name not in wanted or member.name in seen:
                    continue
                seen.add(member.name)
                file = archive.extractfile(member) if member.size <= MAX_BYTES else None
                yield member.name, too_large(member.size) if file is None else file.read()

    names, others = _sort_out(sizes)
    stamp = _file_stamp(path)
    return Listing(path, names, others, lambda _: stamp, read)


def _list_npz(path: Path) -> Listing:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = sorted(arrays.files)
            blobs = [k[:-5] for k in keys if k.endswith("_blob") and f"{k[:-5]}_off" in keys]
            blob = next(
                (k for k in ("img", "image", "images") if k in blobs),
                blobs[0] if len(blobs) == 1 else None,
            )
            index = (
                arrays["images"] if "images" in keys else arrays[f"{blob}_off"] if blob else None
            )
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise SisError(f"{path} cannot be read as an .npz of plain arrays: {error}") from None
    if index is None:
        raise UsageError(
            f"{path} holds {', '.join(keys) or 'nothing'}; "
            "expected `images` uint8[n h w 3], or `img_blob` uint8 with `img_off` int64[n + 1]"
        )
    encoded = "images" not in keys
    if not encoded and (index.dtype != np.uint8 or index.ndim != 4 or index.shape[-1] != 3):
        raise UsageError(
            f"`images` in {path} is {index.dtype}{list(index.shape)}, expected uint8[n h w 3]"
        )
    count = max(len(index) - encoded, 0)
    names = tuple(f"{i:06d}" for i in range(count))

    def read(wanted: set[str]) -> Iterator[tuple[str, Raw]]:
        data = index
        if encoded:
            with np.load(path, allow_pickle=False) as arrays:
                data = arrays[f"{blob}_blob"]
            if (
                data.dtype != np.uint8
                or index.dtype.kind not in "iu"
                or (np.diff(index) < 0).any()
                or index[0] < 0
                or index[-1] > len(data)
            ):
                raise SisError(
                    f"`{blob}_off` in {path} does not cut `{blob}_blob` ({len(data):,} bytes) "
                    "into pictures"
                )
        for i, name in enumerate(names):
            if name in wanted:
                yield name, data[index[i] : index[i + 1]].tobytes() if encoded else data[i]

    stamp = _file_stamp(path)
    return Listing(path, names, Counter(), lambda _: stamp, read)


def readable(listing: Listing, wanted: set[str]) -> Iterator[tuple[str, np.ndarray | str]]:
    """The wanted pictures of a source at their own size, one at a time: (name, uint8[h w 3]), or
    (name, why it cannot be used).
    """
    for name, raw in listing.read(wanted):
        try:
            if isinstance(raw, Unusable):
                raise raw
            if isinstance(raw, Path):
                if raw.stat().st_size > MAX_BYTES:
                    raise too_large(raw.stat().st_size)
                raw = raw.read_bytes()
            yield name, decode(raw, None)
        except Unusable as reason:
            yield name, str(reason)
        except OSError as error:
            yield name, error.strerror or str(error)


def nothing_found(label: str, listings: Sequence[Listing]) -> str:
    others = sum((x.others for x in listings), Counter())
    seen = ", ".join(f"{ext} ({count:,})" for ext, count in others.most_common(6)) or "no files"
    return (
        f"no photos in {label}: looked for {' '.join('*' + e for e in EXTENSIONS)} in every "
        f"folder below, found {seen}"
    )
