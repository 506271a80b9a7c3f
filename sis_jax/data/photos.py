"""Real photos as one array uint8[n r r 3], and an endless shuffled stream of batches."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import __version__ as pillow

from sis_jax.data.decode import Crop, Unusable, decode
from sis_jax.data.files import (
    TEMPORARY,
    CannotWrite,
    make_room,
    parse_json,
    write_atomic,
    write_parts,
)
from sis_jax.data.pairs import shuffled
from sis_jax.data.photo_files import (
    Listing,
    Raw,
    left_out,
    list_source,
    nothing_found,
    pixels_of,
    readable,
)
from sis_jax.data.threads import in_threads
from sis_jax.ops.progress import progress
from sis_jax.types import SisError, UsageError

Found = tuple[np.ndarray, tuple[str, ...], tuple[tuple[str, str], ...]]  # images, names, skipped


class Rows:
    """Some images of an array, in a given order, read when asked for: indexing the array itself
    would copy them all, out of a memory map as well.
    """

    def __init__(self, images: UInt8[np.ndarray, "m r r 3"], rows: np.ndarray):
        self._images, self._rows = images, rows
        self.shape, self.dtype, self.ndim = (len(rows), *images.shape[1:]), images.dtype, 4

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        return np.asarray(self._images[(self._rows[first], *rest)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


@dataclass(frozen=True, eq=False)
class Photos:
    """Photos of one size in memory (or memory-mapped), in a fixed order.

    images: uint8[n r r 3], or `Rows` of them. names: paths inside the source. skipped: (name,
        reason). mirror: whether `batches` flips each item with probability 1/2.
    """

    images: UInt8[np.ndarray, "n r r 3"] | Rows
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    source: str = "memory"
    mirror: bool = False

    def __len__(self) -> int:
        return len(self.images)

    @property
    def resolution(self) -> int:
        return self.images.shape[1]

    @classmethod
    def open(
        cls,
        source: str | os.PathLike | Sequence[str | os.PathLike],
        resolution: int,
        *,
        mirror: bool = False,
        rows: slice | None = None,
        crop: Crop = "center",
        min_size: int | None = None,
        cache: str | os.PathLike | None = None,
    ) -> Photos:
        """Read every photo of `source` at `resolution` x `resolution`, in the order of their names.

        source: a folder (searched to the bottom), an image, a .zip, .tar, .tar.gz or .npz
            (`npz.py`), or a list of these. rows: of the sorted photos. crop: "center" cuts the
            largest centred square; "pad" repeats the border up to a square; "none" squeezes.
            min_size: skip photos with a shorter edge below (default resolution // 2). cache: folder
            that keeps the result for the same names, sizes, times and settings.
        EXIF orientation is honoured, transparency put on white, 16-bit grey scaled, CMYK converted.
        Downscaling by an integer averages blocks, otherwise Lanczos; a JPEG more than four times
        too large is first reduced while decoding. Raises UsageError when there is no photo to read,
        SisError when none can be read.
        """
        min_size = resolution // 2 if min_size is None else min_size
        _check_settings(resolution, crop, min_size)
        sources = [source] if isinstance(source, str | os.PathLike) else list(source)
        label = str(sources[0]) if len(sources) == 1 else f"{len(sources)} sources"
        listings = [list_source(Path(s)) for s in sources]
        entries = [(i, name) for i, listing in enumerate(listings) for name in listing.names]
        if not entries:
            raise UsageError(nothing_found(label, listings))
        entries = entries if rows is None else entries[rows]
        if not entries:
            raise UsageError(
                f"rows {rows} of {sum(len(x.names) for x in listings)} photos in {label} leave none"
            )
        place = (
            None
            if cache is None
            else (Path(cache), _cache_key(listings, entries, resolution, crop, min_size))
        )
        found = None if place is None else _read_cache(*place)
        if found is None:

            def shape_up(data: bytes | np.ndarray) -> np.ndarray:
                return decode(data, resolution, crop=crop, min_size=min_size)

            names = [name for _, name in entries]
            found = _decode_all(_jobs(listings, entries), names, shape_up, resolution, place)
        images, names, skipped = found
        skipped += tuple(row for listing in listings for row in listing.refused)
        if not len(images):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
            raise SisError(
                f"none of the {len(skipped)} photos in {label} could be used ({reasons})"
            )
        return cls(images, names, skipped, label, mirror)

    def summary(self) -> str:
        """One line: how many, how large, from where, and the skipped ones."""
        line = f"{len(self):,} photos at {self.resolution}x{self.resolution} from {self.source}" + (
            ", mirrored" if self.mirror else ""
        )
        if not self.skipped:
            return line
        return f"{line}; skipped {len(self.skipped):,}: {left_out(self.skipped)}"

    def batches(
        self, batch: int, seed: int = 0, start_step: int = 0
    ) -> Iterator[UInt8[np.ndarray, "b r r 3"]]:
        """An endless stream of batches; batch t depends on (seed, t) alone, from `start_step` on.

        Each epoch is a fresh permutation; a batch may span epochs.
        """
        if batch < 1 or start_step < 0 or seed < 0:
            raise UsageError(
                f"batches wants batch >= 1, seed >= 0 and start_step >= 0, got {batch}, {seed} "
                f"and {start_step}"
            )
        return self._stream(batch, seed, start_step)

    def _stream(self, batch: int, seed: int, start: int) -> Iterator[np.ndarray]:
        for step, rows in shuffled(len(self), batch, (seed, 0), start):
            images = np.asarray(self.images[rows])
            if self.mirror:
                flip = np.random.default_rng([seed, 1, step]).random(batch) < 0.5
                images[flip] = images[flip, :, ::-1]
            yield images

    def holdout(self, n: int, seed: int = 0) -> tuple[Photos, Photos]:
        """(training photos, n held-out photos): a random split by `seed`, in the original order."""
        if not 0 < n < len(self):
            raise UsageError(
                f"cannot hold out {n} of {len(self)} photos: give a number from 1 to "
                f"{len(self) - 1}"
            )
        held = np.zeros(len(self), bool)
        held[np.random.default_rng([seed, 2]).permutation(len(self))[:n]] = True
        whole = self.images if isinstance(self.images, np.ndarray) else np.asarray(self.images)

        def part(rows: np.ndarray) -> Photos:
            return replace(self, images=Rows(whole, rows), names=tuple(self.names[i] for i in rows))

        return part(np.flatnonzero(~held)), replace(part(np.flatnonzero(held)), skipped=())


def own_side(source: str | os.PathLike) -> int:
    """Median shorter edge in pixels of the first few photos; 0 where none can be read."""
    found = [min(shape) for shape in _first_shapes(source)]
    return int(np.median(found)) if found else 0


def own_aspect(source: str | os.PathLike) -> float:
    """Median of longer to shorter edge of the first few photos; 1 where none can be read."""
    found = [max(shape) / min(shape) for shape in _first_shapes(source)]
    return float(np.median(found)) if found else 1.0


def _first_shapes(source: str | os.PathLike, looked_at: int = 8) -> list[tuple[int, ...]]:
    """[h w] of the first photos that can be read."""
    listing = list_source(Path(source))
    photos = (photo for _, photo in readable(listing, set(listing.names[:looked_at])))
    return [photo.shape[:2] for photo in photos if isinstance(photo, np.ndarray)]


def _check_settings(resolution: int, crop: str, min_size: int) -> None:
    if crop not in ("center", "pad", "none"):
        raise UsageError(f"unknown crop {crop!r}: type 'center', 'pad' or 'none'")
    for name, value, least in (("resolution", resolution, 1), ("min_size", min_size, 0)):
        if value < least:
            raise UsageError(f"{name} is {value}, expected at least {least}")


# -------------------------------------------------------------------------------- decoding them all


def _jobs(
    listings: Sequence[Listing], entries: Sequence[tuple[int, str]]
) -> Iterator[tuple[int, Raw]]:
    """(slot, image) for every entry; the slot is its place in the sorted order."""
    for number, listing in enumerate(listings):
        slots = {name: slot for slot, (owner, name) in enumerate(entries) if owner == number}
        for name, raw in listing.read(set(slots)) if slots else ():
            yield slots[name], raw


def _decode_all(
    jobs: Iterator[tuple[int, Raw]],
    names: Sequence[str],
    shape_up: Callable[[bytes | np.ndarray], np.ndarray],
    resolution: int,
    cache: tuple[Path, str] | None,
) -> Found:
    """(images, names, skipped) in slot order; cache: (folder, key) that stores the array."""
    raw_file = None if cache is None else cache[0] / f".{cache[1]}.{os.getpid()}{TEMPORARY}"
    shape = (len(names), resolution, resolution, 3)
    try:
        if raw_file is None:
            images = np.empty(shape, np.uint8)
        else:
            raw_file.parent.mkdir(parents=True, exist_ok=True)
            make_room(raw_file, math.prod(shape))
            images = np.memmap(raw_file, np.uint8, "r+", shape=shape)
        failed = _fill(images, jobs, shape_up)
        good = [slot for slot in range(len(names)) if slot not in failed]
        for to, slot in enumerate(good):  # close the gaps in place: a copy would double the memory
            if to != slot:
                images[to] = images[slot]
        kept = tuple(names[slot] for slot in good)
        skipped = tuple((names[slot], failed[slot]) for slot in sorted(failed))
        if cache is None or not good:
            return np.asarray(images[: len(good)]), kept, skipped
        _write_cache(*cache, images[: len(good)], kept, skipped)
        return _read_cache(*cache) or (np.array(images[: len(good)]), kept, skipped)
    except (OSError, CannotWrite) as error:
        if cache is None:
            raise
        why = getattr(error, "strerror", None) or error
        raise SisError(
            f"the photos cannot be kept in {cache[0]}: {why}; choose another cache folder"
        ) from None
    finally:
        if raw_file is not None and raw_file.parent.is_dir():
            raw_file.unlink(missing_ok=True)


def _fill(
    images: np.ndarray, jobs: Iterator[tuple[int, Raw]], shape_up: Callable[..., np.ndarray]
) -> dict[int, str]:
    """Decode into `images`; slot -> reason for those that failed."""
    failed = dict.fromkeys(range(len(images)), "was there when listed and is gone now")

    def one(job: tuple[int, Raw]) -> tuple[int, str]:
        slot, raw = job
        try:
            images[slot] = pixels_of(raw, shape_up)
        except Unusable as reason:
            return slot, str(reason)
        return slot, ""

    with warnings.catch_warnings(), progress(len(images), "photos", "photo") as bar:
        # Pillow warns about odd metadata; unusable photos are reported as skipped
        warnings.simplefilter("ignore")
        for slot, why in in_threads(one, jobs):
            failed[slot] = why
            bar.update(1)
    return {slot: why for slot, why in failed.items() if why}


def _cache_key(
    listings: Sequence[Listing], entries: Sequence[tuple[int, str]], *settings: object
) -> str:
    digest = hashlib.sha256(repr((1, pillow, settings)).encode())
    for number, name in entries:
        digest.update(repr((name, listings[number].stamp(name))).encode())
    return digest.hexdigest()[:24]


def _write_cache(
    folder: Path,
    key: str,
    images: np.ndarray,
    names: tuple[str, ...],
    skipped: tuple[tuple[str, str], ...],
) -> None:
    """The array as .npy, then the .json, which marks the pair as complete."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(images))
    write_parts(folder / f"{key}.npy", [head.getvalue(), images.data.cast("B")])
    about = json.dumps({"names": names, "skipped": skipped})
    write_atomic(folder / f"{key}.json", about.encode())


def _read_cache(folder: Path, key: str) -> Found | None:
    try:
        about = parse_json((folder / f"{key}.json").read_text("utf-8"))
        images = np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False)
        return images, tuple(about["names"]), tuple((n, r) for n, r in about["skipped"])
    except (OSError, ValueError, KeyError):
        return None
