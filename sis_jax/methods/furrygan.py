"""FurryGAN (Bae et al., ECCV 2022, arXiv 2208.10422): the mask that the generator itself draws.

A generator of a foreground and a background learns from photos alone to compose both by a mask. The
discriminator sees composed images and bare foregrounds, so the foreground holds the whole object;
where the background would do, a loss takes the mask away. The coarse mask is binary and has a least
area; the fine one may add little, such as hair. A predictor that learns the mask from images must
find the same one in the composed image and in its foreground. The networks are in
`models/furrygan.py`, the losses in `training/furrygan.py`, `train_generator --foreground` trains
them; each file says where it differs from the paper. Nothing is left to fit here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, UInt8

from sis_jax.methods.base import SHOWN, Arrays, Fitted, Labelled, features_of, thresholded
from sis_jax.methods.settings import FurryGANSettings
from sis_jax.models.furrygan import FurryGAN
from sis_jax.ops import selection
from sis_jax.ops.sampling import map_samples, probe, quantised, sample_seeds
from sis_jax.types import Array, Generator, Noise, Samples, UsageError

MASK = ("mask",)
PROBE = 64  # samples that describe the parts
NAMES = ("background", "foreground")


@dataclass(frozen=True)
class FurryGANMasks(FurryGANSettings):
    """Foreground and background, as a FurryGAN draws them; settings: `FurryGANSettings`."""

    wants: ClassVar[tuple[str, ...]] = ()
    clusters_by_k: ClassVar[bool] = False
    adds_clusters: ClassVar[bool] = False
    shaky_cure: ClassVar[str] = ""

    def fit(self, gen: Generator, seed: int = 0) -> Fitted:
        """Describe both parts; nothing is learned. UsageError for another generator."""
        self._check(gen)
        seeds = sample_seeds(seed, PROBE)
        facts, verdict = selection.describe(self.label_seeds({}, gen, seeds), 2)
        plain = (mask > self.threshold for _, mask in self._masks(gen, seeds, "const"))
        other = (mask > self.threshold for _, mask in self._masks(gen, seeds, "none"))
        both = [(a == i, b == i) for a, b in zip(plain, other) for i in (0, 1)]
        agreement = [
            sum(float((a & b).sum()) for a, b in both[i::2])
            / max(sum(float((a | b).sum()) for a, b in both[i::2]), 1.0)
            for i in (0, 1)
        ]
        clusters = tuple(
            fact | {"id": i, "name": name, "background": i == 0, "agreement": agreement[i]}
            for i, (fact, name) in enumerate(zip(facts, NAMES))
        )
        why = f"the generator draws it behind its mask; by the frame: {verdict['why']}"
        background = {"found": True, "why": why}
        return Fitted(self, {}, clusters, background, None, tuple(self._doubts(clusters)))

    def taps(self, arrays: Arrays) -> tuple[str, ...]:
        """The mask alone."""
        return MASK

    def predict(
        self, arrays: Arrays, samples: Samples, gen: Generator | None = None
    ) -> UInt8[np.ndarray, "n h w"]:
        """1 where samples made with `taps` show foreground, else 0; `gen` is not used."""
        (mask,) = features_of(samples, MASK)
        return (np.asarray(mask) > self.threshold).astype(np.uint8)

    def label_seeds(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int], truncation: float | None = None
    ) -> Labelled:
        """Stream (images, 1 = foreground or 0, confidence) of seeds, in batches."""
        yield from thresholded(self._masks(gen, seeds, "const", truncation), self.threshold)

    def estimate(self, gen: Generator) -> dict[str, float]:
        """Seconds and bytes of a whole `discover`, from a second's worth of masks."""
        self._check(gen)
        began = time.perf_counter()
        masks = probe(self.label_seeds({}, gen, range(PROBE)))
        drawn = 3 * PROBE + SHOWN
        seconds = time.perf_counter() - began + drawn * masks.each
        return {"seconds": seconds, "memory_bytes": masks.memory}

    def _check(self, gen: Any) -> None:
        if not isinstance(gen, FurryGAN):
            raise UsageError(
                "method furrygan takes the masks that a FurryGAN draws, this generator is a "
                f"{type(gen).__name__}: train one with train_generator --foreground, or use "
                "--method segmentation_in_style"
            )
        if not 0 < self.threshold < 1:
            raise UsageError(f"threshold is {self.threshold}, expected above 0 and below 1")

    def _masks(
        self, gen: Generator, seeds: Sequence[int], noise: Noise, truncation: float | None = None
    ) -> Iterator[tuple[UInt8[np.ndarray, "b h w 3"], Float[np.ndarray, "b h w"]]]:
        """Stream (images, soft masks in 0..1) of seeds, in batches."""
        psi = self.truncation if truncation is None else truncation
        yield from map_samples(gen, list(seeds), _masked, truncation=psi, noise=noise)

    def _doubts(self, clusters: Sequence[dict[str, Any]]) -> Iterator[str]:
        share = clusters[1]["share"]
        if not 0.02 < share < 0.98:
            yield (
                f"The foreground covers {share:.0%} of the images: train longer, or with another "
                "--foreground-area."
            )


def _masked(gen: Generator, z: Array, psi: Array, *, noise: Noise) -> tuple[Array, Array]:
    image, found = gen.synthesize(gen.map(z, psi), noise, MASK)
    return quantised(image), found["mask"]
