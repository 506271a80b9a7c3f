"""YOLO export: images/<split>, labels/<split>/<name>.txt with one polygon a line, data.yaml.

The loss is measured while writing, by filling every polygon again, and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sis_jax.data.exports.common import Classes, Splits, yaml_text
from sis_jax.data.exports.items import ahead, image_png
from sis_jax.data.exports.polygons import fill, polygons
from sis_jax.ops import metrics

_DIGITS = 6


def save(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """Write every split: `class x1 y1 x2 y2 ...` per piece, over width and height."""
    order = sorted((c for c in classes if c["id"]), key=lambda c: c["id"])
    number = {c["id"]: i for i, c in enumerate(order)}
    counts = np.zeros((256, 256), np.int64)
    for split, stream in splits.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for item, image in ahead(image_png, stream):
            if image is not None:
                (folder / "images" / split / f"{item.name}.png").write_bytes(image)
            lines, drawn = _label(item.mask, number)
            (folder / "labels" / split / f"{item.name}.txt").write_text(
                "".join(lines), encoding="utf-8"
            )
            counts += metrics.confusion(item.mask, drawn, 256)
    # YOLO wants both, and a dataset of one split has only one.
    first = next(iter(splits))
    places = {
        "train": "train" if "train" in splits else first,
        "val": "val" if "val" in splits else first,
    }
    # Without `path`, readers take the folder of this file; a relative one is theirs.
    rows = [*(f"{key}: images/{place}" for key, place in places.items()), "names:"]
    rows += [f"  {i}: {yaml_text(c['name'])}" for i, c in enumerate(order)]
    (folder / "data.yaml").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return _loss(counts, {c["id"]: c["name"] for c in order})


def _label(mask: np.ndarray, number: Mapping[int, int]) -> tuple[list[str], np.ndarray]:
    """The lines of one label file, and the mask a reader gets from them."""
    height, width = mask.shape
    size, lines, drawn = np.array([width, height], np.float64), [], np.zeros_like(mask)
    for class_id in np.unique(mask):
        if class_id not in number:
            continue
        written = []
        for shape in polygons(mask == class_id):
            values = np.round(shape / size, _DIGITS)
            written.append(values * size)
            lines.append(
                f"{number[class_id]} " + " ".join(f"{v:.{_DIGITS}g}" for v in values.ravel()) + "\n"
            )
        drawn[fill(written, height, width)] = class_id
    return lines, drawn


def _loss(counts: np.ndarray, names: Mapping[int, str]) -> str:
    score = {i: float(metrics.iou(counts)[i]) for i in names}
    known = {i: v for i, v in score.items() if v == v}
    if not known:
        return "Lossy format; there was no mask to lose."
    worst = min(known, key=lambda i: known[i])
    return (
        "Lossy: the polygons, filled again, agree with the masks to a mean IoU of "
        f"{np.mean(list(known.values())):.4f} over {len(known)} classes, least for {names[worst]} "
        f"({known[worst]:.4f}); ignored pixels read as background."
    )
