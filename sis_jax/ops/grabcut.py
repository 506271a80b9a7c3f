"""Masks made to follow their own photo's colours and edges.

A network that learned from one generator makes the same mistake on every photo; the colours of one
photo know nothing of that. GrabCut (Rother, Kolmogorov, Blake 2004) fits colour models to the
likely background and the rest; the guided filter (He, Sun, Tang 2010) moves a boundary to the
nearest edge.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from sis_jax.types import UsageError


class Bounds(NamedTuple):
    """Probabilities of background: certainly, probably, certainly not."""

    background: float
    likely: float
    foreground: float


LOOSE = Bounds(0.8, 0.4, 0.03)  # leaves the colours much to decide: for judging a network
TIGHT = Bounds(0.8, 0.5, 0.1)  # keeps what the network is sure of: for correcting its labels
_ROUNDS = 4
_RADIUS, _SMOOTHNESS = 0.03, 1e-4  # of the shorter edge; variance of colours in [0, 1]


def foreground(
    photo: UInt8[np.ndarray, "h w 3"], background: Float[np.ndarray, "h w"], bounds: Bounds
) -> Bool[np.ndarray, "h w"]:
    """Which pixels are not background, given the probability of background per pixel; the
    prediction itself where there is nothing to compare.
    """
    cv2 = _opencv()
    trimap = np.select(
        [
            background > bounds.background,
            background < bounds.foreground,
            background > bounds.likely,
        ],
        [cv2.GC_BGD, cv2.GC_FGD, cv2.GC_PR_BGD],
        cv2.GC_PR_FGD,
    ).astype(np.uint8)
    cv2.setRNGSeed(0)  # of this thread: its colour models start from a random k-means
    models = np.zeros((1, 65)), np.zeros((1, 65))
    bgr = np.ascontiguousarray(photo[..., ::-1])
    try:
        cv2.grabCut(bgr, trimap, None, *models, _ROUNDS, cv2.GC_INIT_WITH_MASK)
    except cv2.error:
        return background < 0.5
    return (trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)


def guided(
    photo: UInt8[np.ndarray, "h w 3"], mask: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """The soft mask as a locally linear function of the photo's colours, in [0, 1].

    mask = a . colour + b by least squares in every window, averaged (equations 4 to 8, 19 to 21).
    """
    cv2 = _opencv()
    size = 2 * max(1, round(_RADIUS * min(mask.shape))) + 1

    def mean(plane: np.ndarray) -> np.ndarray:
        return cv2.blur(plane, (size, size)).reshape(plane.shape)

    image = photo.astype(np.float32) / 255
    colour, level = mean(image), mean(mask.astype(np.float32))
    shared = mean(image * mask[..., None]) - colour * level[..., None]
    spread = np.stack([mean(image * image[..., c : c + 1]) for c in range(3)], -1)
    spread += _SMOOTHNESS * np.eye(3, dtype=np.float32) - colour[..., None] * colour[..., None, :]
    a = np.linalg.solve(spread, shared[..., None])[..., 0]
    b = level - (a * colour).sum(-1)
    return np.clip((mean(a.astype(np.float32)) * image).sum(-1) + mean(b), 0, 1)


def corrected(
    photo: UInt8[np.ndarray, "h w 3"], background: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """Probability of background: the mean of the prediction, GrabCut's and the guided filter's."""
    cut = 1 - foreground(photo, background, TIGHT).astype(np.float32)
    return (background + cut + guided(photo, background)) / 3


def in_threads(one: Callable[[int], Any], count: int, threads: int) -> list[Any]:
    """one(i) for every i < count, in order; OpenCV itself then keeps to one thread each."""
    _opencv().setNumThreads(1)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(one, range(count)))


def _opencv() -> Any:
    try:
        import cv2  # late: large, and only needed here
    except ImportError:
        raise UsageError(
            "adapting to photos needs OpenCV: pip install opencv-python-headless"
        ) from None
    return cv2
