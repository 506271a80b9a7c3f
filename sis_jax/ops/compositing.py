"""Cutting a foreground out of one image and putting it on another, in NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import binary_dilation, gaussian_filter, generate_binary_structure

from sis_jax.types import UsageError

# (image, hole) -> the image with the hole filled
Inpainter = Callable[
    [UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]], UInt8[np.ndarray, "h w 3"]
]

LEAST_VOTE = 0.05  # so that a pixel of which nothing is certain still counts
SOLID = 0.02  # alpha below this shows nothing of the foreground
FILLED_AT = 256  # pixels of the longer edge, at most; the time grows with its fourth power


def soft_alpha(
    inside: Bool[np.ndarray, "*n h w"],
    confidence: Float[np.ndarray, "*n h w"],
    width: float | None = None,
) -> Float[np.ndarray, "*n h w"]:
    """How much of each pixel is foreground, 0..1, from a hard mask and its confidence.

    Every pixel votes for its own label with its confidence; votes are averaged over a Gaussian of
    `width` pixels (1/100 of the resolution by default).
    """
    width = inside.shape[-1] / 100 if width is None else width
    votes = np.clip(confidence, 0, 1).astype(np.float32) + LEAST_VOTE
    sigma = (0,) * (inside.ndim - 2) + (width, width)
    alpha = gaussian_filter(votes * inside, sigma, mode="nearest") / gaussian_filter(
        votes, sigma, mode="nearest"
    )
    return np.where(alpha < SOLID, 0, np.where(alpha > 1 - SOLID, 1, alpha)).astype(np.float32)


def hole_of(alpha: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where any foreground shows, grown by 1/64 of the resolution, because edges bleed."""
    grow = max(1, round(alpha.shape[1] / 64))
    return binary_dilation(alpha > 0, generate_binary_structure(2, 2), grow)


def inpaint(
    image: UInt8[np.ndarray, "h w 3"], hole: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with the hole filled by OpenCV (Telea 2004), where it has surroundings; that of a
    large image is filled at `FILLED_AT` pixels and enlarged.
    """
    if not hole.any() or hole.all():
        return image
    try:
        import cv2  # late: large, and only needed here
    except ImportError:
        raise UsageError(
            "completing a background needs OpenCV: pip install opencv-python-headless"
        ) from None
    scale, size = max(hole.shape) / FILLED_AT, hole.shape[::-1]
    if scale > 1:
        fewer = tuple(max(1, round(s / scale)) for s in size)
        small, holes = (
            cv2.resize(a, fewer, interpolation=cv2.INTER_AREA)
            for a in (image, hole.astype(np.float32))
        )
        filled = cv2.resize(inpaint(small, holes > 0), size, interpolation=cv2.INTER_LINEAR)
        return np.where(hole[..., None], filled, image)
    radius = max(3, image.shape[1] // 32)
    return cv2.inpaint(
        np.ascontiguousarray(image), hole.astype(np.uint8), radius, cv2.INPAINT_TELEA
    )


def complete(
    image: UInt8[np.ndarray, "h w 3"], alpha: Float[np.ndarray, "h w"], inpainter: Inpainter | None
) -> UInt8[np.ndarray, "h w 3"]:
    """The background behind a foreground; UsageError where an inpainter returns another size."""
    hole = hole_of(alpha)
    filled = np.asarray((inpainter or inpaint)(image, hole))
    if filled.shape != image.shape or filled.dtype != np.uint8:
        raise UsageError(
            f"the inpainter returned {filled.dtype}{list(filled.shape)}, expected "
            f"uint8{list(image.shape)}"
        )
    return np.where(hole[..., None], filled, image)  # whatever it did outside the hole


def behind(
    image: UInt8[np.ndarray, "h w 3"],
    background: UInt8[np.ndarray, "h w 3"],
    alpha: Float[np.ndarray, "h w"],
    edited_alpha: Float[np.ndarray, "h w"],
) -> Float[np.ndarray, "h w 3"]:
    """The background behind an edited foreground, 0..255: `background` where the old foreground
    was.

    The rim of the old foreground is the image's own while the new one still covers what it belonged
    to; where that was vacated, it would stand there as an outline, so it is completed too.
    """
    rim = max(1.0, alpha.shape[1] / 64)
    vacated = np.where((alpha >= 0.5) & (edited_alpha < 0.5), 1, 0).astype(np.float32)
    near = np.clip(6 * gaussian_filter(vacated, rim), 0, 1)
    share = np.maximum(np.clip(2 * alpha, 0, 1), np.where(hole_of(alpha), near, 0))[..., None]
    return share * background + (1 - share) * image


def foreground_colours(
    image: UInt8[np.ndarray, "h w 3"], alpha: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w 3"]:
    """The foreground's own colours, 0..255: at its soft edge those of its inside nearby."""
    width = alpha.shape[1] / 48
    # Far from any inside, a pixel keeps its own colour
    weight = np.where(alpha > 0.9, 1.0, 1e-4 * alpha).astype(np.float32)
    blurred = (
        gaussian_filter(image * weight[..., None], (width, width, 0))
        / np.maximum(gaussian_filter(weight, width), 1e-8)[..., None]
    )
    edge = (alpha > 0) & (alpha <= 0.9)
    return np.where(edge[..., None], np.clip(blurred, 0, 255), image.astype(np.float32))


def composite(
    image: UInt8[np.ndarray, "h w 3"],
    alpha: Float[np.ndarray, "h w"],
    background: UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"],
) -> UInt8[np.ndarray, "h w 3"]:
    """alpha F + (1 - alpha) B, with F the image's own foreground colours."""
    mixed = (
        alpha[..., None] * foreground_colours(image, alpha) + (1 - alpha[..., None]) * background
    )
    return np.clip(mixed + 0.5, 0, 255).astype(np.uint8)


def psnr(
    a: UInt8[np.ndarray, "*n 3"],
    b: UInt8[np.ndarray, "*n 3"],
    where: Bool[np.ndarray, "*n"] | None = None,
) -> float:
    """Peak signal-to-noise ratio in dB over `where`: inf for equal pixels, NaN for none."""
    difference = np.square(a.astype(np.float64) - b.astype(np.float64))
    difference = difference if where is None else difference[where]
    if not difference.size:
        return float("nan")
    error = difference.mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
