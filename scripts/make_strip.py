"""The image strip of the README, from the weights that ship: `python scripts/make_strip.py`.

Rows: the images of the first eight seeds, 0 to 7; their coarse parts; their finer parts; the masks
that the shipped student predicts for the same images. Only generated faces are shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import sis_jax as sis
from sis_jax.data import draw

COUNT = 8
ROWS = ("image", "coarse\nparts", "finer\nparts", "student")
PIXELS = 84  # of one image
MARGIN = 60  # pixels for the labels of the rows


def strip() -> Image.Image:
    """The strip, COUNT columns and four labelled rows of images with a gap between."""
    parts = sis.discover(sis.load_generator())
    faces = parts.samples[:COUNT]
    predicted = sis.load_student("faces-student").predict(list(faces))
    coarse, finer = parts.level(0), parts.level(1)
    masks = [
        coarse.classify(coarse.masks)[:COUNT],
        finer.classify(finer.masks)[:COUNT],
        np.stack([item.mask for item in predicted]),
    ]
    faces = _grown(faces, Image.Resampling.BICUBIC)
    masks = [_grown(mask, Image.Resampling.NEAREST) for mask in masks]
    rows = [faces, *(draw.overlay(faces, mask) for mask in masks)]
    return _labelled(np.concatenate([_row(images) for images in rows]))


def _grown(images: np.ndarray, filter: Image.Resampling) -> np.ndarray:  # noqa: A002
    size = (PIXELS, PIXELS)
    return np.stack([np.asarray(Image.fromarray(a).resize(size, filter)) for a in images])


def _row(images: np.ndarray) -> np.ndarray:
    """uint8[n h w 3] side by side, with white gaps to the right and below."""
    gap = [(0, 0), (0, 4), (0, 4), (0, 0)]
    return np.concatenate(np.pad(images, gap, constant_values=255), axis=1)


def _labelled(rows: np.ndarray) -> Image.Image:
    """The rows, uint8[h w 3], with a label at the left of each."""
    sheet = Image.fromarray(np.pad(rows, [(0, 0), (MARGIN, 0), (0, 0)], constant_values=255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, label in enumerate(ROWS):
        middle = (MARGIN - 8, i * (PIXELS + 4) + PIXELS // 2)
        pen.text(middle, label, fill=(35, 35, 40), font=font, anchor="rm", align="right")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/strip.png"))
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    strip().save(out, optimize=True)
    print(out)


if __name__ == "__main__":
    main()
