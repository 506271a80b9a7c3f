"""The device code of k-means: passes over the rows for all restarts, Lloyd's step, k-means++.

`lloyd` is the loop over rows on any number of devices, `lloyd_steps` the one for a few rows inside
a compiled function; both make the same step. Bodies for `parallel.map_devices`: x [m d] and w [m]
are one device's rows and weights (0 = filling), `mean` [d] is the origin, subtracted chunk by chunk
so that 32-bit squares keep their digits. r = restarts, k = clusters.
k-means++: Arthur and Vassilvitskii, SODA 2007, greedy as its section 5 suggests: of 2 + floor(ln k)
candidates keep the one that lowers the sum of distances most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sis_jax import parallel

# Rows per step of a pass, and numbers in its largest temporary; measured in kmeans.py.
CHUNK = 16_384
TABLE = 1 << 23
# Rows on which starting centres are sought; measured in kmeans.py.
SAMPLE = 16_384
SAMPLE_PER_CENTRE = 512


def sample_size(n: int, k: int) -> int:
    """How many of n rows to seek starting centres on: all, up to twice as many as that takes."""
    enough = max(SAMPLE, SAMPLE_PER_CENTRE * k)
    return enough if n > 2 * enough else n


def sample_rows(n: int, m: int, seed: int) -> Int[np.ndarray, " m"]:
    """m of n row numbers in rising order, without repetition."""
    return np.sort(np.random.default_rng([seed, 1]).choice(n, m, replace=False, shuffle=False))


def draws(seed: int, n_init: int, k: int) -> Float[np.ndarray, "k r t"]:
    """The uniform numbers behind k-means++; restart r has its own stream, whatever n_init is."""
    trials = 2 + int(math.log(k))
    return np.stack(
        [
            np.random.default_rng([seed, 0, r]).random((k, trials), np.float32)
            for r in range(n_init)
        ],
        axis=1,
    )


@jax.jit
def plus_plus(
    x: Float[Array, "n d"], weights: Float[Array, " n"], u: Float[Array, "k r t"]
) -> Float[Array, "r k d"]:
    """Greedy k-means++ for r restarts at once on centred x; u: uniform numbers in [0, 1)."""
    k, restarts, trials = u.shape
    x2 = jnp.sum(x * x, 1)

    def distances(c: Float[Array, "c d"]) -> Float[Array, "c n"]:
        return jnp.maximum(
            x2 - 2 * jnp.matmul(c, x.T, precision="highest") + jnp.sum(c * c, 1)[:, None], 0
        )

    def draw(mass: Float[Array, "r n"], u: Float[Array, "r t"]) -> Int[Array, "r t"]:
        total = jnp.cumsum(mass, 1)
        return jax.vmap(partial(jnp.searchsorted, side="right"))(total, u * total[:, -1:]).clip(
            0, x.shape[0] - 1
        )

    first = x[draw(jnp.broadcast_to(weights, (restarts, x.shape[0])), u[0, :, :1])[:, 0]]
    centers = jnp.zeros((restarts, k, x.shape[1]), x.dtype).at[:, 0].set(first)

    def add(j, state):
        centers, nearest = state
        c = x[draw(nearest * weights, u[j])]
        new = jnp.minimum(
            nearest[:, None],
            distances(c.reshape(restarts * trials, -1)).reshape(restarts, trials, -1),
        )
        best = jnp.argmin(jnp.sum(new * weights, 2), 1)
        rows = jnp.arange(restarts)
        return centers.at[:, j].set(c[rows, best]), new[rows, best]

    return lax.fori_loop(1, k, add, (centers, distances(first)))[0]


def _chunks(
    x: Float[Array, "m d"],
    w: Float[Array, " m"],
    mean: Float[Array, " d"],
    carry,
    visit: Callable,
    centres: int = 1,
):
    """Folds `visit(carry, start, chunk - mean, weights)` over all rows; stacks its further results.

    The last chunk is moved back to stay inside the array, rows seen before get weight 0: no padded
    copy. Chunks are CHUNK rows, fewer where the table of scores [centres, rows] would pass TABLE
    numbers.
    """
    m = x.shape[0]
    rows = min(CHUNK, max(TABLE // centres, 256))
    count = -(-m // rows)
    size = min(m, -(-m // count // 64) * 64)

    def step(carry, i):
        start = jnp.minimum(i * size, m - size)
        fresh = start + jnp.arange(size) >= i * size
        return visit(
            carry,
            start,
            lax.dynamic_slice_in_dim(x, start, size) - mean,
            jnp.where(fresh, lax.dynamic_slice_in_dim(w, start, size), 0),
        )

    return lax.scan(step, carry, jnp.arange(-(-m // size)))


def scores_by_row(centers: Float[Array, "r k d"], xb: Float[Array, "b d"]) -> Float[Array, "r k b"]:
    """|c|^2 - 2 c.x for all restarts in one product; rows last, the faster layout."""
    r, k, d = centers.shape
    c = centers.reshape(r * k, d)
    return (jnp.sum(c * c, 1)[:, None] - 2 * jnp.matmul(c, xb.T, precision="highest")).reshape(
        r, k, -1
    )


def moments(x: Float[Array, "m d"], w: Float[Array, " m"], mean: Float[Array, " d"]):
    """Weighted sums of (x - mean) [d] and of its square [d], and the weight."""

    def visit(carry, _, xb, wb):
        first = jnp.matmul(wb, xb, precision="highest")
        second = jnp.matmul(wb, xb * xb, precision="highest")
        return (carry[0] + first, carry[1] + second, carry[2] + wb.sum()), None

    zero = jnp.zeros(x.shape[1])
    return parallel.psum(_chunks(x, w, mean, (zero, zero, jnp.zeros(())), visit)[0])


def sums_of(
    nearest: Int[Array, "r m"], x: Float[Array, "m d"], w: Float[Array, " m"], k: int
) -> tuple[Float[Array, "r k d"], Float[Array, "r k"]]:
    """The weighted sum of the rows of every cluster, and its weight."""
    member = jnp.where(nearest[:, None] == jnp.arange(k)[:, None], w, 0)
    sums = jnp.matmul(member.reshape(-1, x.shape[0]), x, precision="highest")
    return sums.reshape(-1, k, x.shape[1]), member.sum(2)


def _means(
    sums: Float[Array, "r k d"], counts: Float[Array, "r k"], centers: Float[Array, "r k d"]
) -> Float[Array, "r k d"]:
    """The centres after a step of Lloyd; an empty cluster keeps its own."""
    # A weight can be tiny, so test for zero instead of dividing by max(counts, 1).
    mass = jnp.where(counts > 0, counts, 1)[..., None]
    return jnp.where((counts > 0)[..., None], sums / mass, centers)


def lloyd_steps(
    centers: Float[Array, "r k d"], sums: Callable[[Array], tuple[Array, Array]], count: int
) -> Float[Array, "r k d"]:
    """The centres after `count` steps; sums: as `sums_of`, of the clusters around given centres."""
    return lax.fori_loop(0, count, lambda _, centers: _means(*sums(centers), centers), centers)


def cluster_sums(
    x: Float[Array, "m d"],
    w: Float[Array, " m"],
    mean: Float[Array, " d"],
    centers: Float[Array, "r k d"],
):
    """For every restart and cluster the weighted sum [r k d] and the weight [r k]."""
    r, k, d = centers.shape

    def visit(carry, _, xb, wb):
        sums, counts = sums_of(jnp.argmin(scores_by_row(centers, xb), 1), xb, wb, k)
        return (carry[0] + sums, carry[1] + counts), None

    zero = (jnp.zeros((r, k, d)), jnp.zeros((r, k)))
    return parallel.psum(_chunks(x, w, mean, zero, visit, r * k)[0])


def lloyd(
    x,
    w,
    mean,
    centers: Float[Array, "r k d"],
    done: Bool[Array, " r"],
    steps: Int[Array, " r"],
    tol,
    limit,
    floor,
) -> dict[str, Array]:
    """Lloyd steps for all restarts until at most `floor` still move, a cluster is empty, or
    `limit`.

    Returns the centres after (`new`) and before (`old`) the last step, its `sums` and `counts`, the
    `steps` made by each restart, which are `done`.
    """

    def unfinished(s):
        return (s["steps"].max() < limit) & ((~s["done"]).sum() > floor) & ~s["empty"]

    def step(s):
        old, moving = s["new"], ~s["done"]
        sums, counts = cluster_sums(x, w, mean, old)
        new = jnp.where(moving[:, None, None], _means(sums, counts, old), old)
        vacant = jnp.any(counts == 0, 1)
        # With an empty cluster the step is not over: the host moves it, and only then looks at how
        # far the centres went.
        settled = (jnp.sum((new - old) ** 2, (1, 2)) <= tol) & ~vacant
        state = {
            "new": new,
            "old": old,
            "sums": sums,
            "counts": counts,
            "steps": s["steps"] + moving,
        }
        return state | {"done": s["done"] | settled, "empty": jnp.any(vacant & moving)}

    start = {
        "new": centers,
        "old": centers,
        "sums": jnp.zeros_like(centers),
        "counts": jnp.ones(centers.shape[:2]),
        "steps": steps,
    }
    return lax.while_loop(unfinished, step, start | {"done": done, "empty": jnp.zeros((), bool)})


def farthest(x, w, mean, centers: Float[Array, "r k d"]):
    """The k points farthest from their nearest centre, per restart: squared distances [r k], points
    [r k d], weights and clusters [r k].
    """
    r, k, _ = centers.shape

    def visit(carry, start, xb, wb):
        s = scores_by_row(centers, xb)
        dist = jnp.where(wb > 0, jnp.maximum(jnp.min(s, 1) + jnp.sum(xb * xb, 1), 0), -1)
        value = jnp.concatenate([carry[0], dist], 1)
        index = jnp.concatenate(
            [carry[1], jnp.broadcast_to(start + jnp.arange(dist.shape[1]), dist.shape)], 1
        )
        label = jnp.concatenate([carry[2], jnp.argmin(s, 1)], 1)
        top, where = lax.top_k(value, k)
        return (
            top,
            jnp.take_along_axis(index, where, 1),
            jnp.take_along_axis(label, where, 1),
        ), None

    none = (jnp.full((r, k), -1.0), jnp.zeros((r, k), jnp.int32), jnp.zeros((r, k), jnp.int32))
    value, index, label = _chunks(x, w, mean, none, visit, r * k)[0]
    return value, x[index] - mean, w[index], label


def inertias(x, w, mean, centers: Float[Array, "r k d"]):
    """Sum of squared distances per restart, by chunk [c r]: the host adds in double precision."""

    def visit(carry, _, xb, wb):
        nearest = jnp.min(scores_by_row(centers, xb), 1) + jnp.sum(xb * xb, 1)
        return carry, jnp.matmul(jnp.maximum(nearest, 0), wb, precision="highest")

    return _chunks(x, w, mean, (), visit, centers.shape[0] * centers.shape[1])[1]


def labels(x, w, mean, centers: Float[Array, "k d"]):
    """Labels [m] for one set of centres, and the inertia by chunk, exact for tight clusters."""

    def visit(labels, start, xb, wb):
        lab = jnp.argmin(scores_by_row(centers[None], xb)[0], 0).astype(jnp.int32)
        inertia = jnp.sum(wb * jnp.sum((xb - centers[lab]) ** 2, 1))
        return lax.dynamic_update_slice_in_dim(labels, lab, start, 0), inertia

    return _chunks(x, w, mean, jnp.zeros(x.shape[0], jnp.int32), visit, centers.shape[0])
