"""How published papers measure masks on real photos: input, ground truth, how pixels are summed.

The differences move numbers by whole percents. All `PROTOCOLS` report all scores, each marks its
own as the headline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from sis_jax.ops.resize import resize_plain
from sis_jax.types import UsageError, unknown_name

Fit = Literal["native", "square", "short"]


@dataclass(frozen=True)
class Protocol:
    """One way to measure.

    size, fit: the photo's size for the network: "native", "square" (size x size) or "short"
        (shorter edge). through: a square before that (0: none). scores: how soft masks return to
        the ground truth's size: "logits" (bilinear), "aligned" (corners aligned), "8-bit" (a grey
        image). grey_from: grey values from here on are foreground. binary: foreground is a score
        above one half, not the likeliest class. thresholds, beta2, f_order: of max-F over scores >
        k/255, the first k and one past the last; "mean-max" is the largest mean over images,
        "max-mean" the mean of each image's largest. empty: foreground IoU of an image without
        foreground (NaN: left out). square: benchmarks cut to their centred square. headline: the
        score its papers report.
    """

    name: str
    source: str
    headline: str
    size: int = 0
    fit: Fit = "native"
    through: int = 0
    scores: Literal["logits", "aligned", "8-bit"] = "logits"
    grey_from: int = 128
    binary: bool = False
    thresholds: tuple[int, int] = (0, 255)
    beta2: float = 0.3
    f_order: Literal["mean-max", "max-mean"] = "mean-max"
    empty: float = float("nan")
    square: tuple[str, ...] = ()

    def at(self, size: int | None) -> Protocol:
        """This protocol with photos of another size in pixels: 0 as they are, None as set."""
        if size is None:
            return self
        if size < 0:
            raise UsageError(f"size is a number of pixels, 0 for the photo's own size, got {size}")
        fit: Fit = "native" if size == 0 else "short" if self.fit == "native" else self.fit
        return replace(self, size=size, fit=fit, through=0)

    def photo(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """The photo as the network sees it, by Pillow's bilinear filter."""
        if self.through:
            # The second step of the published protocol does not average, and its result is rounded
            # here to 8 bits.
            squeezed = np.asarray(
                Image.fromarray(image).resize(
                    (self.through, self.through), Image.Resampling.BILINEAR
                )
            )
            return np.round(
                resize_plain(squeezed.astype(np.float32), (self.size, self.size), aligned=True)
            ).astype(np.uint8)
        if self.fit == "native":
            return image
        height, width = (
            (self.size, self.size) if self.fit == "square" else _short(image.shape[:2], self.size)
        )
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    def masks(
        self, scores: Float[np.ndarray, "h w c"], height: int, width: int
    ) -> tuple[UInt8[np.ndarray, "H W"], Float32[np.ndarray, "H W"]]:
        """Scores [h w c] at the ground truth's size: likeliest ids, and the foreground's score."""
        # Log-probabilities are logits up to a constant per pixel, which neither argmax nor softmax
        # sees.
        logits = np.log(np.clip(np.asarray(scores, np.float32), 1e-30, None))
        if scores.shape[:2] != (height, width):
            logits = resize_plain(logits, (height, width), aligned=self.scores == "aligned")
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        soft = 1 - odds[..., 0] / odds.sum(-1)
        if self.scores == "8-bit":
            grey = Image.fromarray(
                np.round(255 * (1 - np.clip(scores[..., 0], 0, 1))).astype(np.uint8)
            )
            soft = (
                np.asarray(grey.resize((width, height), Image.Resampling.BILINEAR), np.float32)
                / 255
            )
        return logits.argmax(-1).astype(np.uint8), soft.astype(np.float32)


_FOREGROUND = "foreground IoU, mean of images"
PROTOCOLS = {
    p.name: p
    for p in (
        Protocol(
            "native",
            "photos and masks as they are, one confusion matrix",
            "mean IoU of foreground and background",
        ),
        Protocol(
            "sis",
            "Segmentation in Style, Pakhomov et al. 2021: 512 then 128 pixels square, one "
            "confusion matrix",
            "mean IoU of foreground and background",
            size=128,
            fit="square",
            through=512,
            scores="aligned",
            grey_from=1,
        ),
        Protocol(
            "l4f",
            "Labels4Free, Abdal et al. 2021: one confusion matrix; only grey value 255 is "
            "foreground",
            "mean IoU of foreground and background",
            grey_from=255,
        ),
        Protocol(
            "voynov",
            "Voynov et al. 2021: shorter edge 128, soft masks as 8-bit images, foreground IoU per "
            "image",
            _FOREGROUND,
            size=128,
            fit="short",
            scores="8-bit",
            binary=True,
        ),
        Protocol(
            "melas",
            "Melas-Kyriazi et al. 2022: shorter edge 128, foreground IoU per image, an empty pair "
            "counts 0",
            _FOREGROUND,
            size=128,
            fit="short",
            binary=True,
            thresholds=(1, 255),
            empty=0.0,
            square=("cub", "flowers"),
        ),
        Protocol(
            "selfmask",
            "Shin et al. 2022, Simeoni et al. 2023: beta squared twice, each image its own "
            "threshold, grey above 0 is foreground",
            _FOREGROUND,
            grey_from=1,
            binary=True,
            beta2=0.09,
            f_order="max-mean",
        ),
    )
}


def get(name: str) -> Protocol:
    """A protocol by name; UsageError names the nearest."""
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def _short(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Height and width with the shorter edge at `size`, the longer rounded down."""
    height, width = shape[:2]
    short = min(height, width)
    return size * height // short, size * width // short


# ---------------------------------------------------------------------------------------- F-measure


def f_curve(
    score: Float[np.ndarray, "h w"],
    gt: Bool[np.ndarray, "h w"],
    keep: Bool[np.ndarray, "h w"],
    beta2: float,
) -> Float32[np.ndarray, "255"]:
    """F-measure of one image for foreground = score > k/255, k = 0..254, on the pixels to `keep`.

    (1 + beta2) P R / (beta2 P + R); an empty prediction has P 1, an empty ground truth R 1, 0/0 is
    0.
    """
    # Scores that are multiples of 1/255 must not slip over their own threshold by rounding.
    level = np.clip(np.ceil(np.round(np.asarray(score, np.float64)[keep] * 255, 4)), 0, 255).astype(
        np.int64
    )
    inside = gt[keep]
    predicted = _at_least(level)
    hits = _at_least(level[inside])
    return f_measure(hits, predicted, int(inside.sum()), beta2).astype(np.float32)


def _at_least(level: np.ndarray) -> np.ndarray:
    """How many levels exceed k, for k = 0..254."""
    counts = np.bincount(level, minlength=256)
    return counts[::-1].cumsum()[::-1][1:].astype(np.float64)


def f_measure(
    hits: Float[np.ndarray, "k"], predicted: Float[np.ndarray, "k"], gt: int | float, beta2: float
) -> Float[np.ndarray, "k"]:
    """F-measure from pixel counts, with the conventions of `f_curve`."""
    precision = np.divide(hits, predicted, out=np.ones_like(hits), where=predicted > 0)
    recall = hits / gt if gt else np.ones_like(hits)
    below = beta2 * precision + recall
    return np.divide(
        (1 + beta2) * precision * recall, below, out=np.zeros_like(hits), where=below > 0
    )
