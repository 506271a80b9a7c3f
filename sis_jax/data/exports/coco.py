"""COCO export: annotations/instances_<split>.json with run-length masks, images in <split>/.

One annotation per class and image, not per piece. Background and ignore (255) are not covered,
which is all that this format loses. Lists are streamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from sis_jax.data.exports.common import Classes, Splits
from sis_jax.data.exports.items import Item, ahead, image_png
from sis_jax.data.files import plain, utf8


def save(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """Write every split; with `scores`, each annotation carries the mean score of its class."""
    (folder / "annotations").mkdir()
    categories = [
        {"id": c["id"], "name": c["name"], "supercategory": "part"}
        for c in sorted(classes, key=lambda c: c["id"])
        if c["id"]
    ]
    for split, stream in splits.items():
        head = {
            "info": {"description": "masks by sis_jax", "version": "1.0"},
            "licenses": [],
            "categories": categories,
        }
        _save_split(folder, split, stream, head)
    return (
        "One run-length annotation per class and image; background and ignored pixels are in "
        "none, so an ignored pixel reads as background."
    )


def _save_split(folder: Path, split: str, stream: Iterable[Item], head: Mapping[str, Any]) -> None:
    lists = {key: folder / f".{split}.{key}" for key in ("images", "annotations")}
    count = 0
    with (
        open(lists["images"], "w", encoding="utf-8") as images,
        open(lists["annotations"], "w", encoding="utf-8") as found,
    ):
        for number, (item, image) in enumerate(ahead(image_png, stream), 1):
            # Masks alone are annotations of the photos where these are.
            file = item.place if image is None else f"{item.name}.png"
            if image is not None:
                (folder / split).mkdir(exist_ok=True)
                (folder / split / file).write_bytes(image)
            height, width = item.mask.shape
            row = {
                "id": number,
                "file_name": file,
                "width": width,
                "height": height,
                "seed": item.seed,
                "confidence": item.confidence,
            }
            images.write(
                (",\n" if number > 1 else "")
                + json.dumps(plain({k: v for k, v in row.items() if v is not None}))
            )
            for annotation in class_annotations(item):
                count += 1
                found.write(
                    (",\n" if count > 1 else "")
                    + json.dumps({"id": count, "image_id": number, **annotation})
                )
    with open(folder / "annotations" / f"instances_{split}.json", "w", encoding="utf-8") as file:
        file.write(utf8(json.dumps(dict(head), ensure_ascii=False)).decode()[:-1])
        for key, path in lists.items():
            file.write(f', "{key}": [\n')
            with open(path, encoding="utf-8") as part:
                shutil.copyfileobj(part, file)
            file.write("\n]")
            path.unlink()
        file.write("}\n")


def class_annotations(item: Item) -> Iterator[dict[str, Any]]:
    """One COCO annotation per class in the mask, without its ids."""
    for class_id in np.unique(item.mask):
        if class_id in (0, 255):
            continue
        region = item.mask == class_id
        runs: Any = rle.encode(np.asfortranarray(region, np.uint8))
        found: dict[str, Any] = {
            "category_id": int(class_id),
            "iscrowd": 0,
            "area": int(region.sum()),
            "bbox": [float(v) for v in rle.toBbox(runs)],
            "segmentation": {
                "size": [int(v) for v in runs["size"]],
                "counts": runs["counts"].decode("ascii"),
            },
        }
        if item.scores is not None:
            found["score"] = round(float(item.scores[..., class_id][region].mean()), 5)
        yield found
