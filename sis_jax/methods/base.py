"""The methods, one paper per file, and their common parts.

A method is a frozen dataclass of hyper-parameters; `fit(gen, seed)` returns a `Fitted`, a value
that predicts. `METHODS` maps the name a user types to the class.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from sis_jax.types import Array, Generator, Samples, SkipGenerator, UsageError, unknown_name

Arrays = Mapping[str, Any]
Labelled = Iterator[
    tuple[UInt8[np.ndarray, "b h w 3"], UInt8[np.ndarray, "b h w"], Float[np.ndarray, "b h w"]]
]

METHODS: dict[str, str] = {
    "segmentation_in_style": "sis_jax.methods.segmentation_in_style:SegmentationInStyle",
    "labels4free": "sis_jax.methods.labels4free:Labels4Free",
    "datasetgan": "sis_jax.methods.datasetgan:DatasetGAN",
    "latent_direction": "sis_jax.methods.latent_direction:LatentDirection",
    "style_mixing": "sis_jax.methods.style_mixing:StyleMixing",
    "furrygan": "sis_jax.methods.furrygan:FurryGANMasks",
}


# Pixels along an edge of the image that labels follow, and of the images that a method compares
# with each other, in generators that draw more.
OUTLINE = 128
SHOWN = 8  # samples whose labels the gallery shows


def small_image(gen: Generator, size: int = OUTLINE) -> str | None:
    """The name of the generator's image of `size` pixels, for `synthesize`, where it draws a larger
    one and has this one on the way: the layers above need not run.
    """
    name = f"{size}x{size}/rgb"
    if isinstance(gen, SkipGenerator) and gen.resolution > size and name in gen.skips:
        return name
    return None


@dataclass(frozen=True)
class Inputs:
    """The inputs of a method beside the generator, which `stages/inputs.py` reads.

    photos: UInt8[n r r 3] at the resolution that the method asks for. discriminator: images Float[n
        r r 3] -> Float[n 1]. annotated: UInt8[n r r], class ids of the samples of
        `annotated_seeds`, 255 = not annotated; annotated_names: {class id: name}. folder: where a
        long fit keeps its state, None nowhere.
    """

    photos: UInt8[np.ndarray, "n r r 3"] | None = None
    discriminator: Any = None
    annotated: UInt8[np.ndarray, "m r r"] | None = None
    annotated_seeds: tuple[int, ...] = ()
    annotated_names: dict[int, str] | None = None
    folder: Path | None = None


class Method(Protocol):
    """A method as the stages see it: hyper-parameters, and functions of the learned `arrays`.

    wants: fields of `Inputs` for `fit(gen, seed, inputs=...)`. clusters_by_k: whether the frame
        decides which clusters are background, and another k may help. adds_clusters: whether
        arrays["centers"] may get one more row. shaky_cure: the remedy for clusters of low
        agreement, "" where there is none.
    """

    wants: ClassVar[tuple[str, ...]]
    clusters_by_k: ClassVar[bool]
    adds_clusters: ClassVar[bool]

    @property
    def shaky_cure(self) -> str: ...
    def fit(self, gen: Generator, seed: int = 0) -> Fitted: ...
    def taps(self, arrays: Arrays) -> tuple[str, ...]: ...
    def predict(
        self, arrays: Arrays, samples: Samples, gen: Generator | None = None
    ) -> UInt8[np.ndarray, "n h w"]: ...
    def label_seeds(
        self, arrays: Arrays, gen: Generator, seeds: Sequence[int], truncation: float | None = None
    ) -> Labelled: ...
    def estimate(self, gen: Generator) -> dict[str, float]: ...


@dataclass(frozen=True, eq=False)
class Fitted:
    """The parts that a method learned of a generator: a value that labels its samples.

    method: with the settings it ended up with. arrays: with `method` enough to label. clusters:
        {"id", "share", "border_share", "background", "confidence", "agreement", ...}. background:
        {"found": bool, "why": str}. sweep: why these settings, or None. warnings: sentences with
        their cure. files: {name: bytes} to store beside the parts. finer: the level below,
        or None; its arrays label both, its clusters have a "parent".
    """

    method: Any
    arrays: Arrays
    clusters: tuple[dict[str, Any], ...] = ()
    background: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)
    finer: Fitted | None = None

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps for `gen.sample(seeds, taps=...)`, whose samples `predict` takes."""
        return self.method.taps(self.arrays)

    def predict(self, samples: Samples, gen: Generator | None = None) -> UInt8[np.ndarray, "n h w"]:
        """Cluster of every pixel of samples made with `taps=fitted.taps`; gen: their generator,
        needed where `taps` is empty. UsageError where either is missing.
        """
        return self.method.predict(self.arrays, samples, gen)

    def label_seeds(
        self, gen: Generator, seeds: Sequence[int], truncation: float | None = None
    ) -> Labelled:
        """Stream (images UInt8[b h w 3], clusters UInt8[b h w], confidence 0..1) of seeds."""
        return self.method.label_seeds(self.arrays, gen, seeds, truncation)


def features_of(samples: Samples, taps: tuple[str, ...]) -> tuple[Any, ...]:
    """The features of `taps`, in their order. UsageError where the samples lack one."""
    missing = [t for t in taps if t not in samples.features]
    if missing:
        raise UsageError(
            f"these samples carry no {missing[0]} features: make them with gen.sample(seeds, "
            f"taps={taps})"
        )
    return tuple(samples.features[tap] for tap in taps)


def thresholded(
    masks: Iterable[tuple[UInt8[np.ndarray, "b h w 3"], Float[np.ndarray, "b h w"]]],
    threshold: float,
) -> Labelled:
    """Stream (images, 1 = foreground or 0, confidence) of images with soft masks m in 0..1.

    Confidence: how far m is from the threshold t, over how far it could be; so m is
        t + confidence (1 - t), or t - confidence t.
    """
    t = np.float32(threshold)
    for image, mask in masks:
        inside = mask > t
        room = np.maximum(np.where(inside, 1 - t, t), 1e-6).astype(np.float32)
        yield image, inside.astype(np.uint8), np.clip(np.abs(mask - t) / room, 0, 1)


def rendered(
    gen: Generator, z: Array, truncation: Array, taps: tuple[str, ...]
) -> tuple[Array, dict[str, Array]]:
    """(images, features of `taps`) of latents, inside a compiled function."""
    return gen.synthesize(gen.map(z, truncation), "const", taps)


def generator_of(gen: Generator | None) -> Generator:
    """`gen`, or UsageError where a method that draws samples again got none."""
    if gen is None:
        raise UsageError("this method draws the samples again: give predict(samples, gen)")
    return gen


def get(name: str) -> type:
    """The class of a method by its name."""
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    module, cls = METHODS[name].split(":")
    return getattr(importlib.import_module(module), cls)
