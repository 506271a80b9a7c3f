"""Photos with true masks, read one at a time: from benchmarks or people's own folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sis_jax.data import names as file_names
from sis_jax.data.decode import Unusable, decode, open_image, read_file
from sis_jax.data.files import parse_json
from sis_jax.data.mask_files import alike, read_shape, turned_like
from sis_jax.data.npz import load_npz, open_images
from sis_jax.data.photo_files import Listing, list_source
from sis_jax.types import SisError, UsageError

MaskValues = Literal["auto", "ids", "grey"]
BINARY = ({"id": 0, "name": "background"}, {"id": 1, "name": "foreground"})


@dataclass(frozen=True)
class GroundTruth:
    """Photos with masks of class ids, 255 = ignore; iterate over (name, image uint8[h w 3], mask
    uint8[h w]).

    classes: {"id", "name"}; id 0 is the background. skipped: (name, reason) of files without a
        partner.
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
    """The photo at the mask's size (bilinear); SisError where they differ in shape."""
    (height, width), (h, w) = image.shape[:2], mask.shape
    if (height, width) == (h, w):
        return image
    if not alike(mask.shape, image.shape[:2]):
        raise SisError(
            f"the photo {name} is {width}x{height}, its mask {w}x{h}: they are not of the same "
            "photo"
        )
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))


# ----------------------------------------------------------------------------------------- one file


def read_photo(source: bytes | Path | np.ndarray, name: str = "") -> UInt8[np.ndarray, "h w 3"]:
    """A photo as RGB, EXIF orientation honoured; SisError where it cannot be read."""
    if isinstance(source, np.ndarray):
        return source
    try:
        return decode(read_file(source) if isinstance(source, Path) else source, None)
    except Unusable as reason:
        raise SisError(f"the photo {name or source} cannot be read: {reason}") from None


# ----------------------------------------------------------------------------------- paired folders


def open_pairs(
    images: str | Path,
    masks: str | Path | None = None,
    *,
    values: MaskValues = "auto",
    grey_from: int = 128,
) -> GroundTruth:
    """Photos and masks that belong together by the stem of their names; or one .npz with both.

    images: a folder, a .zip, or an .npz (`img_blob`/`img_off`, or `images`). masks: likewise
        (`mask_blob`/`mask_off`, or `masks`); None: those in the .npz. Names of the ids: those of
        classes.json beside the masks or of `labels` in the .npz. values: "ids" are class ids,
        "grey" is foreground from `grey_from` on; "auto": palette images and small numbers are ids,
        0 and 255 or soft edges are grey.
    Raises UsageError where nothing pairs; files without a partner are in `skipped`.
    """
    images, masks = Path(images), Path(images if masks is None else masks)
    if images == masks and images.suffix.lower() != ".npz":
        raise UsageError(
            f"{images} is no .npz that holds photos and masks; give --masks with the folder of "
            "the masks"
        )
    (photos, bad_photos) = _files(images, ("img", "image", "images"))
    (labels, bad_masks) = _files(masks, ("mask", "masks", "segmentation", "masks"))
    found, skipped = _partners(photos, labels)
    skipped += [*bad_photos, *bad_masks]
    if not found:
        shown = [next(iter(x), "nothing") for x in (photos, labels)]
        raise UsageError(
            f"no photo in {images} has a mask of its name in {masks}: the first are called "
            f"{shown[0]} and {shown[1]}"
        )

    kind, classes = _kind(
        values, _named_classes(masks), (labels[m] for _, m in found), [m for _, m in found]
    )

    def load(i: int) -> tuple[np.ndarray, np.ndarray]:
        photo, mask = found[i]
        raw = photos[photo]()
        image = read_photo(raw, photo)
        values, in_alpha = read_shape(labels[mask](), mask)
        values = turned_like(values, raw, image.shape[:2])
        if kind == "grey":
            return image, (values >= grey_from).astype(np.uint8)
        return image, _of_alpha(values, classes, mask, grey_from) if in_alpha else values

    names = tuple(
        Path(p).with_suffix("").as_posix() if Path(p).suffix.lower() in _SUFFIXES else p
        for p, _ in found
    )
    return GroundTruth(images.stem, tuple(dict(c) for c in classes), names, load, tuple(skipped))


def _of_alpha(
    alpha: UInt8[np.ndarray, "h w"], classes: Sequence[Mapping[str, Any]], name: str, grey_from: int
) -> UInt8[np.ndarray, "h w"]:
    """Class ids of a shape in the alpha channel; SisError where it could be that of several."""
    ids = [c["id"] for c in classes if c["id"]]
    if len(ids) != 1:
        raise SisError(
            f"the mask {name} has its shape in the alpha channel, which does not show which of "
            f"{len(ids)} classes it is; expected class ids in a palette or grey PNG"
        )
    return np.where(alpha >= grey_from, ids[0], 0).astype(np.uint8)


_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jfif"}


Read = Callable[[], bytes | np.ndarray]


def _files(
    path: Path, blobs: tuple[str, ...]
) -> tuple[dict[str, Read], tuple[tuple[str, str], ...]]:
    """Name -> a function that reads it; and (name, reason) of unreadable files."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _npz(path, blobs), ()
    listing = list_source(path)
    if path.is_dir():
        return {n: partial(_bytes_of, path / n) for n in listing.names}, listing.refused
    if suffix == ".zip" or path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return {n: partial(_member_of, listing, n) for n in listing.names}, listing.refused
    return {path.name: partial(_bytes_of, path)}, listing.refused


def _bytes_of(path: Path) -> bytes:
    try:
        return read_file(path)
    except Unusable as reason:
        raise SisError(f"{path} cannot be read: {reason}") from None


def _member_of(listing: Listing, name: str) -> bytes | np.ndarray:
    raw = next((raw for _, raw in listing.read({name})), Unusable("gone from the archive"))
    if isinstance(raw, Unusable | Path):
        raise SisError(f"{name} in {listing.path} cannot be read: {raw}")
    return raw


def _npz(path: Path, blobs: tuple[str, ...]) -> dict[str, Read]:
    read = open_images(path, blobs)
    given = load_npz(path, {"name"}).get("name")
    names = [str(n) for n in given.ravel()] if given is not None else []
    if len(set(names)) != len(read):
        names = [f"{i:06d}" for i in range(len(read))]
    wrong = next(((n, why) for n in names if (why := file_names.problem(n))), None)
    if wrong is not None:
        raise SisError(f"{path} calls a photo {wrong[0][:80]!a}, refused: {wrong[1]}")
    return dict(zip(names, read))


def _partners(
    photos: Mapping[str, Any], masks: Mapping[str, Any]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(photo, mask) by path without suffix, or by the stem; and the rest with the reason."""
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
    """The names of the masks' ids: `labels` of an .npz, classes.json in or above the folder."""
    if masks.suffix.lower() == ".npz":
        arrays = load_npz(masks, {"labels", "label_ids"})
        labels, ids = arrays.get("labels"), arrays.get("label_ids")
        if labels is None:
            return None
        numbers = range(len(labels)) if ids is None else ids.ravel()
        return [{"id": int(i), "name": str(n)} for i, n in zip(numbers, labels.ravel())]
    for file in (
        masks / "classes.json",
        masks.parent / "classes.json",
        masks.parent.parent / "classes.json",
    ):
        if file.is_file():
            try:
                return [
                    {"id": int(c["id"]), "name": str(c["name"])}
                    for c in parse_json(file.read_text("utf-8"))
                ]
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise SisError(
                    f'{file} cannot be read as a list of {{"id", "name"}}: {error}'
                ) from None
    return None


def _kind(
    kind: str,
    classes: Sequence[Mapping[str, Any]] | None,
    reads: Iterator[Callable[[], Any]],
    names: Sequence[str],
) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """Whether masks hold ids or grey values, and the classes; without names every mask is read."""
    if kind not in ("auto", "ids", "grey"):
        raise UsageError(f"unknown mask values {kind!r}: type 'auto', 'ids' or 'grey'")
    if kind == "grey":
        return "grey", BINARY
    if classes:
        return "ids", classes
    found, palette, lossy, alpha = np.zeros(256, bool), False, False, False
    for read, name in zip(reads, names):
        raw = read()
        values, in_alpha = read_shape(raw, name)
        alpha |= in_alpha
        if not in_alpha:
            found |= np.bincount(values.ravel(), minlength=256).astype(bool)
        if isinstance(raw, bytes):
            image = open_image(raw)
            palette, lossy = palette or image.mode == "P", lossy or image.format == "JPEG"
    ids = np.flatnonzero(found[:255])
    only_extremes = found[255] and not ids[ids > 0].size
    soft = not palette and (lossy or only_extremes or ids.max(initial=0) > 64)
    if alpha and ids[ids > 0].size and not soft:
        raise SisError(
            "some masks have their shape in the alpha channel, others hold class ids up to "
            f"{ids.max()}: save them all in one way"
        )
    if alpha or (kind == "auto" and soft):
        return "grey", BINARY
    if set(ids) <= {0, 1}:
        return "ids", BINARY
    return "ids", [
        {"id": int(i), "name": "background" if i == 0 else f"class {i}"} for i in sorted({0, *ids})
    ]
