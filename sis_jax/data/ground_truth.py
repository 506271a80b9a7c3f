"""Photos with true masks, read one at a time: the form in which benchmarks and people's own folders
reach `evaluate`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sis_jax.data.photo_files import _FORMATS, _to_rgb, list_source
from sis_jax.types import SisError, UsageError

MaskValues = Literal["auto", "ids", "grey"]
BINARY = ({"id": 0, "name": "background"}, {"id": 1, "name": "foreground"})
_ASPECT = 0.02  # a photo and its mask may differ in size, not in shape


@dataclass(frozen=True)
class Truth:
    """Photos with masks of class ids, 255 = ignore; iterate over (name, image uint8[h w 3], mask
    uint8[h w]), both of one size.

    classes: {"id", "name"}; id 0 is the background. skipped: (name, reason) of files without a
        partner. note: what a reader should know.
    """

    name: str
    classes: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    load: Callable[[int], tuple[np.ndarray, np.ndarray]] = field(repr=False)
    skipped: tuple[tuple[str, str], ...] = ()
    licence: str = "unknown"
    note: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(
        self, index: int
    ) -> tuple[str, UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
        name = self.names[index]
        image, mask = self.load(index)
        return name, fit_photo(name, image, mask), mask

    def __iter__(
        self,
    ) -> Iterator[tuple[str, UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]]:
        return (self[i] for i in range(len(self)))


def fit_photo(
    name: str, image: UInt8[np.ndarray, "H W 3"], mask: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The photo at the mask's size (Pillow, bilinear): the truth is not resampled. SisError where
    they differ in shape.
    """
    (height, width), (h, w) = image.shape[:2], mask.shape
    if (height, width) == (h, w):
        return image
    if abs(width * h / (height * w) - 1) > _ASPECT:
        raise SisError(
            f"the photo {name} is {width}x{height}, its mask {w}x{h}: they are not of the same "
            "picture"
        )
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))


# ----------------------------------------------------------------------------------------- one file


def read_photo(source: bytes | Path | np.ndarray, name: str = "") -> UInt8[np.ndarray, "h w 3"]:
    """A photo as RGB at its own size, EXIF orientation honoured. SisError, naming it, where it
    cannot be read.
    """
    if isinstance(source, np.ndarray):
        return source
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            picture.load()
            with suppress(OSError, ValueError, TypeError, KeyError, SyntaxError, ArithmeticError):
                picture = ImageOps.exif_transpose(picture)
            return np.array(_to_rgb(picture))
    except Exception as error:  # decoders fail in many ways on damaged files
        raise SisError(
            f"the photo {name or source} cannot be read: {' '.join(str(error).split())[:120]}"
        ) from None


def read_mask(source: bytes | Path | np.ndarray, name: str = "") -> UInt8[np.ndarray, "h w"]:
    """A mask picture as its values: palette index, or grey value. Of several equal channels the
    first counts; colours are refused.
    """
    if isinstance(source, np.ndarray):
        return source
    name = name or str(source)
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            values = np.array(picture.convert("L") if picture.mode == "1" else picture)
    except Exception as error:
        raise SisError(
            f"the mask {name} cannot be read: {' '.join(str(error).split())[:120]}"
        ) from None
    if values.ndim == 3:
        # The last of two or four channels is transparency. JPEG keeps grey only nearly grey.
        colours = values[..., : 3 if values.shape[2] >= 3 else 1].astype(np.int16)
        if np.ptp(colours, axis=2).max(initial=0) > 8:
            raise SisError(
                f"the mask {name} is a colour picture; expected class ids in a palette or grey "
                "PNG, or black and white"
            )
        values = colours[..., 0]
    if values.ndim != 2 or values.min(initial=0) < 0 or values.max(initial=0) > 255:
        raise SisError(
            f"the mask {name} has values up to {values.max()}, expected class ids from 0 to 255"
        )
    return values.astype(np.uint8)


# ----------------------------------------------------------------------------------- paired folders


def open_pairs(
    images: str | Path,
    masks: str | Path | None = None,
    *,
    classes: Sequence[Mapping[str, Any]] | None = None,
    values: MaskValues = "auto",
    grey_from: int = 128,
) -> Truth:
    """Photos and masks that belong together by the stem of their names; or one .npz that holds
    both.

    images: a folder, a .zip, or an .npz (`img_blob`/`img_off`, or `images`). masks: likewise
        (`mask_blob`/`mask_off`, or `masks`); None or the same .npz: the masks in it. classes: names
        of the mask's ids; default: classes.json beside the masks, `labels` of the .npz, or the ids
        found. values: "ids" are class ids, "grey" is foreground from `grey_from` on; "auto" tells
        them apart: palette pictures and small numbers are ids, pictures of 0 and 255 or with soft
        edges are grey.

    Raises UsageError where nothing pairs, naming what is there. Files without a partner are listed
    in `skipped`.
    """
    images, masks = Path(images), Path(images if masks is None else masks)
    if images == masks and images.suffix.lower() != ".npz":
        raise UsageError(
            f"{images} is no .npz that holds photos and masks; give --masks with the folder of "
            "the masks"
        )
    photos, truths = (
        _files(images, ("img", "image", "images")),
        _files(masks, ("mask", "masks", "segmentation")),
    )
    found, skipped = _partners(photos, truths)
    if not found:
        shown = [next(iter(x), "nothing") for x in (photos, truths)]
        raise UsageError(
            f"no photo in {images} has a mask of its name in {masks}: the first are called "
            f"{shown[0]} and {shown[1]}"
        )

    def mask_at(i: int) -> np.ndarray:
        return read_mask(truths[found[i][1]](), found[i][1])

    classes = classes or _named_classes(masks)
    kind, classes = _kind(values, classes, (truths[m] for _, m in found), [m for _, m in found])

    def load(i: int) -> tuple[np.ndarray, np.ndarray]:
        mask = mask_at(i)
        return read_photo(photos[found[i][0]](), found[i][0]), (mask >= grey_from).astype(
            np.uint8
        ) if kind == "grey" else mask

    names = tuple(
        Path(p).with_suffix("").as_posix() if Path(p).suffix.lower() in _SUFFIXES else p
        for p, _ in found
    )
    return Truth(images.stem, tuple(dict(c) for c in classes), names, load, tuple(skipped))


_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jfif"}


def _files(path: Path, blobs: tuple[str, ...]) -> dict[str, Callable[[], bytes | np.ndarray]]:
    """Name -> a function that reads it."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _npz(path, blobs)
    listing = list_source(path)
    if path.is_dir():
        return {n: partial(_bytes_of, path / n) for n in listing.names}
    if suffix == ".zip":
        archive = zipfile.ZipFile(path)
        return {n: partial(archive.read, n) for n in listing.names}
    if path.is_file() and not path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return {path.name: partial(_bytes_of, path)}
    raise UsageError(
        f"{path} cannot be read in any order; unpack it, or give a folder, a .zip or an .npz"
    )


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SisError(f"{path} cannot be read: {error.strerror}") from None


def _npz(path: Path, blobs: tuple[str, ...]) -> dict[str, Callable[[], bytes | np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                k: file[k]
                for k in file.files
                if k in {*blobs, "name", *(f"{b}_{x}" for b in blobs for x in ("blob", "off"))}
            }
            keys = sorted(file.files)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SisError(f"{path} cannot be read as an .npz of plain arrays: {error}") from None
    blob = next((b for b in blobs if f"{b}_blob" in arrays and f"{b}_off" in arrays), None)
    plain = next((b for b in blobs if b in arrays), None)
    if blob is None and plain is None:
        raise UsageError(
            f"{path} holds {', '.join(keys)}; expected `{blobs[0]}_blob` with `{blobs[0]}_off`, "
            f"or `{blobs[-2]}s`"
        )
    if blob is not None:
        data, off = arrays[f"{blob}_blob"], arrays[f"{blob}_off"].astype(np.int64)
        if (
            data.dtype != np.uint8
            or not len(off)
            or (np.diff(off) < 0).any()
            or off[0] < 0
            or off[-1] > len(data)
        ):
            raise SisError(
                f"`{blob}_off` in {path} does not cut `{blob}_blob` ({len(data):,} bytes) into "
                "pictures"
            )
        read: list[Callable[[], bytes | np.ndarray]] = [
            partial(_cut, data, off, i) for i in range(len(off) - 1)
        ]
    else:
        stack = arrays[str(plain)]
        if stack.dtype != np.uint8 or stack.ndim not in (3, 4):
            raise UsageError(
                f"`{plain}` in {path} is {stack.dtype}{list(stack.shape)}, expected uint8[n h w "
                "3] or uint8[n h w]"
            )
        read = [partial(stack.__getitem__, i) for i in range(len(stack))]
    names = [str(n) for n in arrays.get("name", ())]
    if len(set(names)) != len(read):
        names = [f"{i:06d}" for i in range(len(read))]
    return dict(zip(names, read))


def _cut(data: np.ndarray, off: np.ndarray, i: int) -> bytes:
    return data[off[i] : off[i + 1]].tobytes()


def _partners(
    photos: Mapping[str, Any], masks: Mapping[str, Any]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(photo, mask) by path without suffix, or by the bare stem where folders differ; and the rest
    with the reason.
    """
    for key in (_stem, lambda n: _stem(n).rsplit("/", 1)[-1]):
        left, right = {}, {}
        for table, files, kind in ((left, photos, "photos"), (right, masks, "masks")):
            for name in files:
                if key(name) in table:
                    raise UsageError(
                        f"two {kind} have the same name without suffix: {table[key(name)]} and "
                        f"{name}; remove one"
                    )
                table[key(name)] = name
        if left.keys() & right.keys():
            break
    skipped = [(left[k], "no mask of this name") for k in left if k not in right]
    skipped += [(right[k], "no photo of this name") for k in right if k not in left]
    return [(left[k], right[k]) for k in left if k in right], skipped


def _stem(name: str) -> str:
    path = Path(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in _SUFFIXES else path.as_posix()


def _named_classes(masks: Path) -> list[dict[str, Any]] | None:
    """What the masks' ids are called: `labels` of an .npz, classes.json in or above the folder."""
    if masks.suffix.lower() == ".npz":
        with np.load(masks, allow_pickle=False) as file:
            labels = file["labels"] if "labels" in file.files else None
            ids = (
                file["label_ids"]
                if "label_ids" in file.files
                else np.arange(0 if labels is None else len(labels))
            )
        return (
            None
            if labels is None
            else [{"id": int(i), "name": str(n)} for i, n in zip(ids, labels)]
        )
    for file in (
        masks / "classes.json",
        masks.parent / "classes.json",
        masks.parent.parent / "classes.json",
    ):
        if file.is_file():
            try:
                return [
                    {"id": int(c["id"]), "name": str(c["name"])}
                    for c in json.loads(file.read_text("utf-8"))
                ]
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise SisError(
                    f'{file} cannot be read as a list of {{"id", "name"}}: {error}'
                ) from None
    return None


def _kind(
    values: str,
    classes: Sequence[Mapping[str, Any]] | None,
    reads: Iterator[Callable[[], Any]],
    names: Sequence[str],
) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """Whether masks hold ids or grey values, and the classes. Without names every mask is looked
    at: the ids are what occurs.
    """
    if values not in ("auto", "ids", "grey"):
        raise UsageError(f"unknown mask values {values!r}: type 'auto', 'ids' or 'grey'")
    if values == "grey":
        return "grey", BINARY
    if classes:
        return "ids", classes
    found, palette, lossy = np.zeros(256, bool), False, False
    for read, name in zip(reads, names):
        raw = read()
        found |= np.bincount(read_mask(raw, name).ravel(), minlength=256).astype(bool)
        if isinstance(raw, bytes):
            with Image.open(io.BytesIO(raw), formats=_FORMATS) as picture:
                palette, lossy = palette or picture.mode == "P", lossy or picture.format == "JPEG"
    ids = np.flatnonzero(found[:255])
    only_extremes = found[255] and not ids[ids > 0].size
    if values == "auto" and not palette and (lossy or only_extremes or ids.max(initial=0) > 64):
        return "grey", BINARY
    if set(ids) <= {0, 1}:
        return "ids", BINARY
    return "ids", [
        {"id": int(i), "name": "background" if i == 0 else f"class {i}"} for i in sorted({0, *ids})
    ]
