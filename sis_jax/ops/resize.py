"""Bilinear resizing of batches, by the rules of the two conventions in use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def resize_bilinear(
    x: Float[Array, "n h w c"],
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    antialias: bool = True,
) -> Float[Array, "n h2 w2 c"]:
    """Bilinear resize to size = (rows, columns).

    align_corners=True puts source row i (m - 1) / (n - 1) under target row i: the rule of the
    Segmentation in Style code, as two small matrices. Otherwise half-pixel centres; `antialias`
    widens the filter when shrinking (torch's `interpolate` does not, by default).
    """
    if not align_corners:
        return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=antialias)
    for axis, m in zip((1, 2), size):
        matrix = jnp.asarray(_aligned_matrix(x.shape[axis], m), x.dtype)
        x = jnp.moveaxis(
            jnp.tensordot(matrix, x, axes=(1, axis), precision=lax.Precision.HIGHEST), 0, axis
        )
    return x


def _aligned_matrix(n: int, m: int) -> np.ndarray:
    """[m, n] interpolation matrix with aligned corners."""
    where = np.arange(m) * ((n - 1) / (m - 1)) if m > 1 else np.zeros(1)
    low = np.clip(np.floor(where).astype(int), 0, max(n - 2, 0))
    high = np.minimum(low + 1, n - 1)
    matrix = np.zeros((m, n))
    np.add.at(matrix, (np.arange(m), low), 1 - (where - low))
    np.add.at(matrix, (np.arange(m), high), where - low)
    return matrix
