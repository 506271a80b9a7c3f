"""Style mixing: pixels that change colour together belong together (Feng, Gadde, Liao, Ramon,
Martinez, CVPR 2023). No training, no network.

The algorithm of the paper, for one image with styles w:
1. N variants: the coarse styles of w, the fine ones of N other samples. Shape and pose stay,
   colours change.
2. The style summary tensor, N x C x H x W: all variants on top of each other.
3. Its pixels, vectors of N C numbers, are clustered into k groups.
4. Clusters that belong to the border are the background. Photos: the w of a projection (`segment`).

Settings that the paper leaves open were chosen by IoU of person / background on 64 samples of the
default generator (psi 0.7) against an independent people segmenter, per-image background rule
(published for 1024-pixel faces: 0.87 / 0.73):

    layers kept      3: .867/.701   4: .887/.746   5: .861/.676   6: .877/.715   7: .850/.659
                     (of 10; 8 clusters)
    pixel vectors    raw .887/.746   correlation .858/.707 (6 layers kept .873/.724)
    clusters         2: .490/.370   5: .903/.778   8: .887/.746   12: .885/.732   20: .865/.692
    variants         8: .882/.729   16: .887/.746   32: .888/.744
    colors           RGB .887/.746   L*a*b* .886/.739   luma and differences .881/.730

The default, parts matched over images: .907/.753 on 256 samples. With each cluster sent to the side
that most of its pixels are on, 5 clusters reach .930/.826 and 20 reach .941/.853: what is missing
is mostly the choice of the background. Matching: k-means on clusters' mean generator features.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from sis_jax.methods.base import SHOWN, Arrays, Fitted, Labelled, generator_of, small_image
from sis_jax.methods.settings import StyleMixingSettings, check
from sis_jax.models.stylegan2 import StyleGAN2
from sis_jax.ops import kmeans, plan, selection
from sis_jax.ops.crf import largest_two
from sis_jax.ops.patches import without_specks
from sis_jax.ops.pixel_clusters import cluster, converted, vectors
from sis_jax.ops.resize import resize_bilinear
from sis_jax.ops.sampling import collect, is_plain, map_samples, probe, quantised, sample_seeds
from sis_jax.types import Generator, Samples, SisError, UsageError, check_taps

PIXELS = 128 * 64 * 64  # of the variants that are drawn in one pass
SLOTS = 0.4  # of the W+ layers keep the image's own styles: 4 of 10 at 64 pixels, 7 of 18 at 1024
LAYER = 32  # finest resolution of the tap that matches clusters
DESCRIBED = 64  # samples that facts per cluster come from
TRIED = 4  # variants that an estimate draws


class Mixing(NamedTuple):
    """The settings of one image's clusters; fixed at compile time."""

    slots: int
    clusters: int
    mode: str
    color: str
    grid: int
    n_init: int


@dataclass(frozen=True)
class StyleMixing(StyleMixingSettings):
    """Parts from pixels that change colour together; settings: `StyleMixingSettings`."""

    wants: ClassVar[tuple[str, ...]] = ()
    clusters_by_k: ClassVar[bool] = True
    adds_clusters: ClassVar[bool] = False

    @property
    def shaky_cure(self) -> str:
        """The remedy for clusters that change with the samples."""
        if self.labels == "parts":
            return "merge them with a neighbour, lower k, or raise n"
        return "raise variants"

    def fit(self, gen: Generator, seed: int = 0) -> Fitted:
        """Draw the styles to mix in, and match the clusters of `n` samples.

        `arrays`: donors [variants w], the styles; centers [k c], mean [c] and scale [c] of
        standardised features. Raises UsageError for settings that cannot work, and for a generator
        that is no StyleGAN2.
        """
        method = self._checked(gen)
        donors = np.asarray(
            gen.map(
                gen.latents(sample_seeds(seed, 2**10 + self.variants)[2**10 :]), self.mix_truncation
            )
        )[:, -1]
        start = {"donors": donors.astype(np.float32)}
        seeds = sample_seeds(seed, self.n)
        if method.labels == "ground":
            return method._described(
                start | {"centers": np.zeros((2, 1), np.float32)}, gen, seeds, []
            )
        points, weights = method._descriptors(start, gen, seeds)
        mean = np.average(points, axis=0, weights=weights)
        scale = 1 / np.sqrt(np.average((points - mean) ** 2, axis=0, weights=weights)).clip(1e-6)
        standard = ((points - mean) * scale).astype(np.float32)
        centers = _ordered(standard, weights, self.k, seed)
        learned = {"mean": mean.astype(np.float32), "scale": scale.astype(np.float32)}
        half = len(standard) // 2 // self.clusters * self.clusters
        halves = [
            _ordered(standard[part], weights[part], self.k, seed + 1)
            for part in (slice(half), slice(half, None))
        ]
        return method._described(start | {"centers": centers} | learned, gen, seeds, halves)

    def taps(self, arrays: Arrays | None = None) -> tuple[str, ...]:
        """None: samples are drawn again."""
        return ()

    def label_seeds(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int], truncation: float | None = None
    ) -> Labelled:
        """Stream (images, clusters, confidence) for seeds, in batches.

        Confidence: 1 - d1 / d2 of the squared distances to the nearest clusters of its part and of
            another, 0..1; 0 for patches given to their neighbour.
        """
        psi = self.truncation if truncation is None else truncation
        for image, label, confidence in map_samples(
            gen, list(seeds), _label_body, truncation=psi, shared=(dict(arrays),), **self._static()
        ):
            yield image, *self._cleaned(label, confidence)

    def segment(
        self, arrays: Arrays, gen: Generator, w: Float[np.ndarray, "n s w"] | Float[Array, "n s w"]
    ) -> tuple[
        UInt8[np.ndarray, "n h h 3"], UInt8[np.ndarray, "n h h"], Float[np.ndarray, "n h h"]
    ]:
        """Images, clusters and confidence of styles w, such as a projection of photos gives."""
        learned = {name: jnp.asarray(a) for name, a in arrays.items()}
        run = _segmented if is_plain(gen) else _segment
        parts, draw = [], partial(_segmented, gen, **self._static())
        platform = jax.devices()[0].platform
        rows = plan.rows_at_once(draw, (0, None), (w, learned), platform)[0]
        for start in range(0, len(w), rows):
            image, label, confidence = run(
                gen, jnp.asarray(w[start : start + rows]), learned, **self._static()
            )
            parts.append(
                (np.asarray(image), *self._cleaned(np.asarray(label), np.asarray(confidence)))
            )
        return tuple(np.concatenate(x) for x in zip(*parts))  # type: ignore[return-value]

    def predict(
        self, arrays: Arrays, samples: Samples, gen: Generator | None = None
    ) -> UInt8[np.ndarray, "n h w"]:
        """Cluster of every pixel of samples that `gen` made."""
        return self.segment(arrays, generator_of(gen), jnp.asarray(samples.w))[1]

    def estimate(self, gen: Generator) -> dict[str, float]:
        """Seconds and bytes of a whole `discover`, from a second's worth of clusters and masks."""
        began, method, seeds = time.perf_counter(), self._checked(gen), range(2**10)
        cut, parts = method._cut(gen), method.labels == "parts"
        few = min(self.variants, TRIED)  # a sample takes as long as its variants
        styles = np.asarray(gen.map(gen.latents(range(self.variants)), self.mix_truncation))[:, -1]
        donors = styles.astype(np.float32)
        arrays = {"donors": donors[:few], "centers": np.zeros((2, 1), np.float32)}
        clusters = None
        if parts:
            read = map_samples(
                gen, list(seeds), _descriptor_body, truncation=self.truncation, shared=(arrays,),
                layer=method.layer, mixing=method._mixing(),
            )  # fmt: skip
            first = next(read)[0]
            clusters = probe(read)
            center = np.zeros((self.k, first.shape[-1]), np.float32)
            arrays |= {"centers": center, "mean": center[0], "scale": center[0] + 1}
        masks = probe(method.label_seeds(arrays, cut, seeds))
        bytes_of = [
            method._needed(cut, arrays | {"donors": some}) for some in (donors, donors[:few])
        ]
        # As many as `_described` draws, and the gallery's.
        drawn = min(self.n, DESCRIBED) + (4 if parts else 2) * min(self.n, DESCRIBED // 2) + SHOWN
        work = drawn * masks.each + (self.n * clusters.each if clusters else 0)
        return {
            "seconds": time.perf_counter() - began + work * self.variants / few,
            "memory_bytes": masks.memory + max(bytes_of[0] - bytes_of[1], 0),
        }

    # learning

    def _checked(self, gen: Generator) -> StyleMixing:
        """This method with `slots` and `layer` resolved for the generator."""
        network = _styled(gen)
        if not hasattr(network, "synthesize_from"):
            raise UsageError(
                f"{gen.info.name} takes no styles in W+ layers that could be mixed: use a "
                "StyleGAN2, or --method latent_direction"
            )
        check(self)
        limits = {
            "variants": (2, 512), "clusters": (2, 64), "k": (2, 255), "n_init": (1, 64),
            "n": (4, 100_000), "min_patch": (0, 0.5),
        }  # fmt: skip
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {least} to {most}")
        slots = self.slots or max(1, round(SLOTS * network.num_ws))
        if not 1 <= slots < network.num_ws:
            raise UsageError(
                f"slots is {slots}, expected 1 to {network.num_ws - 1} for this generator"
            )
        if self.grid < 0 or (self.grid and gen.resolution % self.grid):
            raise UsageError(
                f"grid is {self.grid}, expected a size that {gen.resolution} pixels divide into, "
                "or 0"
            )
        whole = [tap for tap in gen.taps if "/" not in tap and int(tap.split("x")[0]) <= LAYER]
        layer = (
            (whole or list(gen.taps))[-1]
            if self.layer == "auto"
            else check_taps((self.layer,), gen.taps)[0]
        )
        return replace(self, slots=slots, layer=layer, grid=self.grid or min(gen.resolution, 128))

    def _cut(self, gen: Generator) -> Generator:
        """The layers of `gen` that variants and features need, where it can be cut above them."""
        if not isinstance(gen, StyleGAN2):
            return gen
        cut = gen.up_to(2 * self.grid)
        return cut if self.slots < cut.num_ws and self.layer in cut.taps else gen

    def _mixing(self) -> Mixing:
        return Mixing(*(getattr(self, name) for name in Mixing._fields))

    def _static(self) -> dict[str, Any]:
        return {"labels": self.labels, "layer": self.layer, "mixing": self._mixing()}

    def _needed(self, gen: Generator, arrays: Arrays) -> int:
        """Bytes of the masks that are made at a time."""
        w, here = gen.map(gen.latents([0]), self.truncation), jax.local_devices()
        draw, learned = partial(_segmented, gen, **self._static()), dict(arrays)
        needed = plan.rows_at_once(draw, (0, None), (w, learned), here[0].platform)[1]
        return needed * len(plan.devices_at_once(needed, here))

    def _descriptors(
        self, arrays: Arrays, gen: Generator, seeds: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean feature [n * clusters c] and share of every cluster of every sample."""
        points, weights = collect(
            gen, seeds, _descriptor_body, truncation=self.truncation, shared=(dict(arrays),),
            shown="style mixing", layer=self.layer, mixing=self._mixing(),
        )  # fmt: skip
        if not np.isfinite(points).all():
            raise SisError(
                "the features hold NaN or infinite numbers: the generator's weights are damaged"
            )
        return points.reshape(-1, points.shape[-1]), weights.reshape(-1)

    def _described(
        self, arrays: Arrays, gen: Generator, seeds: list[int], others: list[np.ndarray]
    ) -> Fitted:
        """Facts per cluster, from images as large as variants are; agreement: mean overlap with
        other samples' and variants' masks.
        """
        k, gen = len(arrays["centers"]), self._cut(gen)
        facts, background = selection.describe(self.label_seeds(arrays, gen, seeds[:DESCRIBED]), k)
        few = seeds[: DESCRIBED // 2]

        def labels(arrays: Arrays) -> np.ndarray:
            found = [label.ravel() for _, label, _ in self.label_seeds(arrays, gen, few)]
            return np.concatenate(found).astype(np.int32)

        own = labels(arrays)
        changed = [{**arrays, "donors": arrays["donors"][: self.variants // 2]}]
        changed += [{**arrays, "centers": centers} for centers in others]
        stable = np.zeros(k)
        for other in map(labels, changed):
            stable += selection.cluster_agreement(own, other, k) / len(changed)
        clusters = ({"id": i, "agreement": float(stable[i])} | facts[i] for i in range(k))
        return Fitted(self, arrays, tuple(clusters), background)

    def _cleaned(self, label: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Small patches given to their neighbour, with confidence 0."""
        if not self.min_patch:
            return label, confidence
        cleaned = np.stack([without_specks(a, self.min_patch) for a in label])
        return cleaned, np.where(cleaned == label, confidence, np.float32(0))


def _ordered(
    points: np.ndarray, weights: np.ndarray, k: int, seed: int
) -> Float[np.ndarray, "k c"]:
    """Centres of the parts, the largest first."""
    found = kmeans.kmeans(points, min(k, len(points)), seed=seed, weights=weights)
    mass = np.bincount(np.asarray(found.labels), weights, minlength=len(found.centers))
    return np.asarray(found.centers)[np.argsort(-mass, kind="stable")]


def _styled(gen: Any) -> Any:
    """The network that takes styles, where a generator wraps it to move some of its latents."""
    return gen.gen if not hasattr(gen, "synthesize_from") and hasattr(gen, "gen") else gen


# device code


def summary(
    gen: Any,
    w: Float[Array, "n s w"],
    donors: Float[Array, "d w"],
    slots: int,
    grid: int,
    color: str,
) -> Float[Array, "n g g d 3"]:
    """The style summary tensor: colours of all variants at every pixel. The W+ layers below `slots`
    are drawn once, and those above twice the grid's size not at all.
    """
    n, d, gen = w.shape[0], donors.shape[0], _styled(gen)
    stem, small = gen.stem(w, slots), small_image(gen, 2 * grid)
    if small not in gen.skips_from(slots):
        small = None
    group = max(1, min(n * d, PIXELS // (2 * grid if small else gen.resolution) ** 2))
    pairs = jnp.arange(-(-n * d // group) * group).reshape(-1, group) % (n * d)

    def draw(pair: Int[Array, "m"]) -> Float[Array, "m g g 3"]:
        own = jax.tree.map(lambda a: a[pair // d], stem)
        styles = jnp.broadcast_to(donors[pair % d][:, None], (group, *w.shape[1:]))
        image, features = gen.synthesize_from(own, styles, slots, taps=(small,) if small else ())
        image = features[small] if small else image
        factor = image.shape[1] // grid
        return converted(
            jnp.clip(image, -1, 1).reshape(group, grid, factor, grid, factor, 3).mean((2, 4)), color
        )

    variants = jax.lax.map(draw, pairs).reshape(-1, grid, grid, 3)[: n * d]
    return jnp.moveaxis(variants.reshape(n, d, grid, grid, 3), 1, 3)


def _clustered(
    gen: Any, w: Float[Array, "n s w"], donors: Float[Array, "d w"], mixing: Mixing
) -> Float[Array, "n g g k"]:
    """Squared distance of every pixel to every cluster of its own image."""
    tensors = summary(gen, w, donors, mixing.slots, mixing.grid, mixing.color)

    def one(tensor: Array) -> Array:
        x = vectors(tensor, mixing.mode)
        centers = cluster(x, mixing.clusters, mixing.n_init)
        return jnp.maximum(
            jnp.sum(x * x, -1, keepdims=True) + kmeans.scores(x, centers), 0
        ).reshape(*tensor.shape[:2], -1)

    return jax.lax.map(one, tensors)


def _mean_features(
    distance: Float[Array, "n g g k"], features: Float[Array, "n r r c"]
) -> tuple[Float[Array, "n k c"], Float[Array, "n k"]]:
    """Mean feature of each cluster, and its share of the image."""
    member = jax.nn.one_hot(jnp.argmin(distance, -1), distance.shape[-1])
    small = resize_bilinear(member, (features.shape[1], features.shape[2]))
    total = jnp.einsum("nhwk,nhwc->nkc", small, features.astype(jnp.float32))
    return total / jnp.maximum(small.sum((1, 2)), 1e-6)[..., None], member.mean((1, 2))


def _descriptor_body(
    gen: Any, z: Array, psi: Array, arrays: dict[str, Array], *, layer: str, mixing: Mixing
) -> tuple[Array, Array]:
    w = gen.map(z, psi)
    return _mean_features(
        _clustered(gen, w, arrays["donors"], mixing), gen.synthesize(w, "const", (layer,))[1][layer]
    )


def _label_body(
    gen: Any, z: Array, psi: Array, arrays: dict[str, Array], **static: Any
) -> tuple[Array, Array, Array]:
    return _segmented(gen, gen.map(z, psi), arrays, **static)


def _segmented(
    gen: Any,
    w: Float[Array, "n s w"],
    arrays: dict[str, Array],
    *,
    labels: str,
    layer: str,
    mixing: Mixing,
) -> tuple[UInt8[Array, "n h h 3"], UInt8[Array, "n h h"], Float[Array, "n h h"]]:
    """Image, part of every pixel, confidence."""
    image, features = gen.synthesize(w, "const", (layer,))
    distance = _clustered(gen, w, arrays["donors"], mixing)
    if labels == "ground":
        part = jax.vmap(lambda d: (~_background(d)).astype(jnp.int32))(distance)
    else:
        mean, _ = _mean_features(distance, features[layer])
        part = kmeans.assign((mean - arrays["mean"]) * arrays["scale"], arrays["centers"])
    member = jax.nn.one_hot(part, arrays["centers"].shape[0], dtype=bool)  # [n, cluster, part]
    parts = jnp.stack(
        [
            jnp.where(member[:, None, None, :, i], distance, 1e9).min(-1)
            for i in range(member.shape[-1])
        ],
        -1,
    )
    parts = resize_bilinear(parts, (image.shape[1], image.shape[2]), antialias=False)
    nearest, first, second = largest_two(-parts)
    confidence = 1 + first / jnp.maximum(-second, 1e-12)
    return quantised(image), nearest.astype(jnp.uint8), jnp.clip(confidence, 0, 1)


def _background(distance: Float[Array, "g g k"]) -> Bool[Array, "k"]:
    """Which clusters are background, by the rule of `selection.background`."""
    grid, k = distance.shape[1:]
    at, edge = (jnp.arange(grid) + 0.5) / grid, jnp.maximum(selection.BORDER, 1 / grid)
    row, column = at[:, None], at[None]
    border = (row < edge) | (column < edge) | (column >= 1 - edge)
    member = jax.nn.one_hot(jnp.argmin(distance, -1), k)
    share = jnp.sum(member, (0, 1)) / grid**2
    frame = jnp.sum(member * border[..., None], (0, 1)) / border.sum()
    chosen = (frame >= selection.BORDER_RATIO * share) & (share > 0)
    certain = chosen.any() & ~chosen.all() & (jnp.sum(frame * chosen) >= 0.25)
    return jnp.where(certain, chosen, jnp.arange(k) == jnp.argmax(frame - share))


_segment = jax.jit(_segmented, static_argnames=("labels", "layer", "mixing"))
