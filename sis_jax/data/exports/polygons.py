"""Outlines of a mask as polygons and back, by OpenCV, for formats without run lengths.

Corners are the centres of border pixels, [x, y] in pixels from the image's corner; `fill` takes
the pixels on the lines too, as the readers of YOLO labels do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Polygon = Float[np.ndarray, "_ 2"]  # any number of corners


def polygons(region: Bool[np.ndarray, "h w"], tolerance: float = 0.4) -> list[Polygon]:
    """One polygon per 8-connected piece, at most `tolerance` pixels from its border.

    A hole is joined to its outline by a cut of no width, since one polygon cannot have a hole.
    """
    cv2 = _opencv()
    contours, tree = cv2.findContours(
        region.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
    )
    simple = [cv2.approxPolyDP(c, tolerance, True)[:, 0].astype(np.float64) for c in contours]
    pieces = {i: [] for i in range(len(simple)) if tree[0, i, 3] < 0}
    for hole, parent in enumerate(tree[0, :, 3] if pieces else ()):
        if parent >= 0:
            pieces[int(parent)].append(simple[hole])
    return [_joined(simple[i], holes) + 0.5 for i, holes in pieces.items()]


def fill(shapes: list[Polygon], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """The pixels inside one of the polygons or on its border."""
    inside = np.zeros((height, width), np.uint8)
    for shape in shapes:
        _opencv().fillPoly(inside, [np.floor(shape).astype(np.int32)], 1)
    return inside.astype(bool)


def _joined(outline: Polygon, holes: list[Polygon]) -> Polygon:
    """The border with every hole spliced in where the two are nearest; at least three corners."""
    joined = outline
    for hole in sorted(holes, key=lambda h: _gaps(outline, h).min()):
        gaps = _gaps(joined, hole)
        i, j = np.unravel_index(int(gaps.argmin()), gaps.shape)
        around = np.concatenate([hole[j:], hole[: j + 1]])
        joined = np.concatenate([joined[: i + 1], around, joined[i:]])
    return np.resize(joined, (max(len(joined), 3), 2))


def _gaps(a: Polygon, b: Polygon) -> Float[np.ndarray, "_ _"]:
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def _opencv() -> Any:
    import cv2  # late: large, and only needed here

    return cv2
