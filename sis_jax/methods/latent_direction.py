"""Latent direction: the object gets lighter, the background darker (Melas-Kyriazi et al., ICLR
2022, arXiv 2105.08127; after Voynov et al., ICML 2021).

One unit vector v for all samples. With x = G(z), x' = G(z + e v), S the Sobel edge strength and r a
map that is positive near the centre and negative near the border (section 3 of the paper):

    L = lambda E_z <x', r> + E_z mean (S(x') - S(x))^2
    the sign of lambda gives v_light or v_dark;    |v| = 1 after every step
    mask = [G(z + e v_light) - G(z + e v_dark) > 0], or either direction against G(z), in luminance

Nothing but images is asked of the generator: no features, no styles, no weights.

Where we differ, and why (the published settings are `RECIPES["code"]` and `RECIPES["paper"]`):
* Threshold: Otsu's in place of 0, which cuts out skin only: hair is as dark in both images. IoU of
  person / background against a people segmenter: 0.81 / 0.63 with Otsu's, 0.57 / 0.45 with 0.
* The direction lives in w: steps in z change the person (0.77 / 0.58 where w gave 0.81 / 0.64).
* The prior does not fall off towards the bottom ("portrait"); no upper limit on the area.
* 60 steps of 16 samples in place of 300 of 32, at twice the rate.
* In "w" and "w+" the step is measured in standard deviations of w, so that one shift suits all
  generators; "w+" has one norm over layers and channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, UInt8

from sis_jax.methods.base import SHOWN, Arrays, Fitted, Labelled, generator_of, small_image
from sis_jax.methods.settings import LatentDirectionSettings, check
from sis_jax.ops import selection
from sis_jax.ops.patches import large_patches
from sis_jax.ops.progress import progress, showing_progress
from sis_jax.ops.sampling import image_of, map_samples, probe, quantised, sample_seeds
from sis_jax.types import Generator, Samples, SisError, UsageError

RECIPES: dict[str, dict[str, Any]] = {
    # The settings of the published code, for the search of a direction and for making data.
    "code": {
        "mode": "both", "space": "z", "prior": "center", "center_weight": 2.0,
        "structure_weight": 10.0, "fit_shift": 2.0, "fit_shift_std": 0.5, "shift": 5.0,
        "steps": 300, "batch": 32, "learning_rate": 5e-3, "truncation": 1.0, "threshold": "zero",
        "min_component": 0.2, "max_area": 0.5, "min_peaks": 2,
    },
}  # fmt: skip
# The formulas of the paper, lambda = 5; open settings as in the code.
RECIPES["paper"] = RECIPES["code"] | {
    "prior": "linear", "center_weight": 5.0, "structure_weight": 1.0,
}  # fmt: skip

SIGNS = {"light": (1.0,), "dark": (-1.0,), "both": (1.0, -1.0)}
GRAY = (0.299, 0.587, 0.114)
BINS = 12  # of the histogram filter
DESCRIBED = 128  # samples to learn the facts per cluster from


@dataclass(frozen=True)
class LatentDirection(LatentDirectionSettings):
    """Cluster 0 is the background, 1 the object; settings: `LatentDirectionSettings`."""

    wants: ClassVar[tuple[str, ...]] = ()
    clusters_by_k: ClassVar[bool] = False
    adds_clusters: ClassVar[bool] = False
    shaky_cure: ClassVar[str] = ""

    def fit(self, gen: Generator, seed: int = 0) -> Fitted:
        """Learn the directions. The same seed gives the same bytes, on any number of devices.

        `arrays`: directions [m d], light before dark; scale [1], the deviation that a shift is
        measured in. Raises UsageError for settings that cannot work, SisError where the generator
        gives NaN.
        """
        self._check()
        spread = 1.0 if self.space == "z" else _spread(gen, self.truncation, self.space)
        scale = np.full(1, spread, np.float32)
        halfway, directions, curve = self._directions(gen, scale, seed)
        seeds = sample_seeds(seed, DESCRIBED)
        arrays = {"directions": directions, "scale": scale}
        clusters, background = self._described(arrays, gen, seeds, halfway)
        names = ("light", "dark") if self.mode == "both" else (self.mode,)
        terms = [f"{term}_{name}" for term in ("brightness", "structure") for name in names]
        header = ",".join(["step", *terms])
        rows = [f"{i},{','.join(f'{v:.6g}' for v in row)}" for i, row in enumerate(curve)]
        return Fitted(
            self, arrays, clusters, background, warnings=tuple(self._doubts(curve, clusters)),
            files={"direction.csv": "\n".join([header, *rows, ""]).encode()},
        )  # fmt: skip

    def taps(self, arrays: Arrays | None = None) -> tuple[str, ...]:
        """None: only images are looked at."""
        return ()

    def label_seeds(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int], truncation: float | None = None
    ) -> Labelled:
        """Stream (images, clusters, confidence) for seeds, in batches.

        Confidence: distance of the difference from the threshold, 1 at the average pixel of that
            part; 0 for patches that were removed and images that a filter does not trust.
        """
        psi = self.truncation if truncation is None else truncation
        yield from self._labels(arrays, gen, seeds, psi)

    def predict(
        self, arrays: Arrays, samples: Samples, gen: Generator | None = None
    ) -> UInt8[np.ndarray, "n h w"]:
        """Masks of samples that `gen` made at `truncation`: 1 is the object."""
        z, signs = jnp.asarray(samples.z), SIGNS[self.mode]
        found = _difference_body(
            generator_of(gen),
            z,
            jnp.float32(self.truncation),
            {name: jnp.asarray(value) for name, value in arrays.items()},
            space=self.space,
            shift=self.shift,
            signs=signs,
        )
        return self._masks(*(np.asarray(a) for a in found[1:]))[0]

    def estimate(self, gen: Generator) -> dict[str, float]:
        """Seconds and bytes of a whole `discover`, from two steps and a second's worth of masks."""
        self._check()
        began, scale = time.perf_counter(), np.ones(1, np.float32)
        with showing_progress(False):
            directions = replace(self, steps=1)._directions(gen, scale, 0)[1]  # and compiles
            at = time.perf_counter()
            replace(self, steps=2)._directions(gen, scale, 0)
        step, arrays = (time.perf_counter() - at) / 2, {"directions": directions, "scale": scale}
        how = {"psi": self.truncation, "small": small_image(gen), "drawn": False}
        masks = probe(self._labels(arrays, gen, range(DESCRIBED), **how))
        # As many as `_described` draws, and the gallery's, of whole images.
        drawn = DESCRIBED + 3 * (DESCRIBED // 2) + SHOWN
        return {
            "seconds": time.perf_counter() - began + self.steps * step + drawn * masks.each,
            "memory_bytes": masks.memory,
        }

    # learning

    def _check(self) -> None:
        check(
            self, steps=1, batch=1, center_weight=0, structure_weight=0, fit_shift_std=0,
            min_component=0, min_peaks=0,
        )  # fmt: skip
        limits = {"shift": 100, "fit_shift": 100, "learning_rate": 1, "max_area": 1}
        for name, most in limits.items():
            if not 0 < getattr(self, name) <= most:
                raise UsageError(
                    f"{name} is {getattr(self, name)}, expected a number above 0, {most} at most"
                )
        if self.steps * self.batch > 100_000:
            raise UsageError(
                f"{self.steps} steps of {self.batch} need {self.steps * self.batch} samples, "
                "expected at most 100000"
            )

    def _directions(
        self, gen: Generator, scale: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(halfway, at the end, terms of each step): Adam, the unit norm restored each step."""
        rng = np.random.default_rng(seed)
        shape = len(SIGNS[self.mode]), _dimension(gen, self.space)
        v = _unit(rng.standard_normal(shape).astype(np.float32))
        seeds, curve, halfway = sample_seeds(seed, self.steps * self.batch), [], v
        state = optax.adam(self.learning_rate).init(jnp.asarray(v))
        bar = progress(self.steps, "direction", "step")
        for step in range(self.steps):
            length = rng.normal(self.fit_shift, self.fit_shift_std, (self.batch, v.shape[1]))
            blocks = map_samples(
                gen, seeds[step * self.batch :][: self.batch], _gradient_body,
                truncation=self.truncation, per_sample=(length.clip(0.1).astype(np.float32),),
                shared=(v, scale), batch=self.batch, signs=SIGNS[self.mode], space=self.space,
                prior=self.prior, weights=(self.center_weight, self.structure_weight),
                small=small_image(gen),
            )  # fmt: skip
            # Gradients are kept per sample and added here, in one order: the number of devices
            # changes no bit.
            gradient, *terms = (
                np.concatenate(part).mean(0, dtype=np.float64) for part in zip(*blocks)
            )
            if not np.isfinite(gradient).all():
                raise SisError(
                    f"the gradient at step {step} is NaN: the generator's weights are damaged, or "
                    "fit_shift is far too large"
                )
            tangent = gradient - (gradient * v).sum(1, keepdims=True) * v
            update, state = _adam(tangent.astype(np.float32), state, self.learning_rate)
            v = _unit(v + np.asarray(update))
            halfway = v if step < self.steps // 2 else halfway
            curve.append(np.concatenate(terms))
            bar.update(1)
        bar.close()
        return halfway, v, np.array(curve)

    def _described(
        self, arrays: Arrays, gen: Generator, seeds: list[int], halfway: np.ndarray
    ) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
        """Facts per cluster, from images of `OUTLINE` pixels where they are on the way to larger
        ones; agreement: mean overlap with masks of other shifts, and halfway.
        """
        how = {"psi": self.truncation, "small": small_image(gen), "drawn": False}
        few = seeds[: DESCRIBED // 2]

        def masks(method: LatentDirection, arrays: Arrays) -> np.ndarray:
            stream = method._labels(arrays, gen, few, **how)
            return np.concatenate([labels for _, labels, _ in stream])

        labelled = list(self._labels(arrays, gen, seeds, **how))
        facts, background = selection.describe(labelled, 2)
        own = np.concatenate([labels for _, labels, _ in labelled])[: len(few)]
        others = [masks(replace(self, shift=self.shift * f), arrays) for f in (0.7, 1.4)]
        others.append(masks(self, {**arrays, "directions": halfway}))
        stable = np.mean(
            [[_overlap(own == i, other == i) for i in (0, 1)] for other in others], axis=0
        )
        clusters = ({"id": i, "agreement": float(stable[i])} | facts[i] for i in (0, 1))
        return tuple(clusters), background

    def _doubts(self, curve: np.ndarray, clusters: tuple[dict[str, Any], ...]) -> Iterator[str]:
        """Warnings before the masks are trusted, with the cure."""
        m, tail = len(SIGNS[self.mode]), max(1, len(curve) // 10)
        gain = np.abs(curve[-tail:, :m].mean(0) - curve[:tail, :m].mean(0))
        if len(curve) > 1 and gain.min() < 0.02:
            yield (
                f"A direction changed the brightness under the prior by only {gain.min():.3f} "
                "while it was learned: raise steps or fit_shift."
            )
        if not 0.02 < clusters[1]["share"] < 0.98:
            yield (
                f"The object covers {clusters[1]['share']:.0%} of the images: try another "
                "prior, shift or mode."
            )

    # labelling

    def _labels(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int], psi: float,
        small: str | None = None, drawn: bool = True,
    ) -> Iterator[tuple[Any, UInt8[np.ndarray, "b h w"], Float[np.ndarray, "b h w"]]]:  # fmt: skip
        """As `label_seeds`. small: the name of an image on the way, to be labelled in place of the
        whole one. drawn: False leaves the images out, None.
        """
        for *image, difference, spread, peaks in map_samples(
            gen, list(seeds), _difference_body, truncation=psi, shared=(dict(arrays),),
            space=self.space, shift=self.shift, signs=SIGNS[self.mode], small=small, drawn=drawn,
        ):  # fmt: skip
            yield image[0] if drawn else None, *self._masks(difference, spread, peaks)

    def _masks(
        self,
        difference: Float[np.ndarray, "b h w"],
        spread: Float[np.ndarray, "b"],
        peaks: Float[np.ndarray, "b"],
    ) -> tuple[UInt8[np.ndarray, "b h w"], Float[np.ndarray, "b h w"]]:
        """Masks and confidence after the filters: small patches, area, peaks of the histogram."""
        if not np.isfinite(difference).all():
            raise SisError(
                "the shifted images hold NaN: the generator's weights are damaged, or shift is "
                "far too large"
            )
        chosen = {
            "zero": lambda d, s: 0.0,
            "std": lambda d, s: -0.3 * s,
            "otsu": lambda d, s: otsu(d),
        }[self.threshold]
        at = np.array([chosen(d, s) for d, s in zip(difference, spread)], np.float32)[:, None, None]
        mask, margin = difference > at, np.abs(difference - at)
        usual = [
            (margin * region).sum((1, 2), keepdims=True)
            / np.maximum(region.sum((1, 2), keepdims=True), 1)
            for region in (~mask, mask)
        ]
        confidence = np.clip(
            margin / np.maximum(np.where(mask, usual[1], usual[0]), 1e-6), 0, 1
        ).astype(np.float32)
        if self.min_component:
            kept = np.stack([large_patches(m, self.min_component) for m in mask])
            confidence[mask & ~kept] = 0
            mask = kept
        confidence[(mask.mean((1, 2)) > self.max_area) | (peaks < self.min_peaks)] = 0
        return mask.astype(np.uint8), confidence


def _unit(v: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


def _overlap(a: Bool[np.ndarray, "n h w"], b: Bool[np.ndarray, "n h w"]) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def _dimension(gen: Generator, space: str) -> int:
    if space == "z":
        return gen.z_dim
    layers, width = jax.eval_shape(lambda z: gen.map(z, 1.0), jnp.zeros((1, gen.z_dim))).shape[1:]
    return width if space == "w" else layers * width


def _spread(gen: Generator, truncation: float, space: str) -> float:
    """Standard deviation of w over 256 samples, times sqrt(layers) for a w+ vector of norm 1."""
    w = np.asarray(gen.map(gen.latents(range(256)), truncation))
    deviation = float(np.sqrt(w[:, 0].var(0).mean()))
    if not np.isfinite(deviation) or deviation == 0:
        raise SisError(
            f"the spread of w is {deviation}: the generator's weights are damaged, or its "
            "truncation is 0"
        )
    return deviation * (np.sqrt(w.shape[1]) if space == "w+" else 1.0)


def otsu(values: Float[np.ndarray, "..."], bins: int = 64) -> float:
    """The threshold that maximises the variance between the parts of a histogram (Otsu 1979)."""
    counts, edges = np.histogram(values, bins)
    share, centers = counts / counts.sum(), (edges[1:] + edges[:-1]) / 2
    below, moment = share.cumsum(), (share * centers).cumsum()
    between = (moment[-1] * below - moment) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return float(edges[1:][between[:-1].argmax()])


@partial(jax.jit, static_argnames=("rate",))
def _adam(gradient: Array, state: Any, rate: float) -> tuple[Any, Any]:
    return optax.adam(rate).update(gradient, state)


# device code


def luminance(images: Float[Array, "*n 3"]) -> Float[Array, "*n"]:
    """Grey of RGB, 0.299 R + 0.587 G + 0.114 B."""
    red, green, blue = (images[..., i] * weight for i, weight in enumerate(GRAY))
    return red + green + blue


def edge_strength(x: Float[Array, "n h w"]) -> Float[Array, "n h w"]:
    """Sobel: sqrt(gx^2 + gy^2 + 1e-6), kernels over 8, edges repeated."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    columns = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    gx, gy = (rows[:, :, 2:] - rows[:, :, :-2]) / 8, (columns[:, 2:] - columns[:, :-2]) / 8
    return jnp.sqrt(gx**2 + gy**2 + 1e-6)


def prior_map(size: int, kind: str) -> Float[np.ndarray, "size size"]:
    """The weights of brightness, positive where the object is expected; corners at (+-1, +-1).

    "center": -4 (rho - mean rho), rho the distance from the centre (the code). "linear": 3 (1 - |p
    - c| / a), a a quarter of the diagonal (the paper). "portrait": as "center", horizontal below
    the centre.
    """
    at = np.linspace(-1, 1, size, dtype=np.float32)
    down = np.minimum(at, 0) if kind == "portrait" else at
    rho = np.hypot(at[None], down[:, None])
    return 3 * (1 - np.sqrt(np.float32(2)) * rho) if kind == "linear" else -4 * (rho - rho.mean())


def _shifted(
    gen: Generator,
    z: Float[Array, "b z"],
    psi: Array,
    move: Float[Array, "b m d"],
    scale: Float[Array, "1"],
    space: str,
    small: str | None = None,
) -> Float[Array, "b m h w"]:
    """Luminance of G(latent + move), all directions of all samples in one pass."""
    b, m, d = move.shape
    if space == "z":
        w = gen.map((z[:, None] + move).reshape(b * m, d), psi)
    else:
        w = gen.map(z, psi)
        w = (w[:, None] + scale[0] * move.reshape(b, m, -1, w.shape[-1])).reshape(
            b * m, *w.shape[1:]
        )
    y = luminance(image_of(gen, w, small))
    return y.reshape(b, m, *y.shape[1:])


def _gradient_body(
    gen: Generator, z: Float[Array, "b z"], psi: Array, length: Float[Array, "b d"],
    v: Float[Array, "m d"], scale: Float[Array, "1"], *, signs: tuple[float, ...], space: str,
    prior: str, weights: tuple[float, float], small: str | None,
) -> tuple[Float[Array, "b m d"], Float[Array, "b m"], Float[Array, "b m"]]:  # fmt: skip
    """Per sample: the gradient of the loss with respect to the directions, and its two terms."""
    x = luminance(image_of(gen, gen.map(z, psi), small))
    edges, weight = edge_strength(x), jnp.asarray(prior_map(x.shape[1], prior), jnp.float32)

    def loss(own: Float[Array, "b m d"]) -> tuple[Array, tuple[Array, Array]]:
        y = _shifted(gen, z, psi, length[:, None] * own, scale, space, small)
        brightness = (y * weight).mean((2, 3))
        own_edges = edge_strength(y.reshape(-1, *x.shape[1:])).reshape(y.shape)
        structure = ((own_edges - edges[:, None]) ** 2).mean((2, 3))
        total = jnp.sum(-weights[0] * jnp.asarray(signs) * brightness + weights[1] * structure)
        return total, (brightness, structure)

    # Each sample has a copy of v of its own, so one backward pass gives the gradients of all
    # samples apart.
    gradient, terms = jax.grad(loss, has_aux=True)(jnp.broadcast_to(v, (z.shape[0], *v.shape)))
    return gradient, *terms


def _difference_body(
    gen: Generator,
    z: Float[Array, "b z"],
    psi: Array,
    arrays: dict[str, Array],
    *,
    space: str,
    shift: float,
    signs: tuple[float, ...],
    small: str | None = None,
    drawn: bool = True,
) -> tuple[Array, ...]:
    """Image, difference (above the threshold: object), its deviation, and the fewest peaks; drawn:
    False leaves the image out, and XLA does not draw it for two directions.
    """
    image = image_of(gen, gen.map(z, psi), small)
    move = jnp.broadcast_to(shift * arrays["directions"], (z.shape[0], *arrays["directions"].shape))
    y = jnp.clip(_shifted(gen, z, psi, move, arrays["scale"], space, small), -1, 1)
    other = y[:, 1] if len(signs) == 2 else jnp.clip(luminance(image), -1, 1)
    difference = signs[0] * (y[:, 0] - other)
    found = difference, difference.std((1, 2)), histogram_peaks(y).min(1)
    return (quantised(image), *found) if drawn else found


def histogram_peaks(y: Float[Array, "b m h w"]) -> Float[Array, "b m"]:
    """Local maxima of the histogram over [-1, 1] in 12 bins, smoothed over 3."""
    bins = jnp.clip(jnp.floor((y + 1) / 2 * BINS), 0, BINS - 1)
    counts = jnp.stack([(bins == i).mean((2, 3)) for i in range(BINS)], axis=-1)
    padded = jnp.pad(counts, ((0, 0), (0, 0), (1, 1)))
    smooth = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
    around = jnp.pad(smooth, ((0, 0), (0, 0), (1, 1)), constant_values=-1.0)
    return ((smooth >= around[..., :-2]) & (smooth >= around[..., 2:])).sum(-1).astype(jnp.float32)
