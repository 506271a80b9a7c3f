"""k-means in JAX: all restarts in one pass over the data, on any number of devices.

Lloyd's algorithm (Lloyd 1982) from greedy k-means++ starts, with scikit-learn's conventions for
`tol`, `max_iter` and empty clusters: given the same initial centres it gives scikit-learn's labels.
Where there are many rows the restarts first run to convergence on a sample; those that found the
same centres, or are more than 1 % behind, are not carried on over all the data. The passes
themselves are in `kmeans_steps.py`.

Measured on 2 CPU cores, float32, time of one pass for 10 restarts of k = 9 in d = 512 relative to
the row marked *:

    scores [restart, cluster, row], one-hot product, chunks of 16,384 rows   1.0 *
        (rows last; one restart alone: 0.29, so 10 in turn: 2.9)
    the same, chunks of 4,096 / 1,024 rows                                   1.03 / 1.4
    scores [row, restart, cluster], chunks of 16,384 / 4,096 / 1,024 rows    1.5 / 1.7 / 1.8
    the same with segment_sum in place of the one-hot product, 4,096 rows    1.4
    assignment only (what no update could beat), 16,384 rows                 0.55

The whole against scikit-learn 1.9 with the same k, restarts and tolerance: 1/17 to 1/20 of its
processor time at equal inertia (to 1e-6), on 100,000 x 192 and 204,800 x 512 rows of
`scripts/benchmark.py kmeans`. Carrying on only the contenders halves the time and changes nothing
in the inertia; samples of 8,192 to 65,536 rows lead to the same inertia, 16,384 is fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from sis_jax import parallel
from sis_jax.ops import kmeans_steps as steps
from sis_jax.ops.sampling import one_ahead
from sis_jax.types import UsageError

# A restart further behind the best on the sample than this is not carried on.
MARGIN = 0.01
# Two restarts found the same centres where each centre's match is this much nearer (squared) than
# its own nearest neighbour.
SAME = 0.01
# [n d]. Sizes are not bound and the last member lets any array in: our own checks answer with a
# sentence, also where a type checker is active.
Points = Num[Array, "_n _d"] | Num[np.ndarray, "_n _d"] | ArrayLike


@dataclass(frozen=True)
class KMeans:
    """A fitted k-means; a pytree.

    centers: Float32[k d]. labels: Int32[n]. inertia: weighted sum of squared distances. n_iter:
        Lloyd steps over all rows of the restart that won. inertias: Float[n_init], over all rows.
        converged: False where max_iter ended it.
    """

    centers: Float[np.ndarray, "k d"] | Float[Array, "k d"]
    labels: Int[np.ndarray, " n"] | Int[Array, " n"]
    inertia: float
    n_iter: int
    inertias: Float[np.ndarray, " r"] | Float[Array, " r"]
    converged: bool

    def predict(self, x: Points, chunk: int = steps.CHUNK) -> Int[np.ndarray, " n"]:
        """The nearest centre of each row of x [n d], Int32[n], `chunk` rows at a time."""
        return predict(x, self.centers, chunk)


jax.tree_util.register_dataclass(
    KMeans, ["centers", "labels", "inertia", "n_iter", "inertias", "converged"], []
)


def scores(x: Float[Array, "*n d"], centers: Float[Array, "k d"]) -> Float[Array, "*n k"]:
    """|c|^2 - 2 x.c: squared distances less |x|^2. Linear in x, so it can be upsampled."""
    return jnp.sum(centers * centers, -1) - 2 * jnp.matmul(x, centers.T, precision="highest")


def assign(x: Float[Array, "*n d"], centers: Float[Array, "k d"]) -> Int[Array, "*n"]:
    """The nearest centre of each vector, Int32; the mean centre is the origin, for precision."""
    origin = centers.mean(0)
    return jnp.argmin(scores(x - origin, centers - origin), -1).astype(jnp.int32)


_assign = jax.jit(assign)


def predict(
    x: Points, centers: Float[np.ndarray, "k d"] | Float[Array, "k d"], chunk: int = steps.CHUNK
) -> Int[np.ndarray, " n"]:
    """`assign` for any number of rows x [n d], `chunk` at a time; UsageError for NaN."""
    x = x if isinstance(x, np.ndarray | jax.Array) else np.asarray(x)
    shape, d = x.shape, centers.shape[1]
    if len(shape) != 2 or shape[1] != d:
        raise UsageError(f"these centres take points of shape (n, {d}), got {shape}")
    if chunk < 1:
        raise UsageError(f"chunk is {chunk}, expected at least 1 row")
    out, size = np.empty(shape[0], np.int32), min(chunk, shape[0])
    centers = jnp.asarray(centers)

    def begun() -> Iterator[tuple[int, Array]]:
        for i in range(0, shape[0], max(size, 1)):
            # The last chunk overlaps the one before: one shape, one compilation
            start = min(i, shape[0] - size)
            block = np.asarray(x[start : start + size], np.float32)
            _check_finite(block)
            yield start, _assign(block, centers)

    for start, found in one_ahead(begun()):
        out[start : start + size] = found
    return out


def kmeans(
    x: Points,
    k: int,
    *,
    seed: int = 0,
    n_init: int = 10,
    max_iter: int = 300,
    tol: float = 1e-4,
    init: Points | str = "k-means++",
    weights: ArrayLike | None = None,
    devices: parallel.Devices = None,
) -> KMeans:
    """Cluster the rows of x [n d] into k groups; the best of n_init restarts by inertia.

    init: "k-means++" or starting centres [k d] (one restart). max_iter: Lloyd steps per restart.
        tol: stop when the squared movement of the centres is at most tol times the mean variance of
        a column. weights: Float[n] >= 0. devices: the rows are cut over them (None: all of this
        process); their number changes last digits. Raises UsageError for what cannot be clustered.
    """
    x, weights = _checked(x, k, seed, n_init, max_iter, tol, weights)
    n, d = x.shape
    given = None if isinstance(init, str) else _checked_init(init, k, d)
    if isinstance(init, str) and init != "k-means++":
        raise UsageError(
            f"unknown init {init!r}: use 'k-means++' or an array of {k} starting centres"
        )
    m = steps.sample_size(n, k)
    rows = steps.sample_rows(n, m, seed) if m < n else slice(None)
    sample, sample_weights = np.asarray(x[rows]), None if weights is None else weights[rows]
    with np.errstate(
        invalid="ignore", over="ignore"
    ):  # _tolerance finds and reports non-finite values
        origin = sample.mean(0, dtype=np.float64).astype(np.float32)
    data = _Data.place(x, weights, origin, parallel.local_devices(devices))
    limit = _tolerance(data, x, tol)
    if given is not None:
        centers, carried = (given - origin)[None], np.array([0])
    else:
        centers = _starts(sample - origin, sample_weights, steps.draws(seed, n_init, k))
        carried = np.arange(n_init)
        if m < n:
            small = _Data.place(sample, sample_weights, origin, data.devices[:1])
            centers = _iterate(small, centers, limit, max_iter)[0]
            carried = _contenders(centers, _inertia(small, centers))
    del sample
    made, done = np.zeros(len(centers), np.int32), np.zeros(len(centers), bool)
    centers[carried], made[carried], done[carried] = _iterate(
        data, centers[carried], limit, max_iter
    )
    inertias = _inertia(data, centers)
    best = int(carried[np.argmin(inertias[carried])])
    labels, parts = data.map(steps.labels, centers[best], out_axes=0)
    inertias[best] = np.asarray(parts, np.float64).sum()
    labels = np.asarray(parallel.unshard(np.asarray(labels), n))
    return KMeans(
        centers[best] + origin,
        labels,
        float(inertias[best]),
        int(made[best]),
        inertias,
        bool(done[best]),
    )


@dataclass(frozen=True)
class _Data:
    """Rows on their devices: blocks [D m d], weights [D m] (0: filling), origin [d] to subtract."""

    x: Array
    w: Array
    origin: Float[np.ndarray, " d"]
    devices: tuple

    @staticmethod
    def place(x, weights, origin, devices) -> _Data:
        blocks, real = parallel.shard(x, len(devices))
        if weights is not None:
            real = real * parallel.shard(weights, len(devices))[0]
        return _Data(
            parallel.place(blocks, devices), parallel.place(real, devices), origin, tuple(devices)
        )

    def map(self, body: Callable, *args, out_axes: int | None = None):
        in_axes = (0, 0, None) + (None,) * len(args)
        return parallel.map_devices(body, in_axes, out_axes, devices=self.devices)(
            self.x, self.w, self.origin, *args
        )


def _starts(sample, weights, u) -> np.ndarray:
    weights = np.ones(len(sample), np.float32) if weights is None else weights
    return np.array(steps.plus_plus(jnp.asarray(sample), jnp.asarray(weights), jnp.asarray(u)))


def _tolerance(data: _Data, x, tol: float) -> float:
    """tol times the mean variance of a column; the same pass finds values that are not finite."""
    first, second, weight = (np.asarray(a, np.float64) for a in data.map(steps.moments))
    if not np.isfinite(second).all():
        _check_finite(x)
        raise UsageError(
            "the values of x are too large for 32-bit squares: divide them by a constant first"
        )
    return float(tol * np.mean(second / weight - (first / weight) ** 2))


def _inertia(data: _Data, centers) -> Float[np.ndarray, " r"]:
    return np.asarray(data.map(steps.inertias, centers, out_axes=0), np.float64).sum((0, 1))


def _contenders(
    centers: Float[np.ndarray, "r k d"], inertias: Float[np.ndarray, " r"]
) -> Int[np.ndarray, " c"]:
    """The restarts within MARGIN of the best on the sample, one of each group of equal centres."""
    kept: list[int] = []
    for r in np.argsort(inertias, kind="stable"):
        if inertias[r] <= inertias.min() * (1 + MARGIN) and not any(
            _same(centers[r], centers[q]) for q in kept
        ):
            kept.append(int(r))
    return np.array(sorted(kept))


def _same(a: Float[np.ndarray, "k d"], b: Float[np.ndarray, "k d"]) -> bool:
    cross, own = (
        np.maximum((a * a).sum(1)[:, None] + (c * c).sum(1) - 2 * a @ c.T, 0) for c in (b, a)
    )
    np.fill_diagonal(own, np.inf)
    return len(set(cross.argmin(1))) == len(a) and bool((cross.min(1) <= SAME * own.min(1)).all())


def _iterate(
    data: _Data, centers: np.ndarray, tol: float, max_iter: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lloyd from centers [r k d] to the end: centres, steps made [r], converged [r].

    The loop on the device comes back when two thirds of the restarts have converged, to go on with
    a third of the size (few sizes, few compilations), or when a cluster is empty.
    """
    centers, total = np.array(centers, np.float32), len(centers)
    made, done = np.zeros(total, np.int32), np.zeros(total, bool)
    sizes = [total]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 3))
    while (live := np.flatnonzero(~done & (made < max_iter))).size:
        level = max(i for i, size in enumerate(sizes) if size >= live.size)
        rows = np.resize(live, sizes[level])  # filled up with repetitions that do not move
        filler = np.arange(sizes[level]) >= live.size
        floor = sizes[level + 1] if level + 1 < len(sizes) else 0
        out = data.map(
            steps.lloyd,
            centers[rows],
            filler,
            made[rows],
            np.float32(tol),
            np.int32(max_iter),
            np.int32(floor),
        )
        out = {name: np.array(a)[: live.size] for name, a in out.items() if name != "empty"}
        vacant = np.flatnonzero((out["counts"] == 0).any(1) & ~out["done"])
        if vacant.size:
            out["new"] = _relocate(data, out, vacant)
            out["done"] = out["done"] | (np.sum((out["new"] - out["old"]) ** 2, (1, 2)) <= tol)
        centers[live], made[live], done[live] = out["new"], out["steps"], out["done"]
    return centers, made, done


def _relocate(data: _Data, out: dict[str, np.ndarray], restarts) -> np.ndarray:
    """New centres: every empty cluster takes one of the farthest points, as in scikit-learn."""
    far = data.map(steps.farthest, out["old"], out_axes=0)
    # Devices side by side
    value, rows, weight, label = (np.concatenate(list(np.asarray(a)), axis=1) for a in far)
    new = out["new"].copy()
    for r in restarts:
        empty = np.flatnonzero(out["counts"][r] == 0)
        points = np.argsort(-value[r], kind="stable")[: len(empty)]
        if value[r, points[0]] <= 0:
            continue  # fewer distinct points than clusters: nowhere to move
        total, mass = out["sums"][r].astype(np.float64), out["counts"][r].astype(np.float64)
        for cluster, point in zip(empty, points, strict=True):
            share = rows[r, point] * np.float64(weight[r, point])
            total[label[r, point]] -= share
            mass[label[r, point]] -= weight[r, point]
            total[cluster], mass[cluster] = share, weight[r, point]
        new[r] = np.where(
            mass[:, None] > 0, total / np.where(mass > 0, mass, 1)[:, None], out["old"][r]
        )
    return new


def _check_finite(x) -> None:
    bad = int((~np.isfinite(np.asarray(x))).any(1).sum())
    if bad:
        raise UsageError(
            f"{bad} of {x.shape[0]} rows hold NaN or infinite values: remove them or look for the "
            "step that made them"
        )


def _checked(x, k, seed, n_init, max_iter, tol, weights):
    """x as float32 and weights, or UsageError that names the fault."""
    x = x if isinstance(x, np.ndarray | jax.Array) else np.asarray(x)
    if x.ndim != 2:
        raise UsageError(
            f"k-means takes points of shape (n, d), got {x.shape}: reshape to one row per point"
        )
    n, d = x.shape
    if n == 0 or d == 0:
        raise UsageError(
            f"k-means got no data (shape {x.shape}): give at least k rows with one column"
        )
    if not 2 <= k <= n:
        raise UsageError(f"k is {k}, expected an integer from 2 to the number of points, {n}")
    if n_init < 1 or max_iter < 1 or not tol >= 0 or seed < 0:
        raise UsageError(
            f"n_init and max_iter must be at least 1, tol and seed at least 0; got {n_init}, "
            f"{max_iter}, {tol} and {seed}"
        )
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise UsageError(f"k-means takes real numbers, got {x.dtype}: convert x to float32")
    if weights is not None:
        weights = np.asarray(weights, np.float32)
        if (
            weights.shape != (n,)
            or not np.isfinite(weights).all()
            or (weights < 0).any()
            or np.count_nonzero(weights) < k
        ):
            raise UsageError(
                f"weights must be {n} finite numbers, none negative and at least {k} of them "
                f"positive; got shape {weights.shape}"
            )
    if (
        isinstance(x, jax.Array)
        and x.is_fully_addressable
        and all(device.platform == "cpu" for device in x.devices())
    ):
        x = np.asarray(x)  # a view on a CPU, which can be cut without a copy
    return (x if x.dtype == jnp.float32 else x.astype(jnp.float32)), weights


def _checked_init(init, k: int, d: int) -> np.ndarray:
    init = np.asarray(init, np.float32)
    if init.shape != (k, d):
        raise UsageError(
            f"the starting centres have shape {init.shape}, expected {(k, d)}: one row per cluster"
        )
    _check_finite(init)
    return init
