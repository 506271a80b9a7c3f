"""A generator of which a share of the samples is moved in W, for classes it draws too rarely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Float

from sis_jax.types import Array, Info, Noise, Sampling, SkipGenerator


@dataclass(frozen=True)
class Moved(Sampling):
    """`gen` with w + `move` for a share of all latents; which ones depends on each z alone.

    move: Float[w], added to every W+ layer after truncation. share: 0..1; a sample moved at one
        share is moved at every larger one.
    """

    gen: Any
    move: Any  # an array; a pytree's structure is also built with other things in its place
    share: float = field(default=1.0, metadata={"static": True})

    @property
    def info(self) -> Info:
        """Origin and licence of the generator."""
        return self.gen.info

    @property
    def resolution(self) -> int:
        return self.gen.resolution

    @property
    def z_dim(self) -> int:
        return self.gen.z_dim

    @property
    def taps(self) -> tuple[str, ...]:
        return self.gen.taps

    @property
    def skips(self) -> tuple[str, ...]:
        return self.gen.skips if isinstance(self.gen, SkipGenerator) else ()

    def latents(self, seeds: Sequence[int]) -> Float[Array, "n z"]:
        return self.gen.latents(seeds)

    def chosen(self, z: Float[Array, "n z"]) -> Float[Array, "n"]:
        """1 for latents that are moved, 0 for others, by a projection of z that is N(0, 1)."""
        z = jnp.asarray(z)
        # Any fixed direction that is no axis
        signs = jnp.where(jnp.arange(z.shape[1]) * 7 % 13 % 2 == 0, 1.0, -1.0)
        return (ndtr((z * signs).sum(1) / jnp.sqrt(z.shape[1])) <= self.share).astype(jnp.float32)

    def map(self, z: Float[Array, "n z"], truncation: float | Any = 1.0) -> Float[Array, "n s w"]:
        return self.gen.map(z, truncation) + self.chosen(z)[:, None, None] * self.move

    def synthesize(
        self, w: Float[Array, "n s w"], noise: Noise = "const", taps: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "n rows columns 3"], dict[str, Float[Array, "n ..."]]]:
        return self.gen.synthesize(w, noise, taps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MovedNetwork(Moved):
    """The same where the generator is a pytree, which this then is too."""


def moved(gen: Any, move: Float[np.ndarray, "w"], share: float = 1.0) -> Moved:
    """`gen` with a share of its samples moved by `move`; a pytree where `gen` is one."""
    plain = jax.tree.structure(gen) == jax.tree.structure(0)
    return (Moved if plain else MovedNetwork)(gen, jnp.asarray(move), float(share))


def mixed(gen: Any, arrays: Mapping[str, Any]) -> Any:
    """The generator of these parts: `Moved` where they hold a rare class, else `gen`."""
    if "rare/move" not in arrays or isinstance(gen, Moved):
        return gen
    return moved(gen, arrays["rare/move"], float(np.ravel(arrays["rare/share"])[0]))


def rare_cluster(arrays: Mapping[str, Any]) -> int | None:
    """The cluster of the rare class in parts with these arrays, None where there is none."""
    return len(arrays["centers"]) - 1 if "rare/move" in arrays else None
