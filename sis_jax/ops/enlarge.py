"""Class scores at a photo's own size, with NumPy and Pillow: bilinear, and which class is ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom
_PIXELS = 2**20  # of the result at a time


def enlarged(
    scores: Float[np.ndarray, "h w k"], size: tuple[int, int], box: Box | None = None
) -> Float[np.ndarray, "_ _ k"]:
    """Bilinear, channel by channel, to size [rows columns]; of the part `box` alone."""
    h, w = size
    if scores.shape[:2] == size and box is None:
        return np.asarray(scores, np.float32)
    planes = (
        Image.fromarray(np.ascontiguousarray(scores[..., i], np.float32))
        for i in range(scores.shape[-1])
    )
    return np.stack(
        [np.asarray(p.resize((w, h), Image.Resampling.BILINEAR, box)) for p in planes], -1
    )


def winners(
    scores: Float[np.ndarray, "h w k"], size: tuple[int, int], box: Box | None = None
) -> UInt8[np.ndarray, "_ _"]:
    """The channel of the highest of the `enlarged` scores at every pixel.

    Between four scores of which the same channel is the highest, it is the highest everywhere: only
    the pixels between others, along borders, are interpolated. Memory for the result and some
    strips of it, whatever the number of channels.
    """
    left, top, right, bottom = box or (0.0, 0.0, scores.shape[1], scores.shape[0])
    if bottom - top > size[0] or right - left > size[1]:  # reduced: an average of more than four
        return enlarged(scores, size, box).argmax(-1).astype(np.uint8)
    rows = _between(top, bottom, size[0], scores.shape[0])
    columns = _between(left, right, size[1], scores.shape[1])
    best = scores.argmax(-1).astype(np.uint8)
    first = best[:-1, :-1]
    alike = (first == best[1:, :-1]) & (first == best[:-1, 1:]) & (first == best[1:, 1:])
    out = np.empty(size, np.uint8)
    strip = max(1, _PIXELS // size[1])
    for at in range(0, size[0], strip):
        part = tuple(a[at : at + strip] for a in rows)
        out[at : at + strip] = _strip(scores, first, alike, part, columns)
    return out


def _between(start: float, stop: float, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(number of the value before, share of the one after) for `count` pixels from start to stop;
    beyond the outermost values they stay as they are.
    """
    at = start + (np.arange(count) + 0.5) * ((stop - start) / count) - 0.5
    at = np.clip(at, 0, length - 1)
    before = np.minimum(at.astype(np.int32), length - 2)
    return before, (at - before).astype(np.float32)


def _strip(
    scores: np.ndarray, first: np.ndarray, alike: np.ndarray, rows: Any, columns: Any
) -> UInt8[np.ndarray, "s w"]:
    """`winners` of some rows. first, alike: per cell between four scores, the channel of the first
    one, and whether it is that of all four.
    """
    out = first[rows[0]][:, columns[0]]
    y, x = np.nonzero(~alike[rows[0]][:, columns[0]])
    (top, down), (left, along) = ((before[i], share[i, None]) for (before, share), i in (
        (rows, y), (columns, x)
    ))  # fmt: skip
    upper, lower = (
        scores[row, left] * (1 - along) + scores[row, left + 1] * along for row in (top, top + 1)
    )
    out[y, x] = (upper * (1 - down) + lower * down).argmax(-1)
    return out
