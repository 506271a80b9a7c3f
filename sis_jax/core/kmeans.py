"""k-means in JAX: all restarts in one pass over the data, on any number of devices.

Lloyd's algorithm (Lloyd 1982) from greedy k-means++ starts, with scikit-learn's conventions for `tol`, `max_iter`, restarts and empty clusters; given
the same initial centres it gives scikit-learn's labels. TABLE
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from . import kmeans_steps as steps
from . import parallel
from .types import UsageError

CHUNK = 16_384
MARGIN=0.01
COARSE=1
SAME=0.01
# Last member: lets any array reach our own checks, whose errors are sentences, when a type checker is active.
Points = Num[Array, "n d"] | Num[np.ndarray, "n d"] | ArrayLike


@dataclass(frozen=True)
class KMeans:
    """A fitted k-means.

    centers: Float32[k d]. labels: Int32[n] (empty after `minibatch_kmeans`). inertia: sum of squared distances to the nearest centre, weighted.
    n_iter: Lloyd steps over all the data for the restart that won. inertias: Float[n_init]. converged: stopped before max_iter.
    """

    centers: Float[Array, "k d"] | Float[np.ndarray, "k d"]
    labels: Int[np.ndarray, " n"] | Int[Array, " n"]
    inertia: float
    n_iter: int
    inertias: Float[np.ndarray, " r"] | Float[Array, " r"]
    converged: bool

    def predict(self, x: Points, chunk: int = CHUNK) -> Int[np.ndarray, " n"]:
        """The nearest centre of each row, Int32[n]; `chunk` rows are on the device at a time."""
        return predict(x, self.centers, chunk)


jax.tree_util.register_dataclass(KMeans, ["centers", "labels", "inertia", "n_iter", "inertias", "converged"], [])


def scores(x: Float[Array, "*n d"], centers: Float[Array, "k d"]) -> Float[Array, "*n k"]:
    """|c|^2 - 2 x.c: the squared distance to each centre, less |x|^2. Linear in x, so it can be upsampled in its place."""
    return jnp.sum(centers * centers, -1) - 2 * jnp.matmul(x, centers.T, precision="highest")


def assign(x: Float[Array, "*n d"], centers: Float[Array, "k d"]) -> Int[Array, "*n"]:
    """The nearest centre of each vector, Int32; works under jit. The origin is moved to the mean centre first, for precision."""
    origin = centers.mean(0)
    return jnp.argmin(scores(x - origin, centers - origin), -1).astype(jnp.int32)


_assign = jax.jit(assign)


def predict(x: Points, centers: Float[Array, "k d"] | Float[np.ndarray, "k d"], chunk: int = CHUNK) -> Int[np.ndarray, " n"]:
    """`assign` for any number of rows with `chunk` of them on the device at a time; NaN or infinite rows are an error."""
    shape, d = np.shape(x), centers.shape[1]
    if len(shape) != 2 or shape[1] != d:
        raise UsageError(f"these centres take points of shape (n, {d}), got {shape}")
    out = np.empty(shape[0], np.int32)
    size = min(chunk, shape[0])
    for i in range(0, shape[0], max(size, 1)):
        start = min(i, shape[0] - size)  # the last chunk overlaps the one before: one shape, one compilation
        block = np.asarray(x[start : start + size], np.float32)
        _check_finite(block)
        out[start : start + size] = _assign(block, jnp.asarray(centers))
    return out


@dataclass(frozen=True)
class _Data:
    """Rows on their devices: blocks [D m d], weights [D m], the origin that is subtracted chunk by chunk [d]."""

    x: Array
    w: Array
    mean: Float[np.ndarray, " d"]
    devices: tuple

    def map(self, body: Callable, *args, out_axes=None):
        in_axes = (0, 0, None) + (None,) * len(args)
        return parallel.map_devices(body, in_axes, out_axes, devices=self.devices)(self.x, self.w, self.mean, *args)


def _place(x, w, mean, devices) -> _Data:
    blocks, real = parallel.shard(x, len(devices))
    if w is not None:
        real = real * parallel.shard(w, len(devices))[0]
    return _Data(parallel.place(blocks, devices), parallel.place(real, devices), np.asarray(mean, np.float32), tuple(devices))


def _relocate(data: _Data, old, new, sums, counts, restarts) -> np.ndarray:
    """New centres in which each empty cluster has taken over one of the points farthest from their own centres."""
    value, rows, weight, label = (np.concatenate(list(np.asarray(a)), axis=1) for a in data.map(steps.farthest, old, out_axes=0))
    new = new.copy()
    for r in restarts:
        empty = np.flatnonzero(counts[r] == 0)
        far = np.argsort(-value[r], kind="stable")[: len(empty)]
        if value[r, far[0]] <= 0:
            continue  # fewer distinct points than clusters: nothing to move to
        total, mass = sums[r].astype(np.float64), counts[r].astype(np.float64)
        for cluster, point in zip(empty, far):
            share = rows[r, point] * np.float64(weight[r, point])
            total[label[r, point]] -= share
            mass[label[r, point]] -= weight[r, point]
            total[cluster], mass[cluster] = share, weight[r, point]
        new[r] = np.where(mass[:, None] > 0, total / np.maximum(mass, 1e-30)[:, None], old[r])
    return new


def _iterate(data: _Data, centers, tol: float, max_iter: int, shrink: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lloyd from centers [r k d] to the end: centres, steps [r], converged [r]. `shrink`: drop restarts from the batch as they converge."""
    centers = np.array(centers, np.float32)
    total = len(centers)
    steps, done = np.zeros(total, np.int32), np.zeros(total, bool)
    sizes = [total]
    while shrink and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    while (live := np.flatnonzero(~done & (steps < max_iter))).size:
        level = max(i for i, s in enumerate(sizes) if s >= live.size)
        rows = np.resize(live, sizes[level])  # a restart in two places fills the batch up
        filler = np.arange(sizes[level]) >= live.size
        floor = sizes[level + 1] if level + 1 < len(sizes) else 0
        out = jax.device_get(data.map(steps.lloyd, centers[rows], filler, steps[rows], np.float32(tol), np.int32(max_iter), np.int32(floor)))
        out = {name: a[: live.size] if np.ndim(a) else a for name, a in out.items()}
        vacant = np.flatnonzero(np.any(out["counts"] == 0, 1) & ~out["done"])
        if vacant.size:
            out["new"] = _relocate(data, out["old"], out["new"], out["sums"], out["counts"], vacant)
            out["done"] = out["done"] | (np.sum((out["new"] - out["old"]) ** 2, (1, 2)) <= tol)
        centers[live], steps[live], done[live] = out["new"], out["it"], out["done"]
    return centers, steps, done


def kmeans(
    x: Points,
    k: int,
    *,
    seed: int = 0,
    n_init: int = 10,
    max_iter: int = 300,
    tol: float = 1e-4,
    init: Points | str = "k-means++",
    weights: Num[Array, " n"] | Num[np.ndarray, " n"] | ArrayLike | None = None,
    devices: Sequence[jax.Device] | int | None = None,
) -> KMeans:
    """Cluster the rows of x [n d] into k groups; the best of n_init restarts by inertia.

    init: "k-means++" or starting centres [k d] (then there is one restart). max_iter: Lloyd steps per restart over all the data. tol: stop when the
    squared movement of the centres is at most tol times the mean variance of a column (0: until nothing moves). weights: Float[n], not negative.
    devices: the data is cut over them (a number, a list, or None for all of this process). One seed gives one result on one device; more devices
    change the order of additions and so the last digits.
    Raises UsageError for k < 2, k > n, an empty, non-numeric or not finite x, or arrays of the wrong shape.
    """
    x, weights = _checked(x, k, n_init, max_iter, tol, weights)
    chips = parallel.local_devices(devices)
    given = None if isinstance(init, str) else _checked_init(init, k, x.shape[1])
    if given is None and init != "k-means++":
        raise UsageError(f"unknown init {init!r}: use 'k-means++' or an array of {k} starting centres")
    n = x.shape[0]
    m = n if given is not None else steps.sample_size(n, k)
    rows = steps.sample_rows(n, m, seed) if m < n else slice(None)
    sample = np.asarray(x[rows], np.float32)
    sample_weights = None if weights is None else weights[rows]
    with np.errstate(invalid="ignore", over="ignore"):
        origin = sample.mean(0, dtype=np.float64).astype(np.float32)
    data = _place(x, weights, origin, chips)
    limit = _tolerance(data, x, tol)
    if given is not None:
        starts = (given - origin)[None]
    else:
        starts = _starts(sample, sample_weights, origin, steps.draws(seed, n_init, k))
    centers, go = starts, np.arange(len(starts))
    if m < n:  # most of the way on the sample, where a step costs next to nothing
        small = _place(sample, sample_weights, origin, chips[:1])
        centers = _iterate(small, starts, limit * COARSE, max_iter, SHRINK0)[0]
        go = _contenders(centers, _inertia(small, centers)) if RACE else go
    steps, done = np.zeros(len(centers), np.int32), np.zeros(len(centers), bool)
    centers[go], steps[go], done[go] = _iterate(data, centers[go], limit, max_iter, shrink=True)
    inertias = _inertia(data, centers)
    best = int(go[np.argmin(inertias[go])])
    labels, parts = data.map(steps.labels, centers[best], out_axes=0)
    inertias[best] = np.asarray(parts, np.float64).sum()
    labels = np.asarray(parallel.unshard(np.asarray(labels), n))
    return KMeans(centers[best] + origin, labels, float(inertias[best]), int(steps[best]), inertias, bool(done[best]))


RACE=True
SHRINK0=True


def _inertia(data: _Data, centers) -> np.ndarray:
    return np.asarray(data.map(steps.inertias, centers, out_axes=0), np.float64).sum((0, 1))


def _contenders(centers, inertias) -> np.ndarray:
    """The restarts worth carrying on: within MARGIN of the best on the sample, and one of each group that found the same centres."""
    kept = []
    for r in np.argsort(inertias, kind="stable"):
        if inertias[r] <= inertias.min() * (1 + MARGIN) and not any(_same(centers[r], centers[q]) for q in kept):
            kept.append(r)
    return np.array(sorted(kept))


def _same(a, b) -> bool:
    """True where each centre of a has one of b much nearer than any other centre of a."""
    cross = ((a[:, None] - b) ** 2).sum(2)
    apart = ((a[:, None] - a) ** 2).sum(2) + np.diag(np.full(len(a), np.inf))
    nearest = cross.argmin(1)
    return len(set(nearest)) == len(a) and bool((cross.min(1) <= SAME * apart.min(1)).all())


def _starts(sample, weights, origin, u) -> np.ndarray:
    w = np.ones(len(sample), np.float32) if weights is None else weights
    return np.asarray(steps.plus_plus(jnp.asarray(sample - origin), jnp.asarray(w), jnp.asarray(u)))


def _tolerance(data: _Data, x, tol: float) -> float:
    first, second, weight = (np.asarray(a, np.float64) for a in data.map(steps.moments))
    if not np.isfinite(second).all():
        _check_finite(x)
        raise UsageError("the values of x are too large for 32-bit squares: divide them by a constant first")
    return float(tol * np.mean(second / weight - (first / weight) ** 2))


def _check_finite(x) -> None:
    bad = int((~np.isfinite(np.asarray(x))).any(1).sum())
    if bad:
        raise UsageError(f"{bad} of {x.shape[0]} rows hold NaN or infinite values: remove them or look for the step that made them")


def _checked(x, k, n_init, max_iter, tol, weights):
    x = x if isinstance(x, np.ndarray | jax.Array) else np.asarray(x)
    if x.ndim != 2:
        raise UsageError(f"k-means takes points of shape (n, d), got {x.shape}: reshape to one row per point")
    n, d = x.shape
    if n == 0 or d == 0:
        raise UsageError(f"k-means got no data (shape {x.shape}): give at least k rows with one column")
    if not 2 <= k <= n:
        raise UsageError(f"k is {k}, expected a whole number from 2 to the number of points, {n}")
    if n_init < 1 or max_iter < 1 or not tol >= 0:
        raise UsageError(f"n_init and max_iter must be at least 1 and tol at least 0, got {n_init}, {max_iter} and {tol}")
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise UsageError(f"k-means takes real numbers, got {x.dtype}: convert x to float32")
    if weights is not None:
        weights = np.asarray(weights, np.float32)
        if weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any() or np.count_nonzero(weights) < k:
            raise UsageError(f"weights must be {n} finite numbers, none negative and at least {k} of them positive; got shape {weights.shape}")
    if isinstance(x, jax.Array) and all(dev.platform == "cpu" for dev in x.devices()) and x.is_fully_addressable:
        x = np.asarray(x)  # a view on a CPU; it can then be cut without a copy
    return (x if x.dtype == jnp.float32 else x.astype(jnp.float32)), weights


def _checked_init(init, k, d) -> np.ndarray:
    init = np.asarray(init, np.float32)
    if init.shape != (k, d):
        raise UsageError(f"the starting centres have shape {init.shape}, expected {(k, d)}: one row per cluster")
    _check_finite(init)
    return init
