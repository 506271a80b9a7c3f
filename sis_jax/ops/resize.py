"""Interpolation by the rules in use: one matrix per axis, in NumPy, applied in JAX or NumPy."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

CUBIC = -0.75  # the cubic kernel's a, as in PyTorch


def resize_bilinear(
    x: Float[Array, "n h w c"],
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    antialias: bool = True,
) -> Float[Array, "n h2 w2 c"]:
    """Bilinear resize to size = (rows, columns), half-pixel centres.

    align_corners: row i (m - 1) / (n - 1) under target row i, the Segmentation in Style code's
        rule. antialias: widen the filter when shrinking, as torch does not by default.
    """
    if not align_corners:
        return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=antialias)
    return _applied(x, [linear_matrix(n, m, True) for n, m in zip(x.shape[1:3], size)])


def upsample_bicubic(x: Float[Array, "n h w c"]) -> Float[Array, "n 2*h 2*w c"]:
    """Twice the size, bicubic with aligned corners."""
    return _applied(x, [cubic_matrix(n, 2 * n, True) for n in x.shape[1:3]])


def resize_plain(
    x: Float32[np.ndarray, "h w c"], size: tuple[int, int], *, aligned: bool = False
) -> Float32[np.ndarray, "H W c"]:
    """Bilinear without averaging, edges repeated, in NumPy. aligned: as in `linear_matrix`."""
    rows, columns = (
        linear_matrix(n, m, aligned).astype(np.float32) for n, m in zip(x.shape[:2], size)
    )
    return np.einsum("Wv,Hvc->HWc", columns, np.tensordot(rows, x, 1), optimize=True).astype(
        np.float32, copy=False
    )


@lru_cache(maxsize=128)
def linear_matrix(n: int, m: int, aligned: bool = False) -> Float[np.ndarray, "m n"]:
    """Linear interpolation from n values to m, edges repeated; aligned: end centres stay."""
    at = np.clip(_places(n, m, aligned), 0, n - 1)
    low = np.minimum(np.floor(at).astype(int), max(n - 2, 0))
    matrix, rows = np.zeros((m, n)), np.arange(m)
    np.add.at(matrix, (rows, low), 1 - (at - low))
    np.add.at(matrix, (rows, np.minimum(low + 1, n - 1)), at - low)
    return matrix


@lru_cache(maxsize=128)
def cubic_matrix(n: int, m: int, aligned: bool = False) -> Float[np.ndarray, "m n"]:
    """Cubic convolution (Keys 1981) from n values to m; positions outside read the edge."""
    at = _places(n, m, aligned)
    low = np.floor(at).astype(int)
    matrix = np.zeros((m, n))
    for tap in range(-1, 3):
        d = np.abs(at - low - tap)
        near = ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1
        far = CUBIC * (((d - 5) * d + 8) * d - 4)
        values = np.where(d <= 1, near, far)
        np.add.at(matrix, (np.arange(m), np.clip(low + tap, 0, n - 1)), values)
    return matrix


def _places(n: int, m: int, aligned: bool) -> Float[np.ndarray, "m"]:
    """Where m values are read among n."""
    if aligned:
        return np.arange(m) * ((n - 1) / max(m - 1, 1))
    return (np.arange(m) + 0.5) * (n / m) - 0.5


def _applied(
    x: Float[Array, "n h w c"], matrices: list[Float[np.ndarray, "_ _"]]
) -> Float[Array, "n h2 w2 c"]:
    """A matrix along the rows, then one along the columns."""
    for axis, matrix in zip((1, 2), matrices):
        product = jnp.tensordot(
            jnp.asarray(matrix, x.dtype), x, axes=(1, axis), precision=lax.Precision.HIGHEST
        )
        x = jnp.moveaxis(product, 0, axis)
    return x
