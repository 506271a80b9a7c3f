"""Labels that follow the picture: mean-field inference in a conditional random field whose pixels see their neighbourhood.

Model: Krähenbühl and Koltun 2011 (arXiv 1210.5644), one bilateral kernel and the Potts model; windows instead of all pairs of pixels, as in Teichmann and
Cipolla 2018 (arXiv 1805.04777): E(x) = sum_i u_i(x_i) + w sum_i sum_{j near i} k_ij / (sum_j k_ij) [x_i != x_j] with
k_ij = exp(-|colour_i - colour_j|^2 / 2 s^2 - |place_i - place_j|^2 / 2 t^2). The window is a fraction of the side, so that a picture and its enlargement
are treated alike; larger pictures take every second, third ... neighbour.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

WINDOW = 64  # distances below are in steps of 1/64 of the side, and of a pixel at least
RADIUS = 3
PLACE = 0.75 * RADIUS  # standard deviation t
COLOUR = 0.2  # standard deviation s, of colours in [-1, 1]
WEIGHT = 4.0  # w, in nats
STEPS = 3
_PIXELS = 2**17  # at a time: the kernel has 28 values for each


def mean_field(evidence: Float[Array, "b h w k"], image: Float[Array, "b h w 3"]) -> Float[Array, "b h w k"]:
    """Probability of every class at every pixel. evidence: log-likelihood of the classes, up to a constant per pixel. image: in [-1, 1]."""
    b, h, w, _ = evidence.shape
    together = max(1, min(b, _PIXELS // (h * w)))
    return jax.lax.map(lambda one: _one(*one), (evidence, image), batch_size=together)


def _one(evidence: Float[Array, "h w k"], image: Float[Array, "h w 3"]) -> Float[Array, "h w k"]:
    height, width, _ = image.shape
    step = max(1, round(max(height, width) / WINDOW))
    near = range(-RADIUS, RADIUS + 1)
    offsets = [(y, x) for y in near for x in near if 0 < y * y + x * x <= RADIUS * RADIUS]
    margin = RADIUS * step

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(margin, margin)] * 2)

    def moved(x: Array, y: int, across: int) -> Array:  # of padded arrays [..., h + 2 margin, w + 2 margin]
        top, left = margin + y * step, margin + across * step
        return x[..., top : top + height, left : left + width]

    colour = jnp.moveaxis(jnp.clip(image.astype(jnp.float32), -1, 1), -1, 0)
    around, inside = padded(colour), padded(jnp.ones((height, width)))
    kernel = jnp.stack([
        moved(inside, y, x) * jnp.exp(-jnp.square(moved(around, y, x) - colour).sum(0) / (2 * COLOUR**2) - (y * y + x * x) / (2 * PLACE**2))
        for y, x in offsets
    ])  # fmt: skip
    kernel = kernel * (WEIGHT / jnp.maximum(kernel.sum(0), 1e-6))
    unary = jnp.moveaxis(evidence, -1, 0)  # classes first: a picture of each lies together, whatever their number

    def update(_: Array, q: Array) -> Array:
        others = padded(q)
        return jax.nn.softmax(unary + sum(k * moved(others, y, x) for k, (y, x) in zip(kernel, offsets)), axis=0)

    return jnp.moveaxis(jax.lax.fori_loop(0, STEPS, update, jax.nn.softmax(unary, axis=0)), 0, -1)
