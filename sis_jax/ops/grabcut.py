"""Masks made to follow their own photo's colours.

A network that learned from one generator makes the same mistake on every photo; the colours of one
photo know nothing of that. GrabCut (Rother, Kolmogorov, Blake 2004) fits colour models to the
likely background and the rest; the guided filter (He, Sun, Tang 2010) moves a boundary to the
nearest edge.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from sis_jax.ops.guided_filter import guided
from sis_jax.types import UsageError


class Bounds(NamedTuple):
    """Probabilities of background: certainly, probably, certainly not."""

    background: float
    likely: float
    foreground: float


LOOSE = Bounds(0.8, 0.4, 0.03)  # leaves the colours much to decide: for judging a network
TIGHT = Bounds(0.8, 0.5, 0.1)  # keeps what the network is sure of: for correcting its labels
_ROUNDS = 4


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


def corrected(
    photo: UInt8[np.ndarray, "h w 3"], background: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """Probability of background: the mean of the prediction, GrabCut's and the guided filter's."""
    cut = 1 - foreground(photo, background, TIGHT).astype(np.float32)
    filtered = guided(photo, np.stack([background, 1 - background], -1), photo)[..., 0]
    return (background + cut + filtered) / 3


def _opencv() -> Any:
    try:
        import cv2  # late: large, and only needed here
    except ImportError:
        raise UsageError(
            "adapting to photos needs OpenCV: pip install opencv-python-headless"
        ) from None
    cv2.setNumThreads(1)  # photos are shared out among threads
    return cv2
