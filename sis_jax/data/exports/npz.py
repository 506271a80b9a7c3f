"""One .npz of encoded images per split."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from sis_jax.data.exports.common import Classes, Splits, with_background
from sis_jax.data.exports.items import Item, ahead, pngs


def save(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """One <split>.npz each, read with `allow_pickle=False`: PNG files end to end in `img_blob`,
    `mask_blob` (uint8), cut by `img_off`, `mask_off` (int64[n + 1]); `name`, `labels` (by
    position), `label_ids`, `seed` (-1 unknown), `confidence` (NaN unknown).
    """
    for split, stream in splits.items():
        _save_split(split, stream, with_background(classes), folder)
    return (
        "Image i is `img_blob[img_off[i]:img_off[i + 1]]`, a PNG file; its mask likewise. "
        "Nothing is lost."
    )


def _save_split(
    split: str, stream: Iterable[Item], labels: Mapping[int, str], folder: Path
) -> None:
    """The blobs grow on disk first: an .npz member needs its length ahead of its bytes."""
    raw = {key: folder / f".{split}.{key}" for key in ("img", "mask")}
    offsets: dict[str, list[int]] = {key: [0] for key in raw}
    rows: list[tuple[str, int, float]] = []
    with open(raw["img"], "wb") as images, open(raw["mask"], "wb") as masks:
        for item, files in ahead(pngs, stream):
            for key, file, data in zip(raw, (images, masks), files):
                file.write(data or b"")
                offsets[key].append(offsets[key][-1] + len(data or b""))
            rows.append(
                (
                    item.name,
                    -1 if item.seed is None else item.seed,
                    np.nan if item.confidence is None else item.confidence,
                )
            )
    names, seeds, confidence = zip(*rows) if rows else ((), (), ())
    arrays = {
        "name": np.array(names, str), "labels": np.array(list(labels.values()), str),
        "label_ids": np.array(list(labels), np.int64), "seed": np.array(seeds, np.int64),
        "confidence": np.array(confidence, np.float32),
    }  # fmt: skip
    keys = [key for key in raw if offsets[key][-1]]
    arrays |= {f"{key}_off": np.array(offsets[key], np.int64) for key in keys}
    with zipfile.ZipFile(folder / f"{split}.npz", "w", zipfile.ZIP_STORED) as archive:
        for key in keys:
            with (
                archive.open(f"{key}_blob.npy", "w", force_zip64=True) as member,
                open(raw[key], "rb") as blob,
            ):
                fields = {"descr": "|u1", "fortran_order": False, "shape": (offsets[key][-1],)}
                np.lib.format.write_array_header_1_0(member, fields)
                shutil.copyfileobj(blob, member, 2**20)
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    for path in raw.values():
        path.unlink()
