"""A quick teacher of attributes for aligned images: gradients and colours per cell, and kernel
ridge regression.

Few images have attributes, many have none. Histograms of oriented gradients (Dalal & Triggs 2005,
section 6) with the colours of the same cells, and ridge regression in the space of a Gaussian
kernel (Saunders et al. 1998), learn from the few within seconds; a network then learns from what
the teacher says of all. The same regression on the cells of one part tells which part a word is
about (`evidence`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from sis_jax.ops.linear_models import roc_area

CELL, BINS = 4, 12  # pixels, orientations
FOLDS, CHUNK = 5, 500


@jax.jit
def descriptor(images: Float[Array, "n s s 3"]) -> Float[Array, "n c c 18"]:
    """Per cell of 4 x 4 pixels: 12 orientations of the strongest channel's gradient, normalised
    over 3 x 3 cells, colour, and its difference from the mean.

    images: in [-1, 1], sides multiples of 4.
    """
    n, side = images.shape[:2]
    cells = side // CELL
    x = images * 0.5 + 0.5
    edge = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    across, down = edge[:, 1:-1, 2:] - edge[:, 1:-1, :-2], edge[:, 2:, 1:-1] - edge[:, :-2, 1:-1]
    strongest = jnp.argmax(across**2 + down**2, axis=-1)[..., None]
    across, down = (jnp.take_along_axis(g, strongest, -1) for g in (across, down))
    angle = (jnp.arctan2(down, across) % (2 * jnp.pi)) * (BINS / (2 * jnp.pi))
    away = jnp.abs(angle - jnp.arange(BINS))
    share = jnp.maximum(0, 1 - jnp.minimum(away, BINS - away)) * jnp.sqrt(across**2 + down**2)
    histogram = share.reshape(n, cells, CELL, cells, CELL, BINS).sum((2, 4))
    energy = jnp.pad(
        jnp.square(histogram).sum(-1, keepdims=True), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge"
    )
    around = sum(energy[:, i : i + cells, j : j + cells] for i in range(3) for j in range(3))
    colour = x.reshape(n, cells, CELL, cells, CELL, 3).mean((2, 4))
    relative = colour - colour.mean((1, 2), keepdims=True)
    return jnp.concatenate([jnp.sqrt(histogram / (jnp.sqrt(around) + 0.05)), colour, relative], -1)


def described(images: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n c c 18"]:
    """`descriptor` of photos uint8, a few hundred at a time."""
    parts = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
    return np.concatenate(
        [np.asarray(descriptor(jnp.asarray(p, jnp.float32) / 127.5 - 1)) for p in parts]
    )


@dataclass(frozen=True)
class Teacher:
    """What it learned from: descriptors, shifted and scaled, the kernel's width, weights per
    attribute, and their logistic calibration.
    """

    shift: Float[np.ndarray, "f"]
    scale: Float[np.ndarray, "f"]
    known: Float[np.ndarray, "n f"]
    width: float
    weights: Float[np.ndarray, "n a"]
    offset: Float[np.ndarray, "a"]
    slope: Float[np.ndarray, "a"]
    bias: Float[np.ndarray, "a"]

    def __call__(self, images: UInt8[np.ndarray, "m s s 3"]) -> Float[np.ndarray, "m a"]:
        """Probability of each attribute for each image."""
        told = []
        for i in range(0, len(images), CHUNK):
            x = described(images[i : i + CHUNK])
            x = (x.reshape(len(x), -1) - self.shift) / self.scale
            told.append(np.asarray(_kernel(x, self.known, self.width)) @ self.weights + self.offset)
        score = np.concatenate(told)
        return (1 / (1 + np.exp(-np.clip(self.slope * score + self.bias, -30, 30)))).astype(
            np.float32
        )


def fit(
    images: UInt8[np.ndarray, "n s s 3"], attributes: Bool[np.ndarray, "n a"], ridge: float = 1.0
) -> Teacher:
    """Learn from images and their mirrored copies; the calibration is that of predictions for
    images which were left out (five folds).
    """
    both = np.concatenate([described(images), described(images[:, :, ::-1])]).reshape(
        2 * len(images), -1
    )
    shift, scale = both.mean(0), both.std(0) + 1e-3
    known = (both - shift) / scale
    squares = jnp.asarray(np.square(known).mean(1))
    width = float(
        jnp.median(
            squares[:, None]
            + squares[None]
            - 2 * (jnp.asarray(known) @ jnp.asarray(known).T) / known.shape[1]
        )
    )
    kernel = np.asarray(_kernel(known, known, width))
    target = np.concatenate([attributes, attributes]).astype(np.float32)
    offset = target.mean(0)
    fold = np.tile(np.arange(len(images)) % FOLDS, 2)
    left_out = np.zeros_like(target)
    for i in range(FOLDS):
        learn, hold = fold != i, fold == i
        left_out[hold] = (
            kernel[np.ix_(hold, learn)]
            @ _solve(kernel[np.ix_(learn, learn)], target[learn] - offset, ridge)
            + offset
        )
    slope, bias = calibration(left_out, target)
    return Teacher(
        shift, scale, known, width, _solve(kernel, target - offset, ridge), offset, slope, bias
    )


@partial(jax.jit, static_argnames="width")
def _kernel(a: Float[Array, "n f"], b: Float[Array, "m f"], width: float) -> Float[Array, "n m"]:
    a, b = jnp.asarray(a), jnp.asarray(b)
    away = jnp.square(a).mean(1)[:, None] + jnp.square(b).mean(1)[None] - 2 * (a @ b.T) / a.shape[1]
    return jnp.exp(-away / width)


def _solve(kernel: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    return np.linalg.solve(kernel + ridge * np.eye(len(kernel), dtype=kernel.dtype), target).astype(
        np.float32
    )


def calibration(
    scores: Float[np.ndarray, "n a"], truth: Float[np.ndarray, "n a"], steps: int = 30
) -> tuple[Float[np.ndarray, "a"], Float[np.ndarray, "a"]]:
    """(slope, bias) per column of the logistic regression of the truth on a score (Platt 1999), by
    damped Newton steps.
    """
    spread = scores.std(0) + 1e-6
    x = np.stack([(scores - scores.mean(0)) / spread, np.ones_like(scores)], -1).astype(np.float64)
    w = np.zeros((scores.shape[1], 2))
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(np.einsum("nai,ai->na", x, w), -30, 30)))
        slope = np.einsum("na,nai->ai", p - truth, x) / len(x) + 1e-3 * w
        curve = np.einsum("na,nai,naj->aij", p * (1 - p), x, x) / len(x) + 1e-3 * np.eye(2)
        w -= np.linalg.solve(curve, slope[..., None])[..., 0]
    return (w[:, 0] / spread).astype(np.float32), (
        w[:, 1] - w[:, 0] * scores.mean(0) / spread
    ).astype(np.float32)


def evidence(
    images: UInt8[np.ndarray, "n s s 3"],
    attributes: Bool[np.ndarray, "n a"],
    where: Float[np.ndarray, "k s s"],
    ridge: float = 1.0,
) -> Float[np.ndarray, "a k"]:
    """How well the cells of each part alone tell each attribute: area under the ROC curve on the
    last quarter of the images, learned from the others.

    where: how often each pixel of an (aligned) image belongs to each part, 0..1. A part is taken
        to lie in the cells that it fills most.
    """
    x = described(images)[..., :-3]  # colours against the image's mean tell of other parts, too
    n, cells = x.shape[:2]
    x = (x - x.mean(0)) / (x.std(0) + 1e-3)
    learn = n * 3 // 4
    target = attributes.astype(np.float32)
    found = []
    for share in where.reshape(len(where), cells, CELL, cells, CELL).mean((2, 4)):
        inside = x[:, share > 0.5 * share.max()].reshape(n, -1)
        kernel = np.asarray(_kernel(inside, inside[:learn], 2.0))
        score = kernel[learn:] @ _solve(
            kernel[:learn], target[:learn] - target[:learn].mean(0), ridge
        )
        found.append(
            [roc_area(score[:, j], attributes[learn:, j]) for j in range(attributes.shape[1])]
        )
    return np.asarray(found, np.float32).T
