"""Regions of images in CLIP's space: pixels at any size, features pooled per cluster, crops.

Segmentation in Style averages the positions of a cluster over all images (section 3.2). Bilinear
upsampling is linear, so the labels are brought to the grid of the features, by the transposed
weights: the same sums at a small part of the memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from sis_jax.models.clip import CLIPNetwork
from sis_jax.ops.resize import resize_bilinear

Colours = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and deviation


def to_pixels(
    images: Float[Array, "b h w 3"],
    size: tuple[int, int],
    colours: Colours,
    align_corners: bool = False,
) -> Float[Array, "b h2 w2 3"]:
    """Images in [-1, 1] as CLIP's pixels: bicubic with antialiasing to `size`, (x - mean) / std.

    align_corners: bilinear by that rule instead, as the Segmentation in Style code does.
    """
    images = jnp.asarray(images, jnp.float32)
    if align_corners:
        resized = resize_bilinear(images, size, align_corners=True)
    elif images.shape[1:3] == size:
        resized = images
    else:
        resized = jax.image.resize(images, (images.shape[0], *size, 3), "cubic", antialias=True)
    unit = jnp.clip(resized * 0.5 + 0.5, 0, 1)
    return (unit - jnp.asarray(colours[0])) / jnp.asarray(colours[1])


def pool_regions(
    features: Float[Array, "b h w d"],
    labels: UInt8[Array, "b rows columns"],
    k: int,
    align_corners: bool = False,
) -> tuple[Float[Array, "k d"], Float[Array, "k"]]:
    """Per cluster, sums of the features upsampled to the labels' grid, and numbers of pixels."""
    grid = features.shape[1:3]
    down = [
        _upsampling(small, large, align_corners).T for small, large in zip(grid, labels.shape[1:3])
    ]

    def one(cluster: Array) -> tuple[Array, Array]:
        inside = (labels == cluster).astype(jnp.float32)
        weight = jnp.einsum(
            "iy,byx,jx->bij", down[0], inside, down[1], precision=jax.lax.Precision.HIGHEST
        )
        return jnp.einsum(
            "bij,bijd->d", weight, features, precision=jax.lax.Precision.HIGHEST
        ), inside.sum()

    return jax.lax.map(one, jnp.arange(k))


def _upsampling(small: int, large: int, align_corners: bool) -> Float[Array, "large small"]:
    """The matrix of the bilinear resize from `small` to `large` positions, without antialias."""
    eye = jnp.eye(small)[None, :, None, :]
    return resize_bilinear(eye, (large, 1), align_corners=align_corners, antialias=False)[0, :, 0]


def dense_map(
    network: CLIPNetwork,
    images: Float[Array, "b h w 3"],
    *,
    size: tuple[int, int],
    colours: Colours,
    align_corners: bool,
) -> Array:
    """Dense features [b, h2, w2, d] of images in [-1, 1] that are read at `size` pixels."""
    return network.visual.dense(to_pixels(images, size, colours, align_corners))
