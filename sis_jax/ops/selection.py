"""Judging a clustering without labels: agreement, silhouette, which clusters are background."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

BORDER = 0.05  # width of the frame (top, left, right), as a fraction of the edge length
BORDER_RATIO = 1.5  # a background cluster covers the frame this much more than the image
BORDER_LEAST = 0.25  # share of the frame that such clusters hold together
SIDES_LEAST = 0.85  # share of the sides that clusters at least as common there hold together
BORDER_ODDS = 2.2  # see `only_just`


def overlap(a: Int[np.ndarray, "n"], b: Int[np.ndarray, "n"], k: int) -> Int[np.ndarray, "k k"]:
    """Pixels by (label in a, label in b)."""
    return np.bincount(a.astype(np.int64) * k + b, minlength=k * k).reshape(k, k)


def agreement(a: Int[np.ndarray, "n"], b: Int[np.ndarray, "n"], k: int) -> float:
    """Adjusted Rand index of two clusterings (Hubert and Arabie 1985): 1 = the same, 0 = chance."""
    table = overlap(a, b, k).astype(np.float64)

    def pairs(x: np.ndarray) -> float:
        return float((x * (x - 1)).sum() / 2)

    n = table.sum()
    rows, columns = pairs(table.sum(1)), pairs(table.sum(0))
    expected, most = rows * columns / max(n * (n - 1) / 2, 1), (rows + columns) / 2
    return 1.0 if most == expected else (pairs(table) - expected) / (most - expected)


def cluster_agreement(
    a: Int[np.ndarray, "n"], b: Int[np.ndarray, "n"], k: int
) -> Float[np.ndarray, "k"]:
    """For each cluster of a the IoU with its partner in b, matched one to one (Hungarian)."""
    from scipy.optimize import linear_sum_assignment  # late: slow to import

    table = overlap(a, b, k).astype(np.float64)
    union = table.sum(1)[:, None] + table.sum(0)[None] - table
    iou = table / np.maximum(union, 1)
    rows, columns = linear_sum_assignment(-iou)
    found = np.zeros(k)
    found[rows] = iou[rows, columns]
    return found


def silhouette(x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"]) -> float:
    """Mean silhouette (Rousseeuw 1987), -1..1; quadratic in n, for a few thousand points."""
    labels = np.unique(labels, return_inverse=True)[1]
    k = int(labels.max()) + 1
    if k < 2:
        return 0.0
    x = x - x.mean(0)  # far from the origin the expanded square below would lose its digits
    square = (x * x).sum(1)
    distance = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * (x @ x.T), 0))
    member = np.eye(k, dtype=np.float32)[labels]
    counts = member.sum(0)
    total = distance @ member  # [n, k] summed distance to each cluster
    own = np.take_along_axis(total, labels[:, None], 1)[:, 0] / np.maximum(counts[labels] - 1, 1)
    mean = total / counts
    mean[np.arange(len(labels)), labels] = np.inf
    other = mean.min(1)
    value = (other - own) / np.maximum(np.maximum(own, other), 1e-12)
    return float(np.where(counts[labels] > 1, value, 0).mean())


def frame(height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """5 % of the resolution at top, left and right; people leave the image at the bottom."""
    mask = np.zeros((height, width), bool)
    rows, columns = max(1, round(BORDER * height)), max(1, round(BORDER * width))
    mask[:rows] = True
    mask[:, :columns] = True
    mask[:, -columns:] = True
    return mask


def background(
    share: Float[np.ndarray, "k"],
    frame_share: Float[np.ndarray, "k"],
    side_share: Float[np.ndarray, "k"],
) -> tuple[Bool[np.ndarray, "k"], bool, str]:
    """Which clusters are the background, whether the rule decided clearly, and why.

    share, frame_share, side_share: of each cluster in the image, its frame, and its outermost
        columns, left and right.
    Rule: a cluster that covers the frame at least 1.5 times as much as the image, if all such
        clusters hold a quarter of the frame. Around a small object no background can be so much
        more common there, and a street in front of it is not on top: else those that are at least
        as common at the sides as in the image, where every row counts alike, if they hold nearly
        all of the sides. With none (or all): the one that gains most from image to frame, unsure.
    """
    outside = (frame_share >= BORDER_RATIO * share) & (share > 0)
    around = (side_share >= share) & (share > 0)
    rules = (outside, frame_share, BORDER_LEAST), (around, side_share, SIDES_LEAST)
    for chosen, held, least in rules:
        if chosen.any() and not chosen.all() and held[chosen].sum() >= least:
            names = ", ".join(str(i) for i in np.flatnonzero(chosen))
            plural = "clusters" if chosen.sum() > 1 else "cluster"
            return (
                chosen,
                True,
                f"{plural} {names}: {float(frame_share[chosen].sum()):.0%} of the frame, "
                f"{float(share[chosen].sum()):.0%} of the image",
            )
    best = np.arange(len(share)) == int(np.argmax(frame_share - share))
    i = int(np.argmax(best))
    why = (
        f"no group of clusters is {BORDER_RATIO} times as common on the frame as in the image "
        "and holds a quarter of the frame"
    )
    return (
        best,
        False,
        f"{why}; cluster {i} comes closest ({float(frame_share[i]):.0%} of the frame, "
        f"{float(share[i]):.0%} of the image)",
    )


def only_just(clusters: Iterable[Mapping[str, Any]]) -> list[int]:
    """Background clusters by a narrow margin: odds on the frame below 2.2 times those in the image.

    Odds, since a large background cannot be much more common on the frame. On the default generator
    chosen clusters of at most 35 % background came to 1.7 to 2.2, mostly right ones to 2.4 and
    more.
    """

    def odds(share: float) -> float:
        return share / max(1 - share, 1e-9)

    return [
        i
        for i, c in enumerate(clusters)
        if c["background"] and odds(c["border_share"]) < BORDER_ODDS * odds(c["share"])
    ]


def describe(
    labelled: Iterable[tuple[Any, np.ndarray, np.ndarray]], k: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Facts per cluster, and the decision on the background, from a stream of (images, clusters
    UInt8[b h w], confidence Float[b h w]).

    Returns ([{"share", "border_share", "background", "confidence"}] per cluster, {"found", "why"}).
    """
    area, border, sides, certainty = (np.zeros(k) for _ in range(4))
    for _, labels, confidence in labelled:
        edge = frame(*labels.shape[1:])
        outer = edge[-1]
        area += np.bincount(labels.ravel(), minlength=k)
        border += np.bincount(labels[:, edge].ravel(), minlength=k)
        sides += np.bincount(labels[:, :, outer].ravel(), minlength=k)
        certainty += np.bincount(labels.ravel(), confidence.ravel(), minlength=k)
    return _facts(area, border, sides, certainty)


def describe_points(
    labels: Int[np.ndarray, "n"],
    places: Float[np.ndarray, "n 2"],
    confidence: Float[np.ndarray, "n"],
    k: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """As `describe`, from single pixels; places: (column, row), -1 and 1 at the image's edges."""
    column, row = places.T
    outer = np.abs(column) > 1 - 2 * BORDER
    edge = outer | (row < 2 * BORDER - 1)
    area, border, sides = (
        np.bincount(part, minlength=k).astype(float)
        for part in (labels, labels[edge], labels[outer])
    )
    return _facts(area, border, sides, np.bincount(labels, confidence, minlength=k))


def _facts(
    area: Float[np.ndarray, "k"],
    border: Float[np.ndarray, "k"],
    sides: Float[np.ndarray, "k"],
    confidence: Float[np.ndarray, "k"],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    share, border_share = area / area.sum(), border / max(border.sum(), 1)
    chosen, certain, why = background(share, border_share, sides / max(sides.sum(), 1))
    facts = [
        {
            "share": float(share[i]),
            "border_share": float(border_share[i]),
            "background": bool(chosen[i]),
            "confidence": float(confidence[i] / max(area[i], 1)),
        }
        for i in range(len(area))
    ]
    return facts, {"found": certain, "why": why}
