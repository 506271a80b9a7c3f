"""The teacher: a generator and its parts, which together label any number of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from sis_jax.checkpoints import catalogue, load_generator
from sis_jax.data.files import plain, read_run
from sis_jax.data.parts import Parts
from sis_jax.methods import base as methods
from sis_jax.methods.base import Fitted
from sis_jax.methods.settings import restored
from sis_jax.models.moved import Moved, mixed
from sis_jax.types import Generator, SisError, UsageError

Labelled = tuple[
    UInt8[np.ndarray, "b h w 3"], UInt8[np.ndarray, "b h w"], Float[np.ndarray, "b h w"]
]


@dataclass(frozen=True)
class Teacher:
    """A generator, the parts found in it, and the method that labels its images."""

    gen: Generator
    parts: Parts
    fitted: Fitted

    @classmethod
    def of(cls, gen: Generator, parts: Parts) -> Teacher:
        """From a generator and its parts; SisError where these were found in another one."""
        mine, theirs = gen.info.sha256, parts.generator.sha256
        if mine and theirs and mine != theirs:
            raise SisError(
                f"the parts were found in {parts.generator.name} ({theirs[:12]}), this generator "
                f"is {gen.info.name} ({mine[:12]}): run python -m sis_jax.discover again"
            )
        gen = mixed(gen, parts.arrays)  # rare classes are drawn beside plain samples
        method = restored(methods.get(parts.method), plain(parts.settings))
        return cls(gen, parts, Fitted(method, parts.arrays))

    @classmethod
    def from_run(cls, run: str | Path, level: int = 0) -> Teacher:
        """From a run folder of `discover`; the generator is found again by its name."""
        parts = load_parts(run)
        parts = parts.level(level) if level else parts
        asked = read_run(run)["stages"].get("discover", {}).get("config", {}).get("gen")
        return cls.of(load_generator(asked), parts)

    def mixing(self, share: float) -> Teacher:
        """The same with another share of moved samples; UsageError without a rare class."""
        if not isinstance(self.gen, Moved):
            raise UsageError(
                "these parts have no rare class to mix in: find one with python -m "
                "sis_jax.discover --rare TEXT"
            )
        return replace(self, gen=replace(self.gen, share=float(share)))

    @property
    def truncation(self) -> float:
        """psi of the samples the parts were learned from."""
        return float(self.parts.settings.get("truncation", 0.7))

    def label(self, seeds: Sequence[int], truncation: float | None = None) -> Iterator[Labelled]:
        """Stream (images, masks of class ids, confidence in 0..1) of seeds, in batches."""
        for images, clusters, confidence in self.fitted.label_seeds(self.gen, seeds, truncation):
            yield images, self.parts.classify(clusters), confidence


def load_parts(run: str | Path) -> Parts:
    """The parts of a run; UsageError where there are none, or a generator in its place."""
    catalogue.check_run(run)
    return Parts.load(run)
