"""The nouns every layer shares: origins of weights, the generator contract, samples; and errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from sis_jax.errors import SisError as SisError
from sis_jax.errors import UsageError as UsageError
from sis_jax.errors import unknown_name as unknown_name

Array = Any  # jaxtyping's own `Array` imports JAX, which `--help` and the readers of files must not

Noise = Literal["const", "random", "none"]


@dataclass(frozen=True)
class Info:
    """Where a network comes from; copied into everything made with it, as the licence is.

    sha256: of the weights as stored. source: the file they were converted from.
    """

    name: str = "unnamed"
    licence: str = "unknown: ask whoever gave you the weights"
    source: str = "made in memory"
    sha256: str = ""
    layout: str = "sis_jax"


@dataclass(frozen=True)
class Samples:
    """A batch of generated images with all that is needed to make them again.

    z, w: latents. images: Float[n h w 3] in about [-1, 1]. features: tap -> Float[n r r c].
    """

    seeds: tuple[int, ...]
    z: Float[Array, "n z"]
    w: Float[Array, "n num_ws w"]
    images: Float[Array, "n rows columns 3"]
    features: dict[str, Float[Array, "n ..."]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seeds)

    def to_uint8(self) -> np.ndarray:
        """The images as uint8[n h w 3], as every StyleGAN2 does: clip(127.5 x + 128), truncated."""
        return to_uint8(self.images)


@runtime_checkable
class Generator(Protocol):
    """The interface of a generator to methods; any object with these members works.

    A tap is named by its resolution: "32x32" is the last stage's output there.
    """

    info: Info

    @property
    def resolution(self) -> int: ...
    @property
    def z_dim(self) -> int: ...
    @property
    def taps(self) -> tuple[str, ...]: ...

    def latents(self, seeds: Sequence[int]) -> Float[Array, "n z"]: ...
    def map(
        self, z: Float[Array, "n z"], truncation: float | Any = 1.0
    ) -> Float[Array, "n num_ws w"]: ...
    def synthesize(
        self, w: Float[Array, "n num_ws w"], noise: Noise = "const", taps: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "n rows columns 3"], dict[str, Float[Array, "n ..."]]]: ...
    def sample(
        self, seeds: Iterable[int], truncation: float = 1.0, taps: tuple[str, ...] = ()
    ) -> Samples: ...


class Sampling:
    """`sample` of a generator, by its `latents`, `map` and `synthesize`."""

    def sample(
        self: Any, seeds: Iterable[int], truncation: float = 1.0, taps: tuple[str, ...] = ()
    ) -> Samples:
        """Images for seeds as one batch; sample i depends on its own seed and nothing else."""
        seeds = tuple(int(s) for s in seeds)
        z = self.latents(seeds)
        w = self.map(z, truncation)
        images, features = self.synthesize(w, taps=taps)
        return Samples(seeds, z, w, images, features)


@runtime_checkable
class SkipGenerator(Protocol):
    """A generator that adds up its image over resolutions, and can give it at each of them.

    skips: names such as "128x128/rgb", which `synthesize` takes beside taps; where a compiled
        function uses nothing finer, the layers above do not run.
    """

    @property
    def skips(self) -> tuple[str, ...]: ...


def to_uint8(images: Float[Array, "*n h w 3"] | np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as uint8: clip(127.5 x + 128, 0, 255), truncated."""
    return np.clip(np.asarray(images, np.float32) * 127.5 + 128, 0, 255).astype(np.uint8)


def check_noise(noise: str) -> None:
    """UsageError for another value than those of `Noise`."""
    if noise not in ("const", "random", "none"):
        raise UsageError(f'noise must be "const", "random" or "none", got {noise!r}')


def check_taps(taps: Sequence[str], available: Sequence[str]) -> tuple[str, ...]:
    """`taps` as a tuple, or the one-sentence error that lists those that exist."""
    for tap in taps:
        if tap not in available:
            raise UsageError(f"this generator has no tap {tap!r}; it has {', '.join(available)}")
    return tuple(taps)


def check_w(w: Any, width: int) -> Any:
    """w [n, 1, width] or [n, width] as [n, width], or UsageError: of networks without W+ layers."""
    if w.ndim not in (2, 3) or w.shape[-1] != width or (w.ndim == 3 and w.shape[1] != 1):
        raise UsageError(
            f"w must be [n, 1, {width}] or [n, {width}] for this generator, got {list(w.shape)}"
        )
    return w.reshape(len(w), width)


def latents_from_seeds(seeds: Iterable[int], z_dim: int) -> np.ndarray:
    """z = `RandomState(seed).randn(1, z_dim)` per seed, Float32[n z_dim], as published."""
    seeds = [int(s) for s in seeds]
    for s in seeds:
        if not 0 <= s < 2**32:
            raise UsageError(f"seed {s} is out of range: seeds are integers from 0 to 4294967295")
    rows = [np.random.RandomState(s).randn(1, z_dim) for s in seeds]
    return np.concatenate(rows).astype(np.float32) if rows else np.zeros((0, z_dim), np.float32)
