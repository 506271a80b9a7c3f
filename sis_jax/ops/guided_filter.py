"""Class probabilities whose borders follow a photo's edges: the guided filter (He, Sun, Tang, ECCV
2010), its linear model fitted at a low resolution and applied at a higher one (He and Sun 2015).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from sis_jax.ops.enlarge import Box

_RADIUS = 0.05  # of a window, relative to the shorter edge
_SMOOTHNESS = 1e-4  # variance of colours in [0, 1] below which a window counts as even


def guided(
    seen: UInt8[np.ndarray, "h w 3"],
    scores: Float[np.ndarray, "h w k"],
    photo: UInt8[np.ndarray, "r c 3"],
    box: Box | None = None,
) -> Float[np.ndarray, "r c k"]:
    """Probabilities at the resolution of `photo`, from those of `seen`, the same photo at another.

    box: the part of `seen` that is the photo (left, top, right, bottom); None for all of it.
    """
    import cv2  # late: large, and only needed here

    (h, w, k), (rows, columns) = scores.shape, photo.shape[:2]
    half = (w // 2, h // 2)
    small = cv2.resize(seen, half, interpolation=cv2.INTER_AREA)
    reduced = cv2.resize(scores, half, interpolation=cv2.INTER_AREA).reshape(*small.shape[:2], k)
    left, top, right, bottom = box or (0, 0, w, h)
    across, down = columns / (right - left), rows / (bottom - top)
    size, left, top = (round(w * across), round(h * down)), round(left * across), round(top * down)
    colour, found = photo.astype(np.float32) / 255, np.empty((rows, columns, k), np.float32)
    for i, model in enumerate(_linear_models(small, reduced)):
        planes = cv2.resize(model, size)[top : top + rows, left : left + columns]
        found[..., i] = planes[..., 3] + np.einsum("hwc,hwc->hw", planes[..., :3], colour)
    np.clip(found, 0, 1, out=found)
    return found / np.maximum(found.sum(-1, keepdims=True), 1e-6)


def _linear_models(
    image: UInt8[np.ndarray, "h w 3"], scores: Float[np.ndarray, "h w k"]
) -> Float[np.ndarray, "k h w 4"]:
    """Every score as a function of colour, a . colour + b: three a and b.

    Of each window the least-squares a and b (equations 4, 5; with three colours 19, 20), then the
    mean over the windows that hold a pixel (equations 8, 21).
    """
    import cv2  # late: large, and only needed here

    (h, w, k), size = scores.shape, 2 * max(1, round(_RADIUS * min(scores.shape[:2]))) + 1

    def mean(*x: np.ndarray) -> np.ndarray:
        planes = np.concatenate([a.reshape(h, w, -1) for a in x], -1)
        return cv2.blur(planes, (size, size), borderType=cv2.BORDER_REPLICATE)

    colour = image.astype(np.float32) / 255
    squares = colour[..., None] * colour[:, :, None]
    products = colour[..., None] * scores[:, :, None]
    means = np.split(mean(colour, scores, squares, products), np.cumsum((3, k, 9)), -1)
    mean_colour, mean_score = means[:2]
    spread = means[2].reshape(h, w, 3, 3) - mean_colour[..., None] * mean_colour[:, :, None]
    shared = means[3].reshape(h, w, 3, k) - mean_colour[..., None] * mean_score[:, :, None]
    a = _inverse(spread + _SMOOTHNESS * np.eye(3, dtype=np.float32)) @ shared
    b = mean_score - (a * mean_colour[..., None]).sum(-2)
    ab = mean(a, b).reshape(h, w, 4, k)
    return np.ascontiguousarray(ab.transpose(3, 0, 1, 2))


def _inverse(m: Float[np.ndarray, "*n 3 3"]) -> Float[np.ndarray, "*n 3 3"]:
    """Of symmetric matrices, by cofactors: many times faster than LAPACK's, one by one."""
    a, b, c, d, e, f = (m[..., i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)))
    aa, ab, ac = d * f - e * e, c * e - b * f, b * e - c * d
    bb, bc, cc = a * f - c * c, b * c - a * e, a * d - b * b
    cofactors = np.stack([aa, ab, ac, ab, bb, bc, ac, bc, cc], -1)
    return (cofactors / (a * aa + b * ab + c * ac)[..., None]).reshape(m.shape)
