"""The finer of two levels of parts: clusters are split further, each by itself, so that the outline
of the coarse level cannot change.

Few clusters give the better background, many the better parts (eyes, nose, mouth). How many finer
ones: k-means on halves of the samples, drawn `DRAWS` times, each in a few principal components; for
each k the mean adjusted Rand index of all pairs of these clusterings on the same points. The
smallest k within `TOLERANCE` of the best is taken, and from the clustering that agrees most with
the others k-means goes on with all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sis_jax.ops import selection, sweep

KS = (3, 4, 5, 6, 7, 8)
DRAWS = 3  # of two halves each
POINTS = 2_000  # of a part, per half and to compare on: one shape, so one compilation
MOST = 16_384  # points of a part that k-means goes on with
RESTARTS = 4
STEPS = 50  # of k-means with all samples, at most
MOVING = 1e-3  # share of the labels that change: below this, k-means is at its end
TOLERANCE = 0.05
CRITERION = (
    f"in each part of the foreground the smallest k within {TOLERANCE} of the highest agreement "
    f"(mean adjusted Rand index between k-means on {2 * DRAWS} halves of the samples)"
)
_LOOKED_AT = 32_768  # points at a time, where all are gone through


@dataclass(frozen=True)
class Finer:
    """centers and the coarse clusters they lie in, their parents.

    agreement: mean overlap of each with its partner in the other halves' clusterings, 1 where the
        parent is not split. rows: what was tried, {"part", "k", "agreement", "chosen"}.
    """

    centers: Float[np.ndarray, "k d"]
    parent: Int[np.ndarray, "k"]
    agreement: Float[np.ndarray, "k"]
    rows: list[dict[str, Any]]


def split(
    x: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    centers: Float[np.ndarray, "c d"],
    parts: Sequence[int],
    samples: int,
    seed: int,
) -> Finer:
    """The clusters in `parts` split into `KS` finer ones each, the others kept as they are.

    x: the points of each of `samples` samples, one sample after the other, with their coarse
        labels. A cluster of hardly any points is not split.
    """
    sample = np.arange(len(x)) // (len(x) // samples)
    found, parent, agreement, rows = [], [], [], []
    for part in range(len(centers)):
        inside = np.flatnonzero(labels == part)
        own, stable = centers[part][None], np.ones(1)
        if part in parts and len(inside) > 10 * max(KS):
            own, stable, tried = _split_one(x, inside, sample, [seed, part])
            rows += [{"part": part, **row} for row in tried]
        found.append(own)
        parent += [part] * len(own)
        agreement.append(stable)
    return Finer(np.concatenate(found), np.array(parent, np.int32), np.concatenate(agreement), rows)


def _split_one(
    x: Float[np.ndarray, "n d"],
    inside: Int[np.ndarray, "m"],
    sample: Int[np.ndarray, "n"],
    seed: list[int],
) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, "k"], list[dict[str, Any]]]:
    """(centres, agreement per cluster, rows of the sweep) of the points `inside` one part."""
    rng = np.random.default_rng(seed)
    groups = [inside]
    for _ in range(DRAWS):
        order = rng.permutation(sample[-1] + 1)
        first = np.isin(sample[inside], order[: len(order) // 2])
        groups += [half if len(half) else inside for half in (inside[first], inside[~first])]
    drawn = [rng.choice(g, POINTS, replace=len(g) < POINTS) for g in groups]
    points = sweep.project(x[np.concatenate(drawn)]).reshape(len(drawn), POINTS, -1)
    found = sweep.cluster_many(points[1:], KS, points[0], seed, RESTARTS)
    rows = [
        {"k": k, "agreement": _mean_agreement(f, k), "chosen": False} for k, f in zip(KS, found)
    ]
    enough = max(row["agreement"] for row in rows) - TOLERANCE
    chosen = next(i for i, row in enumerate(rows) if row["agreement"] >= enough)
    rows[chosen]["chosen"] = True
    start, overlap = _typical(found[chosen], KS[chosen])
    used = np.unique(start)  # fewer than k where points coincide
    if len(used) < 2:
        return x[inside].mean(0, keepdims=True), np.ones(1), rows
    means = np.stack([x[drawn[0][start == i]].mean(0) for i in used])
    even = np.linspace(0, len(inside) - 1, min(MOST, len(inside))).astype(int)
    return _lloyd(x[inside[even]], means), overlap[used], rows


def _lloyd(x: Float[np.ndarray, "m d"], centers: Float[np.ndarray, "k d"]) -> np.ndarray:
    """The centres after Lloyd's steps, until hardly a label changes. In NumPy: every part has
    other shapes, and each would be compiled.
    """
    labels = np.full(len(x), -1)
    for _ in range(STEPS):
        found = (np.square(centers).sum(1) - 2 * (x @ centers.T)).argmin(1)
        if (found != labels).mean() < MOVING:
            break
        labels, member = found, np.eye(len(centers), dtype=x.dtype)[found]
        count = member.sum(0)[:, None]
        centers = np.where(count > 0, member.T @ x / np.maximum(count, 1), centers)
    return centers


def _mean_agreement(found: Sequence[Int[np.ndarray, "j"]], k: int) -> float:
    return float(np.mean([selection.agreement(a, b, k) for a, b in combinations(found, 2)]))


def _typical(
    found: Sequence[Int[np.ndarray, "j"]], k: int
) -> tuple[Int[np.ndarray, "j"], Float[np.ndarray, "k"]]:
    """The clustering that overlaps most with the others, and how much each of its clusters does."""
    overlaps = [
        np.mean([selection.cluster_agreement(a, b, k) for b in found if b is not a], axis=0)
        for a in found
    ]
    best = int(np.argmax([o.min() for o in overlaps]))
    return found[best], overlaps[best]


def nearest(
    x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], finer: Finer
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The finer cluster of every point, among those in its coarse one, and the squared distances of
    the nearest centre and of the next, infinite where there is none.
    """
    found, two = np.empty(len(x), np.int64), np.full((len(x), 2), np.inf, np.float32)
    for at in range(0, len(x), _LOOKED_AT):
        rows = slice(at, at + _LOOKED_AT)
        own = np.square(x[rows]).sum(1)[:, None]
        distance = own + np.square(finer.centers).sum(1) - 2 * x[rows] @ finer.centers.T
        distance = np.where(finer.parent == labels[rows, None], np.maximum(distance, 0), np.inf)
        found[rows] = distance.argmin(1)
        two[rows] = np.partition(distance, 1, axis=1)[:, :2]
    return found, two[:, 0], two[:, 1]
