"""DatasetGAN: a handful of annotated samples teach small classifiers to label every image the
generator draws (Zhang et al., CVPR 2021).

Section 3.2 of the paper: a pixel's hypercolumn is the maps of all layers enlarged to the image's
size. Ten networks D-128-32-K (D-256-128-K from 32 classes on) learn the class from the annotated
pixels; the label is their vote. Uncertainty is the Jensen-Shannon divergence of the members'
distributions p_e, JS = H(mean_e p_e) - mean_e H(p_e). `classifier="linear"` is the read-out of
LinearGAN (Xu and Zheng, CVPR 2021).
Where we differ, and why (`RECIPES["paper"]` is the published setting as far as it carries over):
* Features are read at `max_points` pixels, rare classes first, with weights that make the loss an
  estimate of that over all annotated pixels: the original holds 160 to 200 GB. The first layer is
  applied at each map's own size and then enlarged, which is equal.
* Features are standardised, members share their minibatches, the number of steps is fixed.
* Members see bootstrap draws of the samples: on 16 annotated faces the mean IoU is 0.861 against
  0.843, and the divergence finds errors. Networks that differ by their start are wrong together.
* StyleGAN2 instead of StyleGAN1: the results of all convolutions.
* The most uncertain tenth is not left out; 1 - JS / max JS weighs pixels in `distill`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sis_jax.methods.base import (
    SHOWN,
    Arrays,
    Fitted,
    Inputs,
    Labelled,
    features_of,
    rendered,
)
from sis_jax.methods.settings import DatasetGANSettings, check
from sis_jax.ops import selection
from sis_jax.ops.progress import progress, say, showing_progress
from sis_jax.ops.sampling import collect, map_samples, probe, quantised
from sis_jax.training import pixel_classifiers as pixels
from sis_jax.types import Generator, Samples, SisError, UsageError, check_taps

RECIPES: dict[str, dict[str, Any]] = {
    # All annotated pixels, minibatches of 64, plain Adam at 1e-3, ten networks that vote.
    "paper": {
        "members": 10, "bootstrap": False, "vote": "majority", "max_points": 2**31 - 1, "batch": 64,
        "steps": 20_000, "weight_decay": 0.0, "truncation": 0.7,
    },
}  # fmt: skip

IGNORE = 255
# further members, each trained on one half of the samples: they measure how well the other half is
# labelled
HELD = 2
UNSURE = 0.5
# Of an estimate: samples (the paper annotates 16 faces), their classes, and most pixels of each
ANNOTATED, CLASSES, POINTS = 16, 8, 256


@dataclass(frozen=True)
class DatasetGAN(DatasetGANSettings):
    """Parts from annotated samples; settings: `DatasetGANSettings`."""

    wants: ClassVar[tuple[str, ...]] = ("annotated",)
    clusters_by_k: ClassVar[bool] = False
    adds_clusters: ClassVar[bool] = False
    shaky_cure: ClassVar[str] = ""

    def fit(self, gen: Generator, seed: int = 0, inputs: Inputs | None = None) -> Fitted:
        """Learn the annotated classes. The same seed and masks give the same classifiers.

        inputs: `annotated` UInt8[m r r] of class ids (255 = not annotated) over the samples of
            `annotated_seeds`, and `annotated_names`. Raises UsageError for settings or masks that
            cannot work, SisError for NaN.
        """
        self._check(gen)
        annotated, seeds, ids = _annotated(inputs, gen.resolution)
        taps = _taps(gen, self.layer)
        at, label, weight = choose_pixels(annotated, self.max_points, seed)
        real = weight > 0
        x = self._features(gen, seeds, taps, at)[real]
        owner = np.broadcast_to(np.arange(len(seeds))[:, None], at.shape)[real]
        y, weight = np.searchsorted(ids, label[real]).astype(np.int32), weight[real]
        mean, scale = _standardise(x)
        layers, seen = self._train(x, y, weight, owner, len(ids), seed)
        held = _held_out(layers, x, y, weight, seen, len(ids))
        weights, bias = (np.asarray(a[: self.members], np.float64) for a in layers[0])
        weights = weights * scale[:, None]  # the standardisation goes into the first layer
        layers = [(weights, bias - mean @ weights)] + [
            tuple(np.asarray(a)[: self.members] for a in pair) for pair in layers[1:]
        ]
        method = replace(self, layer="+".join(taps))
        arrays = _stored(layers)
        names = dict(inputs.annotated_names or {}) if inputs else {}
        return method._described(arrays, gen, seeds, annotated, ids, names, held)

    def taps(self, arrays: Arrays | None = None) -> tuple[str, ...]:
        """The features that are read; `layer` must be resolved (not "auto")."""
        return tuple(self.layer.split("+"))

    # labelling

    def predict(
        self, arrays: Arrays, samples: Samples, gen: Generator | None = None
    ) -> UInt8[np.ndarray, "n h w"]:
        """Position among the annotated ids of the class of every pixel; `gen` is not used."""
        features, resolution = features_of(samples, self.taps()), samples.images.shape[1]
        return np.asarray(_label(_layers(arrays), features, resolution, self.vote == "majority")[0])

    def label_seeds(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int], truncation: float | None = None
    ) -> Labelled:
        """Stream (images, classes, confidence 1 - JS / max JS in 0..1) for seeds, in batches."""
        psi = self.truncation if truncation is None else truncation
        yield from map_samples(
            gen, list(seeds), _label_body, truncation=psi, shared=(_layers(arrays),),
            taps=self.taps(), majority=self.vote == "majority",
        )  # fmt: skip

    def estimate(self, gen: Generator) -> dict[str, float]:
        """Seconds and bytes of a whole `discover` of `ANNOTATED` samples with `CLASSES`, from
        some steps and a second's worth of masks.
        """
        self._check(gen)
        began, taps, rng = time.perf_counter(), _taps(gen, self.layer), np.random.default_rng(0)
        seeds = list(range(ANNOTATED))
        wanted = min(self.max_points // ANNOTATED, gen.resolution**2)
        points = min(wanted, POINTS)  # a step takes as long with fewer to draw from
        at = np.broadcast_to(np.arange(points, dtype=np.int32), (ANNOTATED, points))
        with showing_progress(False):
            x = self._features(gen, seeds, taps, at).reshape(ANNOTATED * points, -1)
            y, owner = rng.integers(0, CLASSES, len(x), np.int32), np.repeat(seeds, points)
            times = [time.perf_counter()]
            for _ in range(2):  # the first one compiles
                some = replace(self, steps=min(self.steps, pixels.CHUNK))
                layers, _ = some._train(x, y, np.ones(len(x), np.float32), owner, CLASSES, 0)
                times.append(time.perf_counter())
        arrays = _stored([tuple(a[: self.members] for a in pair) for pair in layers])
        method = replace(self, layer="+".join(taps))
        masks = probe(method.label_seeds(arrays, gen, range(2**10)))
        trained = self.steps / pixels.CHUNK * (times[2] - times[1])
        drawn = (ANNOTATED + SHOWN) * masks.each
        return {
            "seconds": time.perf_counter() - began + trained + drawn,
            "memory_bytes": masks.memory + x.nbytes / points * (wanted - points),
        }

    # learning

    def _check(self, gen: Generator) -> None:
        check(self, members=1, max_points=16, steps=1, batch=2, weight_decay=0)
        if not 0 < self.learning_rate < 1:
            raise UsageError(
                f"learning_rate is {self.learning_rate}, expected a number between 0 and 1 (0.001 "
                "is the paper's)"
            )
        _taps(gen, self.layer)

    def _features(
        self, gen: Generator, seeds: list[int], taps: tuple[str, ...], at: Int[np.ndarray, "n p"]
    ) -> Float[np.ndarray, "n p d"]:
        """Hypercolumns of the chosen pixels of every annotated sample."""
        x = collect(
            gen, seeds, _collect_body, truncation=self.truncation, per_sample=(at,),
            shown="features of annotated pixels", taps=taps, resolution=gen.resolution,
        )  # fmt: skip
        if not np.isfinite(x).all():
            raise SisError(
                "the features of annotated samples are NaN or infinite: the generator's weights "
                "are damaged"
            )
        return x

    def _train(
        self,
        x: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        owner: np.ndarray,
        classes: int,
        seed: int,
    ) -> tuple[pixels.Layers, Float[np.ndarray, "e n"]]:
        """Layers of all members and of two shown one half each; and which points each saw."""
        n = int(owner.max()) + 1
        half = (owner if n > 1 else np.arange(len(x))) % 2
        rng = np.random.default_rng([seed, 1])
        drawn = np.ones((self.members, n))
        if self.bootstrap and n > 1:
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=self.members)
        seen = np.concatenate([drawn[:, owner], half[None] == 0, half[None] == 1]).astype(
            np.float32
        )
        hidden = pixels.hidden_widths(classes) if self.classifier == "mlp" else ()
        bar = progress(self.steps, "training", "step")

        def tick(steps: int, loss: float) -> None:
            bar.update(steps)
            bar.set_postfix_str(f"loss {loss:.3f}")

        batch = min(self.batch, len(x))
        recipe = pixels.Recipe(hidden, self.steps, batch, self.learning_rate, self.weight_decay)
        layers = pixels.train(x, y, weight, seen, classes, recipe, seed, tick)
        bar.close()
        return layers, seen

    def _described(
        self,
        arrays: Arrays,
        gen: Generator,
        seeds: list[int],
        annotated: np.ndarray,
        ids: np.ndarray,
        names: dict[int, str],
        held: np.ndarray,
    ) -> Fitted:
        """Facts per class from the annotated images; names and background are given."""
        facts, _ = selection.describe(self.label_seeds(arrays, gen, seeds), len(ids))
        counts = np.bincount(annotated.ravel(), minlength=256)[ids]
        clusters = [
            {"id": i, "name": names.get(int(c)) or f"class {c}", "agreement": float(held[i])}
            | facts[i]
            | {"background": bool(c == 0)}
            for i, c in enumerate(ids)
        ]
        found = bool(ids[0] == 0)
        why = (
            "annotated as class 0" if found else "no pixel is annotated as class 0, the background"
        )
        table = [
            {"name": c["name"], "painted_pixels": int(n), "held_out_iou": float(h)}
            for c, n, h in zip(clusters, counts, held)
        ]
        notes = json.dumps({"seeds": seeds, "classes": table}, indent=1) + "\n"
        return Fitted(
            self, arrays, tuple(clusters), {"found": found, "why": why},
            warnings=tuple(_warnings(table)), files={"painted.json": notes.encode()},
        )  # fmt: skip


def choose_pixels(
    annotated: UInt8[np.ndarray, "n r r"], most: int, seed: int = 0
) -> tuple[Int[np.ndarray, "n p"], Int[np.ndarray, "n p"], Float[np.ndarray, "n p"]]:
    """Pixels to learn from: (row * r + column, class id, weight), equally many per sample (weight
    0: filling).

    Of a sample with too many, the smallest classes are kept whole and the others evenly cut;
    weights, 1 on average, are annotated pixels per chosen one.
    """
    flat = annotated.reshape(len(annotated), -1)
    share = int(min((flat != IGNORE).sum(1).max(), max(1, most // len(flat))))
    at, label = np.zeros((2, len(flat), share), np.int32)
    weight = np.zeros((len(flat), share), np.float32)
    rng = np.random.default_rng([seed, 0])
    for i, row in enumerate(flat):
        groups = sorted((np.flatnonzero(row == c) for c in np.unique(row[row != IGNORE])), key=len)
        filled = 0
        for g, group in enumerate(groups):
            take = min(len(group), -(-(share - filled) // (len(groups) - g)))
            here = slice(filled, filled + take)
            at[i, here] = np.sort(rng.choice(group, take, replace=False)) if take else group[:0]
            label[i, here] = row[group[0]]
            weight[i, here] = len(group) / max(take, 1)
            filled += take
    return at, label, weight / weight[weight > 0].mean()


def _annotated(
    inputs: Inputs | None, resolution: int
) -> tuple[UInt8[np.ndarray, "n r r"], list[int], Int[np.ndarray, "k"]]:
    """Masks with at least one annotated pixel, their seeds, and the class ids in them."""
    if inputs is None or inputs.annotated is None:
        raise UsageError(
            "datasetgan learns from annotated samples and got none: python -m sis_jax export RUN "
            "--format blanks --n 16, paint the masks, then give their folder as --masks"
        )
    masks, seeds = inputs.annotated, inputs.annotated_seeds
    if len(masks) != len(seeds):
        raise UsageError(
            f"there are {len(masks)} annotated masks and {len(seeds)} seeds: each mask belongs to "
            "the sample of one seed"
        )
    if masks.shape[1:] != (resolution, resolution):
        raise UsageError(
            f"the annotated masks are {masks.shape[2]}x{masks.shape[1]}, expected the generator's "
            f"{resolution}x{resolution}"
        )
    used = (masks != IGNORE).any((1, 2))
    if not used.any():
        raise UsageError(
            "no pixel of the masks is annotated (all are 255): paint at least two classes"
        )
    ids = np.unique(masks[masks != IGNORE]).astype(np.int64)
    if len(ids) < 2:
        raise UsageError(
            f"only one class, {int(ids[0])}, is annotated: paint at least two, one of them the "
            "background (0)"
        )
    if not used.all():
        say(
            f"{int((~used).sum())} of {len(masks)} samples have no annotated pixel and are left out"
        )
    return masks[used], [int(s) for s, u in zip(seeds, used) if u], ids


def _warnings(table: list[dict[str, Any]]) -> Iterator[str]:
    for row in table:
        if row["held_out_iou"] < UNSURE:
            yield (
                f"The class {row['name']} ({row['painted_pixels']:,} pixels) is not yet learned: "
                "classifiers that saw one half of the annotated samples reach an IoU of "
                f"{row['held_out_iou']:.2f} on the other half. Paint it in more samples."
            )


def _standardise(x: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
    """Bring x to mean 0 and deviation 1 per channel, in place; (mean, 1 / deviation) in float64."""
    mean = x.mean(0, dtype=np.float64)
    spread = np.sqrt(
        np.maximum(np.einsum("nd,nd->d", x, x, dtype=np.float64) / len(x) - mean**2, 0)
    )
    scale = 1 / np.maximum(spread, 1e-6)
    x -= mean.astype(np.float32)
    x *= scale.astype(np.float32)
    return mean, scale


def _held_out(
    layers: pixels.Layers,
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    seen: np.ndarray,
    classes: int,
) -> Float[np.ndarray, "k"]:
    """IoU per class of each half's classifier on the annotated pixels of the other half."""
    last = [tuple(a[-HELD:] for a in pair) for pair in layers]
    guess = np.argmax(np.asarray(_logits(last, x)), axis=-1)  # [2, n]
    other = np.where(seen[-1] > 0, guess[0], guess[1])
    table = np.bincount(y * classes + other, weight, minlength=classes**2).reshape(classes, classes)
    inside = np.diag(table)
    return inside / np.maximum(table.sum(0) + table.sum(1) - inside, 1e-9)


def _taps(gen: Generator, layer: str) -> tuple[str, ...]:
    """The taps asked for; "auto" is every convolution, or every stage without such names."""
    if layer != "auto":
        return check_taps(layer.split("+"), gen.taps)
    return tuple(t for t in gen.taps if "/" in t) or tuple(gen.taps)


def _stored(layers: Sequence[tuple[Any, ...]]) -> Arrays:
    return {
        f"{kind}{i}": np.asarray(a, np.float32)
        for i, pair in enumerate(layers)
        for kind, a in zip(("weight", "bias"), pair)
    }


def _layers(arrays: Arrays) -> pixels.Layers:
    return [(arrays[f"weight{i}"], arrays[f"bias{i}"]) for i in range(3) if f"weight{i}" in arrays]


# device code


def _collect_body(
    gen: Generator,
    z: Array,
    truncation: Array,
    at: Int[Array, "b p"],
    *,
    taps: tuple[str, ...],
    resolution: int,
) -> Float[Array, "b p d"]:
    features = rendered(gen, z, truncation, taps)[1]
    return pixels.hypercolumns(tuple(features[t] for t in taps), at, resolution)


def _label_body(
    gen: Generator,
    z: Array,
    truncation: Array,
    layers: Any,
    *,
    taps: tuple[str, ...],
    majority: bool,
) -> tuple[Array, Array, Array]:
    image, features = rendered(gen, z, truncation, taps)
    label, confidence = pixels.label_maps(
        layers, tuple(features[t] for t in taps), image.shape[1], majority
    )
    return quantised(image), label, confidence


_label = jax.jit(pixels.label_maps, static_argnames=("size", "majority"))
_logits = jax.jit(pixels.logits)
