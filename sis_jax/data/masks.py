"""Masks of photos, the result of `predict`, in memory or in the folder they were written to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sis_jax.data import draw
from sis_jax.data.decode import Unusable, load_image
from sis_jax.data.exports.formats import write
from sis_jax.data.files import json_bytes, write_atomic
from sis_jax.data.names import below, check_parents
from sis_jax.types import SisError, UsageError

CLASSES = "classes.json"


@dataclass(frozen=True)
class Prediction:
    """One photo with its mask of class ids; scores: probability per class id, float[h w c]."""

    name: str
    image: UInt8[np.ndarray, "h w 3"] | None
    mask: UInt8[np.ndarray, "h w"]
    scores: Float[np.ndarray, "h w c"] | None = None


@dataclass(frozen=True)
class Masks(Sequence):
    """Predicted masks, in the order of the photos; `masks[0].mask` is uint8[h w] of class ids.

    classes: as in classes.json. skipped: (name, reason). folder: where they were written.
    """

    classes: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    folder: Path | None = None
    held: tuple[Prediction, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self.held or self.folder is None:
            return self.held[index]
        name = self.names[index]
        path = self.folder / mask_file(name)
        try:
            return Prediction(name, None, np.array(load_image(path)))
        except Unusable as error:
            raise SisError(f"{path} cannot be read ({error}): predict again") from None

    def __iter__(self) -> Iterator[Prediction]:
        return (self[i] for i in range(len(self)))

    def save(
        self,
        folder: str | Path,
        format: str = "png",  # noqa: A002
        overwrite: bool = False,
    ) -> Path:
        """Write the masks as "png" (palette <stem>.png beside classes.json), coco, voc, yolo, hf,
        npz or tfds; returns the folder.
        """
        folder = Path(folder)
        if format != "png":
            return write(
                format, iter(self), self.classes, folder, split="photos", overwrite=overwrite
            )
        for prediction in self:
            write_mask(folder, prediction)
        write_classes(folder, self.classes)
        return folder

    def cutout(self, index: int, image: UInt8[np.ndarray, "h w 3"] | None = None) -> Image.Image:
        """The photo's foreground as RGBA; alpha: probability of the foreground, or 0 and 255."""
        found = self[index]
        photo = found.image if image is None else image
        if photo is None:
            raise UsageError(
                "the photos were not kept with these masks: give the photo as uint8[h w 3]"
            )
        return cutout(photo, found.mask, found.scores)

    def show(self, count: int = 8) -> Image.Image:
        """Photos over their masks over both, 128 pixels high, as one image."""
        shown = [p for p in self[:count] if p.image is not None]
        if not shown:
            raise UsageError(
                "there are no photos to show with these masks; give them in Python, without out="
            )
        small = [_thumbnail(p.image, p.mask) for p in shown]
        return Image.fromarray(
            draw.sample_grid(
                np.stack([i for i, _ in small]),
                np.stack([m for _, m in small]),
                [p.name for p in shown],
            )
        )

    def _repr_png_(self) -> bytes | None:
        return draw.png(self.show()) if self.held and self.held[0].image is not None else None


def mask_file(name: str) -> str:
    """The mask's file name for a photo's name: its stem; folders stay folders."""
    return str(Path(name).with_suffix(".png")) if Path(name).suffix else f"{name}.png"


def mask_path(folder: Path, name: str) -> Path:
    """Where the mask of a photo is written; SisError where that is not below `folder`."""
    path = below(folder, mask_file(name), "a prediction")
    check_parents(folder, path)
    return path


def write_mask(folder: Path, prediction: Prediction) -> Path:
    """Write one palette PNG; returns its path."""
    path = mask_path(folder, prediction.name)
    write_atomic(path, draw.png(draw.palette_png(prediction.mask)))
    return path


def write_classes(folder: Path, classes: Sequence[dict[str, Any]]) -> None:
    """Write classes.json, the names of the masks' values."""
    write_atomic(folder / CLASSES, json_bytes(classes))


def cutout(
    image: UInt8[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "h w"],
    scores: Float[np.ndarray, "h w c"] | None,
) -> Image.Image:
    """The foreground as RGBA."""
    alpha = (
        np.where(mask > 0, 255, 0)
        if scores is None
        else np.round(255 * (1 - np.clip(scores[..., 0], 0, 1)))
    )
    return Image.fromarray(np.dstack([image, alpha.astype(np.uint8)]))


def _thumbnail(
    image: np.ndarray, mask: np.ndarray, size: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """The largest centred square, resized to `size` pixels."""
    h, w = mask.shape
    s = min(h, w)
    box = ((w - s) // 2, (h - s) // 2, (w - s) // 2 + s, (h - s) // 2 + s)
    images = (Image.fromarray(image), Image.fromarray(mask))
    rules = (Image.Resampling.LANCZOS, Image.Resampling.NEAREST)
    photo, ids = (
        np.asarray(p.crop(box).resize((size, size), rule)) for p, rule in zip(images, rules)
    )
    return photo, ids
