"""Exports that are files as they lie: PASCAL VOC, Hugging Face `imagefolder`, and one .npz of encoded pictures."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.core import draw
from sis_jax.core.types import UsageError
from sis_jax.data.items import Item, ahead, pngs
from sis_jax.data.run import plain

Splits = Mapping[str, Iterable[Item]]
Classes = Sequence[Mapping[str, Any]]


def with_background(classes: Classes) -> dict[int, str]:
    """Class id -> name in order, the background included."""
    return dict(sorted({0: "background", **{c["id"]: c["name"] for c in classes}}.items()))


# ------------------------------------------------------------------------------------------------------------------------------------- VOC


def save_voc(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """PASCAL VOC: JPEGImages/ (PNG files, nothing is recompressed), SegmentationClass/ (palette PNG), ImageSets/Segmentation/<split>.txt.

    VOC keeps all splits in one folder: with more than one, the split's name leads the file names. labelmap.txt holds name:r,g,b lines.
    """
    for kind in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / kind).mkdir(parents=True)
    for split, stream in splits.items():
        prefix = f"{split}_" if len(splits) > 1 else ""
        with open(folder / "ImageSets" / "Segmentation" / f"{split}.txt", "w", encoding="utf-8") as names:
            for item, (image, mask) in ahead(pngs, stream):
                name = prefix + item.name
                if image is not None:
                    (folder / "JPEGImages" / f"{name}.png").write_bytes(image)
                (folder / "SegmentationClass" / f"{name}.png").write_bytes(mask)
                names.write(name + "\n")
    colours = draw.palette()
    rows = [f"{name}:{','.join(map(str, colours[i]))}::" for i, name in with_background(classes).items()]
    (folder / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *rows]) + "\n", encoding="utf-8")
    return "Pictures are PNG, although the folder is called JPEGImages. Nothing is lost."


# ------------------------------------------------------------------------------------------------------------------------------ Hugging Face


def save_hf(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """Hugging Face `imagefolder`: <split>/images, <split>/masks and metadata.jsonl; `load_dataset(folder)` gives `image` and `mask`."""
    for split, stream in splits.items():
        place = folder / split
        for kind in ("images", "masks"):
            (place / kind).mkdir(parents=True)
        with open(place / "metadata.jsonl", "w", encoding="utf-8") as rows:
            for item, (image, mask) in ahead(pngs, stream):
                need_image(item, "hf")
                file = f"{item.name}.png"
                (place / "images" / file).write_bytes(image or b"")
                (place / "masks" / file).write_bytes(mask)
                row = {"file_name": f"images/{file}", "mask_file_name": f"masks/{file}", "seed": item.seed, "confidence": item.confidence}
                rows.write(json.dumps(plain(row)) + "\n")
    names = [f"  - {json.dumps(name, ensure_ascii=False)}" for name in with_background(classes).values()]
    head = "---\ntask_categories:\n- image-segmentation\nclasses:\n" + "\n".join(names) + "\n---\n\n"
    (folder / "README.md").write_text((card if card.startswith("---\n") else head + card).rstrip() + "\n", encoding="utf-8")
    return "Load it with `datasets.load_dataset(FOLDER)`; a mask pixel is the class id. Nothing is lost."


def need_image(item: Item, kind: str) -> None:
    """Raise UsageError where the format cannot do without the picture."""
    if item.image is None:
        raise UsageError(f"the format {kind} keeps pictures with their masks, and {item.name} has only a mask; use coco, voc, yolo or npz")


# -------------------------------------------------------------------------------------------------------------------------------------- npz


def save_npz(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """One <split>.npz each, read with `allow_pickle=False`: PNG files end to end in `img_blob`, `mask_blob` (uint8), cut by `img_off`,
    `mask_off` (int64[n + 1]); `name`, `labels` (by position), `label_ids`, `seed` (-1 unknown), `confidence` (NaN unknown).
    """
    for split, stream in splits.items():
        _save_npz(split, stream, with_background(classes), folder)
    return "Picture i is `img_blob[img_off[i]:img_off[i + 1]]`, a PNG file; its mask likewise. Nothing is lost."


def _save_npz(split: str, stream: Iterable[Item], labels: Mapping[int, str], folder: Path) -> None:
    """The blobs grow on disk first: an .npz member needs its length ahead of its bytes, and a dataset need not fit into memory."""
    raw = {key: folder / f".{split}.{key}" for key in ("img", "mask")}
    offsets: dict[str, list[int]] = {key: [0] for key in raw}
    rows: list[tuple[str, int, float]] = []
    with open(raw["img"], "wb") as images, open(raw["mask"], "wb") as masks:
        for item, files in ahead(pngs, stream):
            for key, file, data in zip(raw, (images, masks), files):
                file.write(data or b"")
                offsets[key].append(offsets[key][-1] + len(data or b""))
            rows.append((item.name, -1 if item.seed is None else item.seed, np.nan if item.confidence is None else item.confidence))
    names, seeds, sure = zip(*rows) if rows else ((), (), ())
    arrays = {
        "name": np.array(names, str), "labels": np.array(list(labels.values()), str), "label_ids": np.array(list(labels), np.int64),
        "seed": np.array(seeds, np.int64), "confidence": np.array(sure, np.float32),
    }  # fmt: skip
    keys = [key for key in raw if offsets[key][-1]]
    arrays |= {f"{key}_off": np.array(offsets[key], np.int64) for key in keys}
    with zipfile.ZipFile(folder / f"{split}.npz", "w", zipfile.ZIP_STORED) as archive:
        for key in keys:
            with archive.open(f"{key}_blob.npy", "w", force_zip64=True) as member, open(raw[key], "rb") as blob:
                fields = {"descr": "|u1", "fortran_order": False, "shape": (offsets[key][-1],)}
                np.lib.format.write_array_header_1_0(member, fields)
                shutil.copyfileobj(blob, member, 2**20)
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    for path in raw.values():
        path.unlink()
