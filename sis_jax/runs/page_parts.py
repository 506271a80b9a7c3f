"""The report's parts: samples with their masks, a table per level, and what the page's script
needs to show one part alone and to write edits.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sis_jax.data import draw
from sis_jax.data.part_edits import fingerprint
from sis_jax.data.part_summary import UNSTABLE, weighted
from sis_jax.runs.page_images import data_uri, jpeg_uri

_SHOWN = 256  # pixels: larger samples are reduced, so that the page stays small


@dataclass(frozen=True)
class Sample:
    """A generated image and its masks, one per level, of at most 256 pixels. seed, confidence: None
    where they are not known.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    masks: tuple[UInt8[np.ndarray, "h w"], ...]
    seed: int | None
    confidence: float | None

    def shown(self) -> dict[str, Any]:
        """What the page shows: the image, the mask and both, as data URIs."""
        mask = self.masks[0]
        return {
            "seed": self.seed,
            "confidence": self.confidence,
            "image": jpeg_uri(self.pixels),
            "mask": data_uri(draw.palette_png(mask), "PNG", optimize=True),
            "overlay": jpeg_uri(draw.overlay(self.pixels, mask)),
        }


@dataclass(frozen=True)
class Level:
    """One level of the parts: its title, its classes and the facts of its clusters. parents: class
    id -> id of the class of the level above that it lies in.
    """

    title: str
    classes: Sequence[Mapping[str, Any]]
    clusters: Sequence[Mapping[str, Any]]
    parents: Mapping[int, int]


def levels_of(found: Mapping[str, Any]) -> list[Level]:
    """The levels in a run's classes.json, the coarse one first; none where it has no classes."""
    classes, clusters = _named(found.get("classes", [])), found.get("clusters", [])
    if not classes and not clusters:
        return []
    finer = found.get("finer")
    if not isinstance(finer, dict):
        return [Level("All parts", classes, clusters, {})]
    owner = {c["id"]: c["class_id"] for c in clusters}
    parents = {c["class_id"]: owner[c["parent"]] for c in finer["clusters"] if c["class_id"]}
    below = _named(finer["classes"])
    return [
        Level(_title("Coarse", classes), classes, clusters, {}),
        Level(_title("Fine", below), below, finer["clusters"], parents),
    ]


def _named(classes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The classes, each with a text as its name, whatever the file holds."""
    return [{**c, "name": str(c.get("name") or f"part {c['id']}")} for c in classes]


def _title(name: str, classes: Sequence[Mapping[str, Any]]) -> str:
    return f"{name}: {sum(c['id'] != 0 for c in classes)} parts"


def samples_of(folder: Path, found: Mapping[str, Any], most: int = 8) -> list[Sample]:
    """Samples of a run's `parts/samples`, those of lowest confidence first."""
    samples, notes = [], found.get("samples", [])
    kinds = ("mask", "finer") if isinstance(found.get("finer"), dict) else ("mask",)
    for number, path in enumerate(sorted(folder.glob("*_image.png"))[:most]):
        paths = [path.with_name(path.name.replace("_image", f"_{kind}")) for kind in kinds]
        if not all(mask.exists() for mask in paths):
            continue
        image = Image.open(path).convert("RGB")
        if max(image.size) > _SHOWN:
            scale = _SHOWN / max(image.size)
            width, height = (max(1, round(scale * edge)) for edge in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        note = notes[number] if number < len(notes) else {}
        masks = tuple(_mask(mask, image.size) for mask in paths)
        samples.append(Sample(np.asarray(image), masks, note.get("seed"), note.get("confidence")))
    known = all(s.confidence is not None for s in samples)
    return sorted(samples, key=lambda s: s.confidence or 0) if known else samples


def _mask(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    return np.asarray(Image.open(path).resize(size, Image.Resampling.NEAREST)).astype(np.uint8)


def script_data(levels: Sequence[Level], samples: Sequence[Sample]) -> dict[str, Any] | None:
    """What page.js reads; None where there is no part. masks: per level and sample the class ids of
    all pixels as [id, count, id, count, ...].
    """
    if not levels:
        return None
    same = [s for s in samples if s.pixels.shape == samples[0].pixels.shape]
    height, width = same[0].pixels.shape[:2] if same else (1, 1)
    return {
        "parts": fingerprint(*(level.classes for level in levels)),
        "colours": draw.palette().tolist(),  # as in the masks on disk, at either level
        "levels": [
            {
                "title": level.title,
                "classes": [
                    {"id": c["id"], "name": c["name"], "parent": level.parents.get(c["id"])}
                    for c in level.classes
                ],
            }
            for level in levels
        ],
        "masks": [[runs(s.masks[i]) for s in same] for i in range(len(levels))],
        "width": width,
        "height": height,
    }


def runs(mask: UInt8[np.ndarray, "h w"]) -> list[int]:
    """[id, count, id, count, ...] of the pixels, row by row."""
    flat = mask.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] + 1))
    counts = np.diff(starts, append=len(flat))
    return np.stack([flat[starts].astype(np.int64), counts], 1).ravel().tolist()


def rows_of(level: Level, number: int, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row per class, those that need a look first: unstable, then unnamed ones."""
    rows = [_row(entry, level, number, samples) for entry in _classes(level)]
    return sorted(rows, key=lambda r: (not r["unstable"], not r["unnamed"], _order(r), r["id"]))


def _order(row: Mapping[str, Any]) -> float:
    known = (v for v in (row["agreement"], row["confidence"]) if v is not None)
    return next(known, 1.0)


def _classes(level: Level) -> list[Mapping[str, Any]]:
    """The classes, and one for clusters that belong to none: the background and ignored pixels."""
    classes = {c["id"]: c for c in level.classes}
    for cluster in level.clusters:
        owner = cluster.get("class_id", cluster["id"])
        if owner not in classes and (owner == 0 or not level.classes):
            classes[owner] = {"id": owner, "name": "background" if owner == 0 else f"part {owner}"}
    return list(classes.values())


def _row(
    entry: Mapping[str, Any], level: Level, number: int, samples: Sequence[Sample]
) -> dict[str, Any]:
    id_ = entry["id"]
    mine = [
        c
        for c in level.clusters
        if c.get("class_id", c["id"]) == id_ or c["id"] in entry.get("clusters", ())
    ]
    agreement = weighted(mine, "agreement")
    return {
        "id": id_,
        "name": entry["name"],
        "colour": id_,
        "clusters": [c["id"] for c in mine],
        "share": sum(c.get("share") or 0 for c in mine) if mine else None,
        "background": id_ == 0 or any(c.get("background") for c in mine),
        "crops": _crops(samples, number, id_),
        "agreement": agreement,
        "confidence": weighted(mine, "confidence"),
        "unstable": agreement is not None and agreement < UNSTABLE,
        "unnamed": bool(entry.get("unsure")) and id_ != 0,
        **{key: entry.get(key) for key in ("score", "margin", "runner_up", "guess")},
    }


def _crops(
    samples: Sequence[Sample], level: int, id_: int, count: int = 4, shown: int = 72
) -> list[str]:
    """Where the class is largest: a square around it, everything else faded."""
    crops = []
    for sample in sorted(samples, key=lambda s: -int((s.masks[level] == id_).sum()))[:count]:
        inside = sample.masks[level] == id_
        if inside.sum() < 4:
            break
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        height, width = inside.shape
        size = min(int(max(rows[-1] - rows[0], columns[-1] - columns[0]) * 1.2) + 3, height, width)
        top = int(np.clip((rows[0] + rows[-1] - size) // 2, 0, height - size))
        left = int(np.clip((columns[0] + columns[-1] - size) // 2, 0, width - size))
        faded = np.where(inside[..., None], sample.pixels, 0.25 * sample.pixels + 0.75 * 235)
        crop = Image.fromarray(faded.astype(np.uint8)[top : top + size, left : left + size])
        crop = crop.resize((shown, shown), Image.Resampling.BICUBIC)
        crops.append(data_uri(crop, "JPEG", quality=85))
    return crops
