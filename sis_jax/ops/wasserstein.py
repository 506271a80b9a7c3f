"""Sliced Wasserstein distance between two sets of images.

Karras et al. 2018, "Progressive Growing of GANs" (arXiv 1710.10196), section 5. Lower is better, 0
for two equal sets; two halves of one set give the noise floor, the reference for every number.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from sis_jax.ops import plan
from sis_jax.types import Array, UsageError

PATCH = 7  # edge length of a descriptor
PER_IMAGE = 128  # descriptors of one image at one level, at most
SMALLEST = 16  # resolution of the coarsest level
_CHUNK = 128  # images whose positions are drawn together
_BLOCK = 128  # projections drawn and sorted at once


class SwdReference:
    """One set of images with its sorted projections, to compare other sets with.

    As in the paper: 7x7x3 descriptors at random positions of every level of a Laplacian pyramid
    down to 16 pixels, each set normalised per channel, 512 random directions, mean absolute
    difference of sorted projections, x 1000. Differences:
    * `descriptors` in all (default 2^14, at most 128 per image) instead of 2^21 per level: two
      halves of 4,000 faces at 64 pixels average 16 at 2^14 and 11 at 2^15. Numbers are comparable
      at one setting, not with published ones.
    * Image i is read at the same positions in both sets, so equal sets give exactly 0.
    * Sets of different size are compared at common quantiles.
    * A level of odd resolution ends the pyramid; images smaller than 16 pixels have one level.

    Memory: descriptors x (147 + projections) floats per level. NumPy sorts where JAX has only CPUs.
    """

    def __init__(
        self,
        real: UInt8[np.ndarray, "n h w 3"],
        seed: int = 0,
        *,
        descriptors: int = 2**14,
        projections: int = 512,
    ) -> None:
        if descriptors < 1 or projections < 1:
            raise UsageError(
                f"descriptors and projections are at least 1, got {descriptors} and {projections}"
            )
        self.seed = int(seed)
        self.descriptors = int(descriptors)
        self.projections = int(projections)
        self.shape = _check_images(real)
        self._sorted = {level: list(blocks) for level, blocks in self._levels(real)}

    def distance(self, fake: UInt8[np.ndarray, "m h w 3"]) -> dict[str, float]:
        """SWD x 1000 between reference and `fake`, per level and as "average"."""
        if _check_images(fake) != self.shape:
            raise UsageError(
                f"images of {fake.shape[1]}x{fake.shape[2]} cannot be compared with a reference "
                f"of {self.shape[0]}x{self.shape[1]}"
            )
        result = {}
        for level, blocks in self._levels(fake):
            gaps = [
                _gap(mine, theirs) for mine, theirs in zip(self._sorted[level], blocks, strict=True)
            ]
            weights = [len(block) for block in self._sorted[level]]
            result[level] = float(np.average(gaps, weights=weights)) * 1e3
        return result | {"average": float(np.mean(list(result.values())))}

    def _levels(
        self, images: np.ndarray
    ) -> Iterator[tuple[str, Iterator[Float32[np.ndarray, "p d"]]]]:
        found = _descriptors(images, self.seed, self.descriptors)
        for number, (level, patches) in enumerate(found.items()):
            yield level, self._project(_normalise(patches), number)

    def _project(self, patches: np.ndarray, level: int) -> Iterator[Float32[np.ndarray, "p d"]]:
        rng = np.random.default_rng([self.seed, 1, level])
        for start in range(0, self.projections, _BLOCK):
            directions = rng.standard_normal(
                (min(_BLOCK, self.projections - start), patches.shape[1])
            ).astype(np.float32)
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            yield _project_and_sort(directions, patches)


def _check_images(images: np.ndarray) -> tuple[int, int]:
    if (
        getattr(images, "ndim", 0) != 4
        or images.shape[-1] != 3
        or images.dtype != np.uint8
        or not len(images)
    ):
        got = (
            f"{getattr(images, 'dtype', type(images).__name__)}{list(getattr(images, 'shape', []))}"
        )
        raise UsageError(f"SWD compares images as uint8[n h w 3] with n at least 1, got {got}")
    if min(images.shape[1:3]) < PATCH:
        raise UsageError(
            f"SWD needs images of at least {PATCH}x{PATCH} pixels, got "
            f"{images.shape[1]}x{images.shape[2]}"
        )
    return images.shape[1], images.shape[2]


def _shapes(h: int, w: int) -> list[tuple[int, int]]:
    shapes = [(h, w)]
    while not h % 2 and not w % 2 and min(h, w) // 2 >= SMALLEST:
        h, w = h // 2, w // 2
        shapes.append((h, w))
    return shapes


def _descriptors(
    images: np.ndarray, seed: int, total: int
) -> dict[str, Float32[np.ndarray, "d 147"]]:
    """level -> patches [7 7 3] of as many images as the budget `total` allows."""
    n = len(images)
    each = int(np.clip(total // n, 1, PER_IMAGE))
    rows = (
        np.arange(n)
        if n <= total
        else np.sort(np.random.default_rng([seed, 2]).choice(n, total, replace=False))
    )
    shapes = _shapes(*images.shape[1:3])
    out: dict[str, list[np.ndarray]] = {str(min(shape)): [] for shape in shapes}
    for number, start in enumerate(range(0, len(rows), _CHUNK)):
        chosen = rows[start : start + _CHUNK]
        # Padded to one shape, so that the last chunk compiles nothing; the padding is cut off
        # below.
        batch = np.zeros((_CHUNK, *images.shape[1:]), np.uint8)
        batch[: len(chosen)] = images[chosen]
        rng = np.random.default_rng([seed, 3, number])
        tops = [
            np.stack([rng.integers(0, s - PATCH + 1, (_CHUNK, each)) for s in shape], -1).astype(
                np.int32
            )
            for shape in shapes
        ]
        read = _patch_reader(len(shapes))
        together = plan.rows_at_once(read, (0, 0), (batch, tops), jax.default_backend(), _CHUNK)[0]
        for i in range(0, len(chosen), together):
            part = [a[i : i + together] for a in (batch, *tops)]
            for level, patches in zip(out, read(part[0], part[1:])):
                found = np.asarray(patches)[: len(chosen) - i]
                out[level].append(found.reshape(-1, PATCH * PATCH * 3))
    return {level: np.concatenate(parts) for level, parts in out.items()}


def _normalise(patches: Float32[np.ndarray, "d 147"]) -> Float32[np.ndarray, "d 147"]:
    by_channel = patches.reshape(-1, 3)
    # A channel without any variation (black images) is all zeros after the mean is taken off:
    # leave it there.
    deviation = by_channel.std(0, dtype=np.float64)
    scaled = (by_channel - by_channel.mean(0, dtype=np.float64)) / np.where(
        deviation > 1e-6, deviation, 1.0
    )
    return scaled.astype(np.float32).reshape(patches.shape)


def _gap(a: Float32[np.ndarray, "p d"], b: Float32[np.ndarray, "p e"]) -> float:
    """Mean absolute difference of sorted rows, at common quantiles where lengths differ."""
    if a.shape[1] != b.shape[1]:
        length = max(a.shape[1], b.shape[1])
        a, b = _quantiles(a, length), _quantiles(b, length)
    return float(np.abs(a - b).mean(dtype=np.float64))


def _quantiles(rows: Float32[np.ndarray, "p d"], length: int) -> Float32[np.ndarray, "p l"]:
    d = rows.shape[1]
    at = np.clip((np.arange(length) + 0.5) * d / length - 0.5, 0, d - 1)
    low = np.minimum(at.astype(np.int64), max(d - 2, 0))
    part = (at - low).astype(np.float32)
    return rows[:, low] * (1 - part) + rows[:, np.minimum(low + 1, d - 1)] * part


@functools.cache
def _patch_reader(levels: int) -> Callable:
    """(uint8[b h w 3], tops per level int32[b k 2]) -> per level Float32[b k 7 7 3], compiled."""

    def read_one(image: jax.Array, tops: jax.Array) -> jax.Array:
        return jax.vmap(
            lambda top: jax.lax.dynamic_slice(image, (top[0], top[1], 0), (PATCH, PATCH, 3))
        )(tops)

    @jax.jit
    def read(images: jax.Array, tops: list[jax.Array]) -> list[jax.Array]:
        gaussian = images.astype(jnp.float32)
        found = []
        for level in range(levels):
            band = gaussian  # the coarsest level keeps its mean
            if level + 1 < levels:
                gaussian = binomial_down(gaussian)
                band = band - binomial_up(gaussian)
            found.append(jax.vmap(read_one)(band, tops[level]))
        return found

    return read


def binomial_down(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Blur by [1 4 6 4 1] / 16 along both axes with mirrored borders, then every second pixel."""
    for axis in (1, 2):
        x = _binomial(x, axis, 1.0, x.shape[axis])
        x = x[:, ::2] if axis == 1 else x[:, :, ::2]
    return x


def binomial_up(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Zeros between the pixels, then the same blur with gain 4, which keeps the mean."""

    for axis in (1, 2):
        wide = jnp.stack([x, jnp.zeros_like(x)], axis + 1)
        wide = wide.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
        x = _binomial(wide, axis, 2.0, wide.shape[axis])
    return x


def _binomial(x: Array, axis: int, gain: float, size: int) -> Array:

    pads = [(2, 2) if i == axis else (0, 0) for i in range(4)]
    padded = jnp.pad(x, pads, mode="reflect")
    taps = np.asarray([1, 4, 6, 4, 1]) * (gain / 16)
    return functools.reduce(
        operator.add,
        (
            jax.lax.slice_in_dim(padded, k, k + size, axis=axis) * float(tap)
            for k, tap in enumerate(taps)
        ),
    )


@functools.cache
def _sorter(on_cpu: bool) -> Callable:

    def project(directions: jax.Array, patches: jax.Array) -> jax.Array:
        rows = jnp.matmul(directions, patches.T, precision=jax.lax.Precision.HIGHEST)
        return rows if on_cpu else jnp.sort(rows, axis=1)

    return jax.jit(project)


def _project_and_sort(
    directions: Float32[np.ndarray, "p 147"], patches: Float32[np.ndarray, "d 147"]
) -> Float32[np.ndarray, "p d"]:

    on_cpu = jax.default_backend() == "cpu"
    rows = np.array(_sorter(on_cpu)(directions, patches))
    # XLA's sort on a CPU compares through a callback; NumPy's is vectorised and lets go of the
    # interpreter
    if on_cpu:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda part: part.sort(axis=1), np.array_split(rows, 2)))
    return rows
