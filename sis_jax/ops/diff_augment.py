"""Differentiable augmentation (Zhao et al. 2020, arXiv 2006.10738): colour, translation, cutout.

As projected GANs use it: the square that is cut out has a fifth of the edge, not half of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

SHIFT = 0.125  # of the edge, at most
CUTOUT = 0.2  # of the edge


def diff_augment(
    key: Key[Array, ""], images: Float[Array, "n h w 3"], first: Int[Array, ""] | int = 0
) -> Float[Array, "n h w 3"]:
    """Images in [-1, 1], each with its own brightness, saturation, contrast, shift and hole.

    first: number of `images[0]` in the whole batch: image i is driven by (key, first + i) alone.
    Differentiable in `images`.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(images)))
    return jax.vmap(_augmented)(keys, images)


def _augmented(key: Array, image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    brightness, saturation, contrast, *places = jax.random.uniform(key, (7,))
    image = image + (brightness - 0.5)
    grey = image.mean(2, keepdims=True)
    image = (image - grey) * (2 * saturation) + grey
    mean = image.mean()
    image = (image - mean) * (contrast + 0.5) + mean
    size = jnp.asarray(image.shape[:2], jnp.float32)
    shift, centre = jnp.stack(places[:2]), jnp.stack(places[2:])
    image = _shifted(image, jnp.round((2 * shift - 1) * SHIFT * size).astype(int))
    return jnp.where(_hole(image.shape[:2], centre * size)[..., None], 0.0, image)


def _shifted(image: Float[Array, "h w 3"], by: Int[Array, "2"]) -> Float[Array, "h w 3"]:
    """Moved by at most `SHIFT` of the edge; zeros come in."""
    rows, columns = (round(SHIFT * n) for n in image.shape[:2])
    padded = jnp.pad(image, ((rows, rows), (columns, columns), (0, 0)))
    start = (rows - by[0], columns - by[1], 0)
    return jax.lax.dynamic_slice(padded, start, image.shape)


def _hole(shape: tuple[int, ...], centre: Float[Array, "2"]) -> Array:
    """Bool[h, w]: the square around a point."""
    near = [jnp.abs(jnp.arange(n) + 0.5 - c) <= CUTOUT / 2 * n for n, c in zip(shape, centre)]
    return near[0][:, None] & near[1][None]
