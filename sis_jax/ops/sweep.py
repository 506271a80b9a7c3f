"""Choosing layer and k without labels, by many small k-means on the same pixels.

Criterion: the layer with the highest mean consensus at few clusters, and there the k with the
    highest agreement x consensus.
consensus: mean adjusted Rand index with the clusterings of every other layer into few clusters.
    Real parts show at several depths of a generator, texture and position at one; a mean over
    several k is more stable than one fit.
agreement: adjusted Rand index between clusterings of two halves of the samples. A silhouette
    estimate is kept in the table but does not decide: it grows towards fine, meaningless layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sis_jax.ops import kmeans_steps as steps
from sis_jax.ops import selection

FEW = 6  # clusters: up to here a layer is judged by its clusterings
DIMENSIONS = (
    64  # principal components that are clustered: one shape, so one compilation, for every layer
)
RESTARTS = 3
STEPS = 25
JUDGED = 4_096
SILHOUETTES = 1_000


def sweep(
    columns: Mapping[str, Float[np.ndarray, "n p d"]],
    ks: Sequence[int],
    seed: int = 0,
    given: int | None = None,
) -> list[dict[str, Any]]:
    """One row {layer, k, agreement, consensus, silhouette, score} per layer and k.

    columns: for each layer the standardised features of the same p pixels of n samples. The first
        half of the samples is clustered against the second.
    given: one more k that is wanted whatever the table shows; it changes no other row.
    """
    more = [given] if given is not None and given not in ks else []
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    labels: list[Int[np.ndarray, "j"]] = []
    judged: np.ndarray | None = None
    for layer, x in columns.items():
        half = len(x) // 2
        points = project(x.reshape(-1, x.shape[-1]))
        a, b = np.split(points[: 2 * half * x.shape[1]], 2)
        if judged is None:
            judged = rng.permutation(2 * len(a))[:JUDGED]
        look = np.concatenate([a, b])[judged]
        halves = np.stack([a, b])
        found = cluster_many(halves, ks, look, seed) + (
            cluster_many(halves, more, look, seed) if more else []
        )
        for k, (one, two) in zip([*ks, *more], found):
            apart = selection.silhouette(look[:SILHOUETTES], one[:SILHOUETTES])
            rows.append(
                {
                    "layer": layer,
                    "k": int(k),
                    "agreement": float(selection.agreement(one, two, k)),
                    "silhouette": apart,
                }
            )
            labels.append(one)
    few = [
        (r["layer"], theirs)
        for r, theirs in zip(rows, labels)
        if r["k"] <= FEW and r["k"] not in more
    ]
    for row, own in zip(rows, labels):
        others = [
            selection.agreement(own, theirs, max(FEW, row["k"]))
            for layer, theirs in few
            if layer != row["layer"]
        ]
        row["consensus"] = float(np.mean(others)) if others else 1.0
        row["score"] = row["agreement"] * row["consensus"]
        row["chosen"] = False
    return rows


def consensus_of_layers(rows: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, float]:
    """Mean consensus of each layer at those of `ks` that are few, which decides between layers."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["k"] <= FEW and row["k"] in ks:
            found.setdefault(row["layer"], []).append(row["consensus"])
    return {layer: float(np.mean(values)) for layer, values in found.items()}


def choose(
    rows: Sequence[dict[str, Any]], layers: Mapping[str, float], layer: str, k: int | None
) -> dict[str, Any]:
    """The row of the sweep to go on with; `layer` may be "auto", k None."""
    best = max(layers, key=lambda name: layers[name]) if layer == "auto" else layer
    chosen = max(
        (r for r in rows if r["layer"] == best and k in (None, r["k"])), key=lambda r: r["score"]
    )
    chosen["chosen"] = True
    return chosen


def criterion(layer: str, k: int | None) -> str:
    """The reasons of `choose`, in words: only for the values left to it."""
    why_layer = (
        "the layer has the highest mean consensus (adjusted Rand index with the clusterings of "
        f"all other layers) over k up to {FEW}"
    )
    why_k = (
        "k has the highest score = agreement (adjusted Rand index between two halves of the "
        "samples) x consensus there"
    )
    reasons = "; ".join(
        [
            why_layer if layer == "auto" else "the layer was given",
            why_k if k is None else "k was given",
        ]
    )
    return f"{reasons[0].upper()}{reasons[1:]}; silhouette is shown but does not decide."


def raised(found: Mapping[str, Any], k: int) -> dict[str, Any]:
    """The table of a sweep whose k gave way to a larger one."""
    best = next(row for row in found["rows"] if row["chosen"])
    rows = [
        row | {"chosen": row["layer"] == best["layer"] and row["k"] == k} for row in found["rows"]
    ]
    why = f"With k {best['k']} no background was found; {k} is the next with which one is."
    return {**found, "criterion": f"{found['criterion']} {why}", "rows": rows}


def project(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 64"]:
    """The first principal components, filled up with zeros."""
    centred = points - points.mean(0)
    vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))[1][:, ::-1][:, :DIMENSIONS]
    out = np.zeros((len(points), DIMENSIONS), np.float32)
    out[:, : vectors.shape[1]] = centred @ vectors.astype(np.float32)
    return out


def cluster_many(
    halves: Float[np.ndarray, "h m d"],
    ks: Sequence[int],
    look: Float[np.ndarray, "j d"],
    seed: int | Sequence[int],
    restarts: int = RESTARTS,
) -> list[tuple[Int[np.ndarray, "j"], ...]]:
    """For every k the labels of `look` by the best of a few k-means on each half."""
    rng = np.random.default_rng(seed)
    most = max(ks)
    # [h, K, R, most, d]
    starts = np.stack(
        [[[_plus_plus(h, k, most, rng) for _ in range(restarts)] for k in ks] for h in halves]
    )
    alive = np.arange(most)[None] < np.asarray(ks)[:, None]
    out = np.asarray(_lloyd_all(halves, starts, alive, look))
    return [tuple(out[:, i]) for i in range(len(ks))]


def _plus_plus(
    x: Float[np.ndarray, "m d"], k: int, most: int, rng: np.random.Generator
) -> Float[np.ndarray, "most d"]:
    """k-means++ (Arthur and Vassilvitskii 2007); rows from k on are unused."""
    centers = np.zeros((most, x.shape[1]), np.float32)
    centers[0] = x[rng.integers(len(x))]
    nearest = np.full(len(x), np.inf, np.float32)
    for i in range(1, k):
        nearest = np.minimum(nearest, np.square(x - centers[i - 1]).sum(1))
        total = nearest.sum(dtype=np.float64)
        centers[i] = x[
            rng.choice(len(x), p=nearest / total if total > 0 else None)
            if total > 0
            else rng.integers(len(x))
        ]
    return centers


@jax.jit
def _lloyd_all(
    halves: Float[Array, "h m d"],
    starts: Float[Array, "h K R most d"],
    alive: Bool[Array, "K most"],
    look: Float[Array, "j d"],
) -> Int[Array, "h K j"]:
    """Labels by Lloyd from every start, the best of the restarts by inertia."""
    every = starts.shape[1:3]
    unused = jnp.repeat(~alive, every[1], 0)[..., None]

    def of_half(half: tuple[Array, Array]) -> tuple[Array, Array]:
        x, start = half
        weights, k = jnp.ones(len(x)), start.shape[2]

        def scores(points: Array, centers: Array) -> Float[Array, "r most n"]:
            return jnp.where(unused, jnp.inf, steps.scores_by_row(centers, points))

        def sums(centers: Array) -> tuple[Array, Array]:
            return steps.sums_of(jnp.argmin(scores(x, centers), 1), x, weights, k)

        centers = steps.lloyd_steps(start.reshape(-1, k, x.shape[1]), sums, STEPS)
        labels, inertia = jnp.argmin(scores(look, centers), 1), scores(x, centers).min(1).sum(1)
        return labels.reshape(*every, -1), inertia.reshape(every)

    # [h, K, R, j], [h, K, R]
    labels, inertia = jax.lax.map(of_half, (halves, starts))
    best = jnp.argmin(inertia, axis=2)
    return jnp.take_along_axis(labels, best[:, :, None, None], axis=2)[:, :, 0]
