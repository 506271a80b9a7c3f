"""Labels of an image's pixels from cluster centres in feature space.

`arrays`: centers [k d + 2] (the last two columns are the place), mean and scale [d + 2] that
    standardise features, and, where labels are to follow the image, what `learn_refinement`
    found: Bayes' rule with features as evidence, log p(k | pixel) = -NATS d_k / gap + log p(k |
    place) with squared distances d, and then the neighbours of the same colour (`ops/crf.py`).
For the finer level of parts also "finer/centers" [f d + 2], "finer/parent" [f], "finer/gap" [k] and
"finer/log_prior": each pixel goes to one of the finer clusters in its cluster, by the same rule.

Measured with an independent segmenter of people, mean IoU of foreground / background over five sets
of 256 samples, k 3: on the default generator nearest centre 0.916 / 0.781, with neighbours 0.920 /
0.790, with the place as well 0.923 / 0.794; on another of poorer images 0.906 / 0.760, 0.909 /
0.767 and 0.916 / 0.781. Neighbours whatever their colour make it worse (0.915 / 0.777). From 4 to 9
nats the mean moves by 0.003 at most.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sis_jax.ops import crf, kmeans
from sis_jax.ops.resize import resize_bilinear

NATS = 6.0  # that the mean distance between nearest and second nearest centre counts for
CELLS = 32  # places per edge, at most
FAR = 1e9  # squared distance of a centre that is out of the question
_LOOKED_AT = 20_000


def learn_refinement(
    x: Float[np.ndarray, "n d"],
    centers: Float[np.ndarray, "k d"],
    labels: Int[np.ndarray, "n"],
    places: Float[np.ndarray, "n 2"],
    grid: int,
) -> dict[str, np.ndarray]:
    """{"gap": [1], "log_prior": [s s k]} from clustered points; places: (column, row) in [-1, 1],
    of a grid with so many along an edge.

    gap: mean difference of the two smallest squared distances. log_prior: share of each cluster at
        each place (Laplace's rule), so coarse that a place has as many points as there are
        clusters.
    """
    some = x[np.random.default_rng(0).permutation(len(x))[:_LOOKED_AT]]
    two = np.partition(np.square(centers).sum(1) - 2 * some @ centers.T, 1, axis=1)
    gap = (two[:, 1] - two[:, 0]).mean(keepdims=True)
    return {"gap": gap, "log_prior": log_prior(labels, places, len(centers), grid)}


def log_prior(
    labels: Int[np.ndarray, "n"], places: Float[np.ndarray, "n 2"], k: int, grid: int
) -> Float[np.ndarray, "s s k"]:
    """As `learn_refinement` describes it."""
    cells = int(np.clip(np.sqrt(len(labels) / k), 1, min(grid, CELLS)))
    column, row = np.clip((places.T + 1) / 2 * cells, 0, cells - 1).astype(np.int64)
    counts = np.bincount((row * cells + column) * k + labels, minlength=cells * cells * k).reshape(
        cells, cells, k
    )
    prior = (counts + 1) / (counts.sum(-1, keepdims=True) + k)
    return np.log(prior).astype(np.float32)


def with_centre(
    arrays: dict[str, np.ndarray], centre: Float[np.ndarray, "d"]
) -> dict[str, np.ndarray]:
    """`arrays` with one more cluster, as likely at each place as that of the nearest centre, so
    that the features decide between these two.
    """
    more = dict(arrays, centers=np.concatenate([arrays["centers"], centre[None]]))
    if "log_prior" in arrays:
        nearest = int(np.square(arrays["centers"] - centre).sum(1).argmin())
        more["log_prior"] = np.concatenate(
            [arrays["log_prior"], arrays["log_prior"][..., [nearest]]], -1
        )
    return more


def label_maps(
    features: tuple[Float[Array, "b _ _ _"], ...],
    image: Float[Array, "b h w 3"],
    arrays: dict[str, Array],
    align_corners: bool,
    smooth: bool = False,
    resolution: int | None = None,
) -> tuple[UInt8[Array, "b r r"], Float[Array, "b r r"]]:
    """Cluster of every pixel of square images, and confidence 1 - d1 / d2 of squared distances,
    0..1; with arrays of the finer level the finer cluster, and the lower confidence of the two.

    image: in [-1, 1], for outlines. resolution: of the labels; None takes the image's. Where labels
        follow the image, d2 is as far behind d1 as the odds against the second class are.
    """
    resolution = resolution or image.shape[1]
    labels, certainty = _decided(
        squared_distances(features, resolution, arrays, align_corners, smooth), image, arrays
    )
    if "finer/parent" not in arrays:
        return labels, certainty
    finer = {k.removeprefix("finer/"): v for k, v in arrays.items() if k.startswith("finer/")}
    distances = squared_distances(
        features, resolution, arrays | {"centers": finer["centers"]}, align_corners, smooth
    )
    inside = finer["parent"] == labels[..., None]
    if "gap" in finer:
        finer["gap"] = finer["gap"][labels]
    below, own = _decided(jnp.where(inside, distances, FAR), image, finer)
    return below, jnp.minimum(certainty, own)


def _decided(
    distances: Float[Array, "b r r k"], image: Float[Array, "b h w 3"], arrays: dict[str, Array]
) -> tuple[UInt8[Array, "b r r"], Float[Array, "b r r"]]:
    """Clusters and confidence from squared distances; arrays["gap"]: [1] or one per pixel."""
    if "log_prior" not in arrays:
        nearest, first, second = crf.largest_two(-distances)
        labels, least, apart = nearest.astype(jnp.uint8), -first, first - second
    else:
        least = distances.min(-1)
        nat = jnp.maximum(arrays["gap"], 1e-12) / NATS
        size = distances.shape[1], distances.shape[2]
        usual = resize_bilinear(arrays["log_prior"][None], size, antialias=False)
        labels, odds = crf.best(usual - (distances - least[..., None]) / nat[..., None], image)
        apart = odds * nat
    least = jnp.maximum(least, 0)
    return labels, jnp.clip(1 - least / jnp.maximum(least + apart, 1e-12), 0, 1)


def squared_distances(
    features: tuple[Float[Array, "b _ _ _"], ...],
    size: int,
    arrays: dict[str, Array],
    align_corners: bool,
    smooth: bool,
) -> Float[Array, "b h w k"]:
    """Of every pixel to every centre, upsampled tap by tap to `size` pixels."""
    centers, mean, scale = arrays["centers"], arrays["mean"], arrays["scale"]
    total = jnp.zeros(())
    at = 0
    for x in features:  # in the order of the taps, as the centres' columns are
        c = slice(at, at + x.shape[-1])
        at = c.stop
        y = (filtered(x, smooth) - mean[c]) * scale[c]
        own = jnp.sum(y * y, axis=-1, keepdims=True)
        scores = own + kmeans.scores(y, centers[:, c])
        total = total + resize_bilinear(
            scores, (size, size), align_corners=align_corners, antialias=False
        )
    place = (jnp.asarray(place_of(size)) - mean[at:]) * scale[at:]
    return total + jnp.sum(place * place, -1, keepdims=True) + kmeans.scores(place, centers[:, at:])


def place_of(size: int) -> Float[np.ndarray, "size size 2"]:
    """Column and row of each pixel's centre, in [-1, 1]."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    return np.stack(np.meshgrid(at, at), axis=-1)


def filtered(x: Float[Array, "b h w c"], smooth: bool) -> Float[Array, "b h w c"]:
    """float32; with [1,2,1] / 4 along both axes if asked, edges repeated."""
    x = x.astype(jnp.float32)
    for axis in (1, 2) if smooth else ():
        n = x.shape[axis]
        padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode="edge")
        a, b, c = (jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(3))
        x = 0.25 * a + 0.5 * b + 0.25 * c
    return x
