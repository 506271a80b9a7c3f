"""The counts behind every segmentation score: a confusion matrix, rows = ground truth; and
distances between two sets of feature vectors.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer, Shaped
from numpy.typing import ArrayLike

from sis_jax.types import UsageError

# ------------------------------------------------------------------------------------- segmentation

IGNORE = 255  # in a mask: pixels of no class


def confusion(
    gt: Shaped[np.ndarray, "..."], pred: Shaped[np.ndarray, "..."], n_classes: int
) -> Int64[np.ndarray, "k k"]:
    """Pixel counts [ground truth, prediction]; add them up over images.

    gt, pred: class ids 0..n_classes - 1 of one shape; where gt is 255, pixels are left out. Raises
        UsageError for other shapes or ids.
    """
    gt, pred = np.asarray(gt), np.asarray(pred)
    if gt.shape != pred.shape:
        raise UsageError(
            f"ground truth and prediction differ in shape: {gt.shape} and {pred.shape}; resize "
            "one of them first"
        )
    keep = gt != IGNORE
    gt, pred = gt[keep].astype(np.int64), pred[keep].astype(np.int64)
    for kind, ids in (("ground truth", gt), ("prediction", pred)):
        if ids.size and (ids.min() < 0 or ids.max() >= n_classes):
            bad = ids[(ids < 0) | (ids >= n_classes)][0]
            raise UsageError(f"the {kind} holds class id {bad}, expected 0 to {n_classes - 1}")
    return np.bincount(gt * n_classes + pred, minlength=n_classes**2).reshape(n_classes, n_classes)


def iou(counts: Integer[np.ndarray, "k k"]) -> Float[np.ndarray, "k"]:
    """Intersection over union per class, 0..1; NaN for a class that is in neither mask."""
    hit = np.diagonal(counts)
    return ratio(hit, counts.sum(0) + counts.sum(1) - hit)


def mean_iou(counts: Integer[np.ndarray, "k k"]) -> float:
    """Mean of `iou` over the classes that occur; NaN when nothing was counted."""
    return _mean(iou(counts))


def boundary_band(mask: Shaped[np.ndarray, "h w"], radius: float) -> Bool[np.ndarray, "h w"]:
    """The trimap: pixels with another class at most `radius` pixels away (Euclidean).

    Pixels outside the image count for nothing, and neither do those of value 255.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise UsageError(f"a mask has two axes [h w], got shape {mask.shape}")
    valid = np.ones(mask.shape, bool) if mask.dtype == bool else mask != IGNORE
    # Moved by every offset of the disk: the same time for any number of classes.
    band, reach = np.zeros(mask.shape, bool), int(radius)
    for dy in range(reach + 1):
        for dx in range(-reach, reach + 1):
            # Of two opposite offsets one is enough: both pixels of a differing pair are in the
            # band.
            if (dy == 0 and dx <= 0) or dy * dy + dx * dx > radius * radius:
                continue
            here = (slice(dy, None), slice(max(dx, 0), min(dx, 0) or None))
            there = (slice(None, -dy or None), slice(max(-dx, 0), min(-dx, 0) or None))
            differs = (mask[here] != mask[there]) & valid[here] & valid[there]
            band[here] |= differs
            band[there] |= differs
    return band


def hungarian(counts: Integer[np.ndarray, "k p"]) -> Int64[np.ndarray, "p"]:
    """The one-to-one matching of predicted to true classes with most pixels (Kuhn 1955), or -1. It
    uses the ground truth.
    """
    from scipy.optimize import linear_sum_assignment  # late: slow to import

    rows, columns = linear_sum_assignment(counts, maximize=True)
    matched = np.full(counts.shape[1], -1, np.int64)
    matched[columns] = rows
    return matched


def majority(counts: Integer[np.ndarray, "k p"]) -> Int64[np.ndarray, "p"]:
    """Each predicted class goes to the true class it shares most pixels with, -1 if never
    predicted. It uses the ground truth, and rewards many small classes.
    """
    return np.where(counts.sum(0) > 0, counts.argmax(0), -1).astype(np.int64)


def resampling_weights(n: int, resamples: int, seed: int) -> Int64[np.ndarray, "r n"]:
    """How often each of n images is drawn in each bootstrap resample (Efron 1979)."""
    return np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=resamples)


def ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    """part / whole elementwise in float64, NaN where the whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


# ------------------------------------------------------------------------------- sets of features


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared Fréchet distance between the
    Gaussians of two sets of features, 0 for equal sets (Dowson and Landau 1982; with Inception's
    features and 50,000 samples it is the FID of Heusel et al. 2017).

    The root has the trace of (R S_b R)^(1/2), R = S_a^(1/2), which is symmetric. In float64. Small
    sets make it larger, by about c (1 / n + 1 / m): compare at one n and m.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    _check_rows(a, b, least=2)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    offset = np.square(a.mean(0) - b.mean(0)).sum()
    return float(offset + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def kernel_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy with the kernel (x y / d + 1)^3
    (Binkowski et al. 2018): 0 on average for two samples of one distribution, however small, and
    then as often negative.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    _check_rows(a, b, least=2)
    n, m, d = len(a), len(b), a.shape[1]
    inside = sum(
        (gram.sum() - np.trace(gram)) / (len(gram) * (len(gram) - 1))
        for gram in (_cubic(a, a, d), _cubic(b, b, d))
    )
    return float(inside - 2 * _cubic(a, b, d).sum() / (n * m))


def _cubic(a: np.ndarray, b: np.ndarray, d: int) -> np.ndarray:
    return (a @ b.T / d + 1) ** 3


def manifold_overlap(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], k: int = 3
) -> tuple[float, float]:
    """(precision, recall), 0..1: the share of `fake` inside the manifold of `real`, and that of
    `real` inside that of `fake` (Kynkäänniemi et al. 2019).

    A manifold is the union of balls around its samples that reach their k-th neighbours. Two
    samples of one distribution do not reach 1: compare at one n, m and k.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    _check_rows(real, fake, least=k + 1)
    between = _squared_distances(fake, real)
    near_real, near_fake = (
        np.partition(_squared_distances(x, x), k, axis=1)[:, k] for x in (real, fake)
    )
    inside_real = (between <= near_real).any(1)
    inside_fake = (between <= near_fake[:, None]).any(0)
    return float(inside_real.mean()), float(inside_fake.mean())


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T


def _check_rows(a: np.ndarray, b: np.ndarray, least: int) -> None:
    if min(len(a), len(b)) < least:
        raise UsageError(
            f"got sets of {len(a)} and {len(b)} features, expected at least {least} in each"
        )
