"""Labels that follow the image: mean-field inference in a windowed conditional random field.

Krähenbühl and Koltun 2011 (arXiv 1210.5644) with one bilateral kernel and the Potts model, in
windows as in Teichmann and Cipolla 2018 (arXiv 1805.04777). From q = softmax(evidence): q_i =
softmax(evidence_i + w sum_j k_ij q_j / sum_j k_ij), k_ij = exp(-|colour_i - colour_j|^2 / 2 s^2 -
|place_i - place_j|^2 / 2 t^2).
Images of more than 127 pixels are averaged down to 64 to 127 for it, and the neighbours' evidence
is enlarged again: an image and its enlargement are treated alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sis_jax.ops.resize import resize_bilinear

SMALLEST = 64  # pixels at least, of the image that the window moves over
RADIUS = 3
PLACE = 0.75 * RADIUS  # standard deviation t, in pixels
COLOUR = 0.2  # standard deviation s, of colours in [-1, 1]
WEIGHT = 4.0  # w, in nats
STEPS = 3
_VALUES = 2**22  # at a time, of kernels and probabilities
_NEAR = range(-RADIUS, RADIUS + 1)
_OFFSETS = np.array([(y, x) for y in _NEAR for x in _NEAR if 0 < y * y + x * x <= RADIUS * RADIUS])


def best(
    evidence: Float[Array, "b h w k"], image: Float[Array, "b h2 w2 3"]
) -> tuple[UInt8[Array, "b h w"], Float[Array, "b h w"]]:
    """The likeliest class of every pixel, and by how many nats it is likelier than the next.

    evidence: log-likelihoods up to a constant per pixel. image: in [-1, 1]; as large as the
        evidence, or smaller where that has more than 127 pixels along a side.
    """
    b, h, w, k = evidence.shape
    h, w = _window_size(h, w)
    # A damaged pixel stays one: NaN would spread over its neighbours
    evidence = jnp.nan_to_num(evidence)
    most = max(1, _VALUES // (h * w * (len(_OFFSETS) + 3 * k)))
    together = max(d for d in range(1, b + 1) if b % d == 0 and d <= most) if b else 1

    def one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = posterior(*pair)
        labels, first, second = largest_two(logits)
        return labels.astype(jnp.uint8), first - second

    return jax.lax.map(one, (evidence, image), batch_size=together)


def largest_two(
    x: Float[Array, "*n k"],
) -> tuple[Int[Array, "*n"], Float[Array, "*n"], Float[Array, "*n"]]:
    """(place of the largest along the last axis, its value, that of the next)."""
    place = jnp.argmax(x, axis=-1)
    first, second = jax.lax.platform_dependent(x, place, cpu=_sorted_two, default=_masked_two)
    return place, first, second


def _sorted_two(x: Array, _: Array) -> tuple[Array, Array]:
    two = jax.lax.top_k(x, 2)[0]
    return two[..., 0], two[..., 1]


def _masked_two(x: Array, place: Array) -> tuple[Array, Array]:
    """Accelerators sort all classes for the two."""
    others = jnp.where(jnp.arange(x.shape[-1]) == place[..., None], -jnp.inf, x)
    return x.max(-1), others.max(-1)


def _window_size(height: int, width: int) -> tuple[int, int]:
    """Size at which neighbours are compared."""
    factor = max(1, max(height, width) // SMALLEST)
    return -(-height // factor), -(-width // factor)


def posterior(
    evidence: Float[Array, "h w k"], image: Float[Array, "h2 w2 3"]
) -> Float[Array, "h w k"]:
    """Log-probability of every class at every pixel of one image, up to a constant per pixel."""
    height, width, _ = evidence.shape
    size = _window_size(height, width)
    image = jnp.clip(image.astype(jnp.float32), -1, 1)
    if size == (height, width):
        return evidence + _neighbours(evidence, image)
    message = _neighbours(
        resize_bilinear(evidence[None], size)[0], resize_bilinear(image[None], size)[0]
    )
    return evidence + resize_bilinear(message[None], (height, width))[0]


def _neighbours(
    evidence: Float[Array, "h w k"], image: Float[Array, "h w 3"]
) -> Float[Array, "h w k"]:
    """w sum_j k_ij q_j / sum_j k_ij after the last step."""
    height, width, _ = image.shape

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(RADIUS, RADIUS)] * 2)

    def moved(x: Array, offset: Array) -> Array:  # of padded arrays [c h + 2 RADIUS w + 2 RADIUS]
        return jax.lax.dynamic_slice(
            x, (0, RADIUS + offset[0], RADIUS + offset[1]), (x.shape[0], height, width)
        )

    # Channels and classes first: the pixels of each are contiguous, whatever their number
    colour = jnp.moveaxis(image, -1, 0)
    around, inside = padded(colour), padded(jnp.ones((1, height, width)))

    def kernel_of(offset: Array) -> Array:
        unlike = jnp.square(moved(around, offset) - colour).sum(0) / (2 * COLOUR**2)
        return moved(inside, offset)[0] * jnp.exp(
            -unlike - jnp.square(offset).sum() / (2 * PLACE**2)
        )

    offsets = jnp.asarray(_OFFSETS)
    kernel = jax.lax.map(kernel_of, offsets)
    kernel = kernel * (WEIGHT / jnp.maximum(kernel.sum(0), 1e-6))
    unary = jnp.moveaxis(evidence, -1, 0)

    def update(_: Array, message: Array) -> Array:
        q = padded(jax.nn.softmax(unary + message, axis=0))
        add = lambda total, at: (total + at[0] * moved(q, at[1]), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros_like(unary), (kernel, offsets))[0]

    return jnp.moveaxis(jax.lax.fori_loop(0, STEPS, update, jnp.zeros_like(unary)), 0, -1)
