"""Segmentation in Style: k-means on a generator's features (Pakhomov et al. 2021, arXiv
2107.12518).

J = sum_n sum_k r_nk |x_n - mu_k|^2, r_nk = 1 for the nearest centre; x_n are the features of one
pixel of one sample, pooled over about fifty samples. A new image is labelled by its nearest
centres.
Where we differ, and why (`RECIPES["paper"]` is the published setting):
* Features may come from several taps and are standardised per channel: raw, the few channels with a
  large norm decide every distance. Every tap counts the same.
* Labels come from class scores |mu|^2 - 2 x.mu, upsampled per tap at their own size: equal to the
  labels of upsampled features, at k / channels of the memory.
* An even subset of each sample's pixels: memory does not grow with the number of samples.
* Labels follow the image (`refine`): the nearest centre is evidence, weighed with the usual cluster
  at that place and with neighbours of the same colour (`ops/cluster_labels.py`).
* Where k is left open there are two levels: the foreground is split further (`ops/levels.py`); and
  k rises until the background is found.
* k and layer can be chosen by a sweep (`ops/sweep.py`), the background by a border rule, and
  `position_weight` adds the pixel's place to its features, which splits left from right.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sis_jax.methods.base import (
    OUTLINE,
    SHOWN,
    Arrays,
    Fitted,
    Labelled,
    features_of,
    rendered,
    small_image,
)
from sis_jax.methods.settings import SegmentationInStyleSettings, check
from sis_jax.ops import kmeans, levels, selection, sweep
from sis_jax.ops.cluster_labels import (
    CELLS,
    filtered,
    label_maps,
    learn_refinement,
    log_prior,
    place_of,
)
from sis_jax.ops.resize import resize_bilinear
from sis_jax.ops.sampling import collect, map_samples, probe, quantised, sample_seeds
from sis_jax.types import Generator, Samples, SisError, UsageError, check_taps

RECIPES: dict[str, dict[str, Any]] = {
    # The notebook that trains the published face model: 50 samples, psi 0.7, "layer 7", 128 x 128
    # grid, K = 9, ten restarts, raw features.
    "paper": {
        "k": 9, "layer": "64x64", "n": 50, "truncation": 0.7, "grid": 128, "normalize": "none",
        "n_init": 10, "max_points": 819_200, "align_corners": True, "smooth": "off",
        "refine": "none",
    },
}  # fmt: skip

SWEEP_KS = (3, 4, 5, 6, 8, 10)
SWEEP_POINTS = 10_000
# Largest share of a tap's variance between the phases of a 2 x 2 grid: 0.03 at 8 x 8 and less above
# in the default, 0.11 to 0.39 in a DCGAN.
CHECKERBOARD = 0.05
_PROBED = 4096  # samples, more than are drawn in the time of a trial
_LOOKED_AT = 32_768  # points at a time, where all are gone through


@dataclass(frozen=True)
class SegmentationInStyle(SegmentationInStyleSettings):
    """Parts by k-means on generator features; settings: `SegmentationInStyleSettings`."""

    wants: ClassVar[tuple[str, ...]] = ()
    clusters_by_k: ClassVar[bool] = True
    adds_clusters: ClassVar[bool] = True
    shaky_cure: ClassVar[str] = "merge them with a neighbour, lower k, or raise n"

    def fit(self, gen: Generator, seed: int = 0, finer: bool = True) -> Fitted:
        """Learn parts from `n` samples of `gen`. The same seed gives the same parts.

        finer: also the finer level, where k is "auto". Raises UsageError for settings that cannot
        work with this generator, SisError for NaN features.
        """
        self._check(gen)
        seeds = sample_seeds(seed, self.n)
        method, found = self._smoothed(gen, seeds), None
        if self.k == "auto" or self.layer == "auto":
            method, found = method._swept(gen, seeds, seed)
        taps = method.taps()
        points = method._points(gen, seeds, taps)
        mean, scale, position = _standardise(points, method, method._widths(gen, taps))
        places = points[..., -2:].reshape(-1, 2).copy()
        x = _scaled(points, mean, scale * position, place=self.position_weight > 0)
        learned = gen, seeds, x, places, (mean, scale, position), seed
        arrays, labels, facts, background = method._clustered(*learned)
        if found is not None and self.k == "auto" and not background["found"]:
            for k in (k for k in SWEEP_KS if k > len(arrays["centers"])):
                larger = replace(method, k=k)
                more = larger._clustered(*learned)
                if more[-1]["found"]:
                    method, (arrays, labels, facts, background) = larger, more
                    found = sweep.raised(found, k)
                    break
        stable = _stability(x, labels, self.n, len(arrays["centers"]), seed)
        clusters = tuple(
            {"id": i, "agreement": float(stable[i])} | fact for i, fact in enumerate(facts)
        )
        fitted = Fitted(method, arrays, clusters, background, found)
        if self.k != "auto" or not finer:
            return fitted
        return method._with_finer(fitted, gen, x, labels, places, seed)

    def taps(self, arrays: Arrays | None = None) -> tuple[str, ...]:
        """The features that are compared; `layer` must be resolved (not "auto")."""
        return tuple(self.layer.split("+"))

    # labelling

    def predict(
        self, arrays: Arrays, samples: Samples, gen: Generator | None = None
    ) -> UInt8[np.ndarray, "n h w"]:
        """Cluster of every pixel of samples made with these taps; `gen` is not looked at."""
        features = features_of(samples, self.taps())
        smooth = self.smooth == "on"
        labels, _ = _label(features, samples.images, dict(arrays), self.align_corners, smooth)
        return np.asarray(labels)

    def label_seeds(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int], truncation: float | None = None
    ) -> Labelled:
        """Stream (images, clusters, confidence in 0..1) for seeds, in batches."""
        psi = self.truncation if truncation is None else truncation
        yield from map_samples(
            gen, list(seeds), _label_body, truncation=psi, shared=(dict(arrays),),
            outline=small_image(gen), **self._static(),
        )  # fmt: skip

    def _small_labels(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int]
    ) -> Iterator[tuple[None, UInt8[np.ndarray, "b r r"], Float[np.ndarray, "b r r"]]]:
        """Stream (None, clusters, confidence) at `OUTLINE` pixels: only the needed layers run."""
        for label, confidence in map_samples(
            gen, list(seeds), _label_body, truncation=self.truncation, shared=(dict(arrays),),
            outline=small_image(gen), small=True, **self._static(),
        ):  # fmt: skip
            yield None, label, confidence

    def _static(self) -> dict[str, Any]:
        return {
            "taps": self.taps(),
            "align_corners": self.align_corners,
            "smooth": self.smooth == "on",
        }

    def estimate(self, gen: Generator) -> dict[str, float]:
        """Seconds and bytes of a whole `discover`, from a second's worth of the features and of the
        labels of `gen`: points are held while features are drawn, no longer for the gallery.
        """
        self._check(gen)
        began, swept = time.perf_counter(), "auto" in (self.layer, self.k)
        layers = candidate_layers(gen) if self.layer == "auto" else [self.layer]
        taps = tuple(dict.fromkeys(t for layer in layers for t in layer.split("+")))
        widest = max(sum(self._widths(gen, tuple(layer.split("+")))) for layer in layers)
        points = max(1, min(self._grid(taps) ** 2, self.max_points // self.n))
        count = min(points, max(1, SWEEP_POINTS // self.n)) if swept else points
        seeds, k = list(range(_PROBED)), 10 if self.k == "auto" else int(self.k)
        how = self._reading(seeds, taps, count)
        features = probe(map_samples(gen, seeds, _collect_body, **how))
        arrays = self._blank(sum(self._widths(gen, taps)), k)
        labels = probe(replace(self, layer="+".join(taps)).label_seeds(arrays, gen, seeds))
        drawn = SHOWN + (min(self.n, 200) if gen.resolution <= OUTLINE else 0)
        drawn *= 1 + (self.k == "auto")  # levels
        # k-means as measured on two cores: 15 s for 819,200 points of 512 numbers, k 9, ten starts.
        clustering = 15 * self.n * points * widest * k / (819_200 * 512 * 9) + 5 * swept
        seconds = self.n * features.each * (1 + swept) + drawn * labels.each + clustering
        return {
            "seconds": time.perf_counter() - began + seconds,
            "memory_bytes": max(
                labels.memory, features.memory + 4 * self.n * points * (widest + 2)
            ),
        }

    def _blank(self, d: int, k: int) -> dict[str, np.ndarray]:
        """Arrays of the shapes that `fit` gives for d channels and k clusters."""
        found = {"mean": np.zeros(d + 2), "scale": np.ones(d + 2), "centers": np.eye(k, d + 2)}
        if self.refine == "crf":
            found |= {"gap": np.ones(1), "log_prior": np.zeros((CELLS, CELLS, k))}
        return {name: a.astype(np.float32) for name, a in found.items()}

    # learning

    def _check(self, gen: Generator) -> None:
        if self.layer != "auto":
            check_taps(self.layer.split("+"), gen.taps)
        if self.k != "auto" and self.k < 2:
            raise UsageError(f"k is {self.k}, expected at least 2 clusters, or auto")
        if self.k != "auto" and self.k > 255:
            raise UsageError(f"k is {self.k}; masks are 8-bit, so at most 255 clusters")
        if self.n < 2:
            raise UsageError(f"n is {self.n}, expected at least 2 samples (50 is the paper's)")
        check(self, position_weight=0, grid=0, n_init=1, max_points=100)

    def _points(
        self, gen: Generator, seeds: list[int], taps: tuple[str, ...], budget: int | None = None
    ) -> Float[np.ndarray, "n p d"]:
        """Features and, last two columns, the place in [-1, 1], of an even subset of pixels."""
        count = max(1, min(self._grid(taps) ** 2, (budget or self.max_points) // len(seeds)))
        how, shown = self._reading(seeds, taps, count), f"features {'+'.join(taps)}"
        points = collect(gen, seeds, _collect_body, **how, shown=shown)
        bad = sum(not np.isfinite(p).all() for p in points)
        if bad:
            raise SisError(
                f"the features of {bad} of {len(points)} samples are NaN or infinite: the "
                "generator's weights are damaged"
            )
        return points

    def _reading(self, seeds: list[int], taps: tuple[str, ...], count: int) -> dict[str, Any]:
        """Settings of `map_samples` with `_collect_body`. count: pixels of each sample."""
        grid = self._grid(taps)
        starts = np.array([np.random.default_rng(s).integers(grid * grid) for s in seeds], np.int32)
        return {
            "truncation": self.truncation, "per_sample": (starts,), "taps": taps, "grid": grid,
            "count": count, "align_corners": self.align_corners, "smooth": self.smooth == "on",
        }  # fmt: skip

    def _grid(self, taps: tuple[str, ...]) -> int:
        return self.grid or max(_resolution(t) for t in taps)

    def _cluster(
        self, x: Float[np.ndarray, "n c"], places: Float[np.ndarray, "n 2"], scaling: tuple,
        seed: int,
    ) -> tuple[dict[str, np.ndarray], Int[np.ndarray, "n"]]:  # fmt: skip
        """The arrays that label new samples, and the cluster of every point."""
        mean, scale, position = scaling
        d, columns = len(mean), x.shape[1]
        assert self.k != "auto"
        if self.k > len(x):
            raise UsageError(
                f"k is {self.k} but there are only {len(x)} points to cluster: raise n or "
                "max_points"
            )
        found = kmeans.kmeans(x, self.k, seed=seed, n_init=self.n_init)
        centers = np.zeros((self.k, d), np.float32)
        centers[:, :columns] = np.asarray(found.centers)
        # Cluster 0 is the largest
        order = np.argsort(-np.bincount(np.asarray(found.labels), minlength=self.k), kind="stable")
        arrays = {
            "centers": centers[order],
            "mean": mean,
            "scale": (scale * position).astype(np.float32),
        }
        if not self.position_weight:
            arrays["scale"][-2:] = 0
        labels = np.argsort(order)[np.asarray(found.labels)]
        if self.refine == "crf":
            arrays.update(
                learn_refinement(
                    x, centers[order][:, :columns], labels, places, self._grid(self.taps())
                )
            )
        return arrays, labels

    def _clustered(
        self, gen: Generator, seeds: list[int], x: Float[np.ndarray, "n c"],
        places: Float[np.ndarray, "n 2"], scaling: tuple, seed: int,
    ) -> tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
        """The two values of `_cluster`, facts per cluster, and the background."""
        arrays, labels = self._cluster(x, places, scaling, seed)
        if gen.resolution <= OUTLINE:
            return arrays, labels, *self.describe(arrays, gen, seeds)
        return arrays, labels, *_facts_of_points(x, labels, places, arrays["centers"])

    def describe(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Shares and confidence of every cluster, and the background, from up to 200 samples."""
        stream = self.label_seeds if gen.resolution <= OUTLINE else self._small_labels
        clusters = arrays.get("finer/centers", arrays["centers"])
        return selection.describe(stream(arrays, gen, seeds[:200]), len(clusters))

    def _with_finer(
        self,
        fitted: Fitted,
        gen: Generator,
        x: Float[np.ndarray, "n c"],
        labels: Int[np.ndarray, "n"],
        places: Float[np.ndarray, "n 2"],
        seed: int,
    ) -> Fitted:
        """`fitted` with the finer level; x, labels, places: the points that were clustered."""
        centers = fitted.arrays["centers"]
        foreground = [c["id"] for c in fitted.clusters if not c["background"]]
        finer = levels.split(x, labels, centers[:, : x.shape[1]], foreground, self.n, seed)
        below, first, second = levels.nearest(x, labels, finer)
        k = len(finer.parent)
        wide = np.zeros((k, centers.shape[1]), np.float32)
        wide[:, : x.shape[1]] = finer.centers
        arrays = {**fitted.arrays, "finer/centers": wide, "finer/parent": finer.parent}
        if self.refine == "crf":
            inside = [labels == c if c in foreground else [] for c in range(len(centers))]
            gap = [(second - first)[i].mean() if np.any(i) else 1.0 for i in inside]
            arrays["finer/gap"] = np.where(np.isfinite(gap), gap, 1).astype(np.float32)
            arrays["finer/log_prior"] = log_prior(below, places, k, self._grid(self.taps()))
        if gen.resolution <= OUTLINE:
            facts, _ = self.describe(arrays, gen, sample_seeds(seed, self.n))
        else:
            certainty = np.minimum(_confidence(x, centers), 1 - first / second)
            facts, _ = selection.describe_points(below, places, certainty, k)
        clusters = tuple(
            {"id": i, "parent": int(parent), "agreement": float(finer.agreement[i])}
            | fact
            | {"background": fitted.clusters[parent]["background"]}
            for i, (parent, fact) in enumerate(zip(finer.parent, facts))
        )
        found = {
            **(fitted.sweep or {}),
            "finer": {"criterion": levels.CRITERION, "rows": finer.rows},
        }
        fine = Fitted(self, arrays, clusters, fitted.background)
        return replace(fitted, sweep=found, finer=fine)

    # choosing k and layer

    def _smoothed(self, gen: Generator, seeds: list[int]) -> SegmentationInStyle:
        """This method with `smooth` decided by the means of the phases of a 2 x 2 grid."""
        if self.smooth != "auto":
            return self
        taps = (
            tuple(candidate_layers(gen, single=True))
            if self.layer == "auto"
            else tuple(self.layer.split("+"))
        )
        shares = collect(gen, seeds[:16], _phase_body, truncation=self.truncation, taps=taps)
        return replace(self, smooth="on" if np.max(shares) > CHECKERBOARD else "off")

    def _swept(
        self, gen: Generator, seeds: list[int], seed: int
    ) -> tuple[SegmentationInStyle, dict[str, Any]]:
        """This method with k and layer chosen, and the table behind (`ops/sweep.py`)."""
        layers = candidate_layers(gen)
        if self.layer != "auto" and self.layer not in layers:
            layers.append(self.layer)
        taps = tuple(dict.fromkeys(t for layer in layers for t in layer.split("+")))
        points = self._points(gen, seeds, taps, budget=SWEEP_POINTS)
        widths = self._widths(gen, taps)
        own = dict(zip(taps, np.split(np.arange(sum(widths)), np.cumsum(widths)[:-1])))
        columns = {}
        # Each as if it were the only one: the place weighs against the layer's own channels
        for layer in layers:
            used = [own[t] for t in layer.split("+")]
            x = points[..., [*np.concatenate(used), -2, -1]]
            mean, scale, position = _standardise(x, self, [len(channels) for channels in used])
            columns[layer] = ((x - mean) * (scale * position))[
                ..., : None if self.position_weight else -2
            ]
        given = None if self.k == "auto" else int(self.k)
        table = sweep.sweep(columns, SWEEP_KS, seed, given)
        by_layer = sweep.consensus_of_layers(table, SWEEP_KS)
        chosen = sweep.choose(table, by_layer, self.layer, given)
        found = {"criterion": sweep.criterion(self.layer, given), "layers": by_layer, "rows": table}
        return replace(self, k=chosen["k"], layer=chosen["layer"]), found

    def _widths(self, gen: Generator, taps: tuple[str, ...]) -> list[int]:
        """Channels of each tap, by shape inference."""
        z = jax.eval_shape(lambda: jnp.zeros((1, gen.z_dim)))
        features = jax.eval_shape(lambda z: rendered(gen, z, jnp.float32(1), taps)[1], z)
        return [features[t].shape[-1] for t in taps]


def candidate_layers(gen: Generator, single: bool = False) -> list[str]:
    """The candidates of `layer="auto"`: taps from 8 x 8 to 64 x 64, and two or three neighbours."""
    whole = [t for t in gen.taps if "/" not in t]
    # A tiny generator has what it has
    sizes = [t for t in whole if 8 <= _resolution(t) <= 64] or whole
    runs = [
        sizes[i : i + length]
        for length in ((1,) if single else (1, 2, 3))
        for i in range(len(sizes) - length + 1)
    ]
    return ["+".join(r) for r in runs]


def _resolution(tap: str) -> int:
    return int(tap.split("/")[0].split("x")[0])


def _standardise(
    points: Float[np.ndarray, "n p d"], method: SegmentationInStyle, widths: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, scale, position factor) per column; the place weighs position_weight."""
    flat = points.reshape(-1, points.shape[-1])
    mean, spread = _moments(flat)
    channels = slice(0, -2)
    scale = np.ones(len(mean))
    if method.normalize == "none":
        mean[channels] = 0
    else:
        scale[channels] = 1 / np.maximum(spread[channels], 1e-6)
    if method.normalize == "tap":
        scale[channels] *= np.repeat(
            [np.sqrt(sum(widths) / len(widths) / w) for w in widths], widths
        )
    total = float(np.sum((spread[channels] * scale[channels]) ** 2))
    factor = np.ones(len(mean))
    factor[-2:] = method.position_weight * np.sqrt(total / 2) / np.maximum(spread[-2:], 1e-6)
    return mean.astype(np.float32), scale.astype(np.float32), factor.astype(np.float32)


def _scaled(
    points: Float[np.ndarray, "n p d"],
    mean: Float[np.ndarray, "d"],
    scale: Float[np.ndarray, "d"],
    place: bool,
) -> Float[np.ndarray, "m c"]:
    """(points - mean) * scale in the memory of `points`; the place goes unless it counts."""
    rows, d = points.reshape(-1, points.shape[-1]), points.shape[-1]
    columns = d if place else d - 2
    x = points.reshape(-1)[: len(rows) * columns].reshape(len(rows), columns)
    for at in range(0, len(rows), _LOOKED_AT):
        block = rows[at : at + _LOOKED_AT, :columns] - mean[:columns]
        x[at : at + _LOOKED_AT] = block * scale[:columns]
    return x


def _moments(x: Float[np.ndarray, "n d"], rows: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per column in float64, some rows at a time."""
    mean = x.mean(0, dtype=np.float64)
    square = sum(
        (np.square(x[i : i + rows] - mean).sum(0) for i in range(0, len(x), rows)),
        np.zeros_like(mean),
    )
    return mean, np.sqrt(square / len(x))


def _facts_of_points(
    x: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, "n"],
    places: Float[np.ndarray, "n 2"],
    centers: Float[np.ndarray, "k d"],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Facts per cluster and the background from the points that were clustered: no network runs."""
    return selection.describe_points(labels, places, _confidence(x, centers), len(centers))


def _confidence(x: Float[np.ndarray, "n c"], centers: Float[np.ndarray, "k d"]) -> np.ndarray:
    """Float[n]: 1 - d1 / d2 of the two smallest squared distances."""
    means = centers[:, : x.shape[1]]
    confidence = np.empty(len(x), np.float32)
    for at in range(0, len(x), _LOOKED_AT):
        some = x[at : at + _LOOKED_AT]
        distance = np.square(means).sum(1) - 2 * some @ means.T + np.square(some).sum(1)[:, None]
        two = np.maximum(np.partition(distance, 1, axis=1)[:, :2], 0)
        confidence[at : at + _LOOKED_AT] = 1 - two[:, 0] / np.maximum(two[:, 1], 1e-12)
    return confidence


def _stability(x: np.ndarray, labels: np.ndarray, n: int, k: int, seed: int) -> np.ndarray:
    """Per cluster: mean overlap with its partner when one half of the samples is clustered."""
    per = len(x) // n
    found = []
    for i, part in enumerate((x[: n // 2 * per], x[n // 2 * per :])):
        if len(part) > k:
            step = max(1, len(part) // 20_000)
            other = kmeans.kmeans(
                np.ascontiguousarray(part[::step]), k, seed=seed + 1 + i, n_init=3
            )
            judged = slice(None, None, max(1, len(x) // 50_000))
            found.append(
                selection.cluster_agreement(
                    labels[judged], kmeans.predict(x[judged], np.asarray(other.centers)), k
                )
            )
    return np.mean(found, axis=0) if found else np.ones(k)


# device code


def _collect_body(
    gen: Generator,
    z: Array,
    truncation: Array,
    start: Array,
    *,
    taps: tuple[str, ...],
    grid: int,
    count: int,
    align_corners: bool,
    smooth: bool,
) -> Float[Array, "b count d"]:
    """Features of `count` pixels of each sample, and their place, by a golden-ratio walk."""
    features = rendered(gen, z, truncation, taps)[1]
    common = [
        resize_bilinear(filtered(features[t], smooth), (grid, grid), align_corners=align_corners)
        for t in taps
    ]
    place = jnp.broadcast_to(place_of(grid), (z.shape[0], grid, grid, 2))
    flat = jnp.concatenate([*common, place], axis=-1).reshape(z.shape[0], grid * grid, -1)
    if count == grid * grid:
        return flat
    stride = int(grid * grid * 0.6180339887) | 1
    while np.gcd(stride, grid * grid) > 1:
        stride += 2
    picks = (start[:, None] + stride * jnp.arange(count)[None]) % (grid * grid)
    return jnp.take_along_axis(flat, picks[:, :, None], axis=1)


def _phase_body(
    gen: Generator, z: Array, truncation: Array, *, taps: tuple[str, ...]
) -> Float[Array, "b taps"]:
    """Per sample and tap: variance between the means of four pixel phases, over all variance."""
    features = rendered(gen, z, truncation, taps)[1]

    def share(x: Array) -> Array:
        b, h, w, c = x.shape
        means = x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(1, 3))
        return (means.var(axis=(1, 2)) / jnp.maximum(x.var(axis=(1, 2)), 1e-12)).mean(-1)

    return jnp.stack([share(features[t].astype(jnp.float32)) for t in taps], axis=1)


def _label_body(
    gen: Generator, z: Array, truncation: Array, arrays: dict, *, taps: tuple[str, ...],
    outline: str | None, align_corners: bool, smooth: bool, small: bool = False,
) -> tuple[Array, ...]:  # fmt: skip
    """Image, clusters and confidence; small: the latter two alone, at `OUTLINE` pixels."""
    image, features = rendered(gen, z, truncation, (*taps, *([outline] if outline else [])))
    labels, confidence = label_maps(
        tuple(features[t] for t in taps), features[outline] if outline else image, arrays,
        align_corners, smooth, OUTLINE if small else image.shape[1],
    )  # fmt: skip
    return (labels, confidence) if small else (quantised(image), labels, confidence)


_label = jax.jit(label_maps, static_argnames=("align_corners", "smooth"))
