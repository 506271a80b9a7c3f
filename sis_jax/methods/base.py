"""The methods, one paper per file, and what they have in common.

A method is a frozen dataclass of hyper-parameters: the constructor stores, `fit(gen, seed)` returns
a fitted copy, learned attributes end in `_`. `METHODS` maps the name a user types to the class;
`discover --method NAME` turns the class's fields into flags.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from sis_jax.types import Generator, Samples, unknown_name

METHODS: dict[str, str] = {
    "segmentation_in_style": "sis_jax.methods.segmentation_in_style:SegmentationInStyle",
    "labels4free": "sis_jax.methods.labels4free:Labels4Free",
    "datasetgan": "sis_jax.methods.datasetgan:DatasetGAN",
    "latent_direction": "sis_jax.methods.latent_direction:LatentDirection",
    "style_mixing": "sis_jax.methods.style_mixing:StyleMixing",
}


@dataclass(frozen=True)
class Inputs:
    """What a method needs beside the generator: methods open no files, so the verb reads them
    (`sis_jax/stages/inputs.py`).

    photos: UInt8[n r r 3], real photos at the generator's resolution. discriminator: images Float[n
        r r 3] -> Float[n 1].
    painted: UInt8[n r r], class ids somebody painted over the samples of `painted_seeds`, 255 = not
        painted; painted_names: {class id: name}.
    folder: where a long fit may keep what it needs to go on after an interruption; None keeps
        nothing.
    """

    photos: UInt8[np.ndarray, "n r r 3"] | None = None
    discriminator: Any = None
    painted: UInt8[np.ndarray, "m r r"] | None = None
    painted_seeds: tuple[int, ...] = ()
    painted_names: dict[int, str] | None = None
    folder: Path | None = None


class Method(Protocol):
    """What the verbs ask of a method. `clusters_`: facts per cluster; `arrays_`: everything
    learned, by name; `sweep_`: why these settings.

    A method that needs more than a generator has `wants`, names of fields of `Inputs`, and takes
    them as `fit(gen, seed, inputs=...)`. Optional members: `files_`, {name: bytes} to lie beside
    the parts (curves, logs); `warnings_`, sentences with their cure; `estimate()`, for `--dry-run`;
    `shaky_cure`, what to do about clusters of low agreement, where that is the settings' fault
    ("lower k"); `adds_clusters`, true where arrays_["centers"] may get one more row (`discover
    --rare`).
    """

    clusters_: list[dict[str, Any]]
    arrays_: dict[str, np.ndarray]
    background_: dict[str, Any]
    sweep_: dict[str, Any] | None

    def fit(self, gen: Generator, seed: int = 0) -> Method: ...
    def predict(self, samples: Samples) -> UInt8[np.ndarray, "n h w"]: ...
    def label_seeds(self, gen: Generator, seeds: Sequence[int]) -> Any: ...
    def restored(self, arrays: dict[str, np.ndarray]) -> Method: ...


def get(name: str) -> type:
    """The class of a method by its name."""
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    module, cls = METHODS[name].split(":")
    return getattr(importlib.import_module(module), cls)


def fill_in(method: Any, **learned: Any) -> None:
    """Set what was learned. Methods are frozen for users; `fit` fills in a copy of its own."""
    for name, value in learned.items():
        object.__setattr__(method, name, value)
