"""DCGAN's generator (Radford, Metz, Chintala 2016, arXiv 1511.06434), batch norm folded.

A transposed convolution with kernel 4, stride 2, padding 1 is one dense 2x2 convolution that gives
the four phases: along an axis, out[2m] = k[1] x[m] + k[3] x[m-1] and out[2m+1] = k[0] x[m+1] + k[2]
x[m].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sis_jax.ops.convolution import conv2d
from sis_jax.types import (
    Info,
    Noise,
    Sampling,
    UsageError,
    check_noise,
    check_taps,
    check_w,
    latents_from_seeds,
)


@dataclass(frozen=True)
class DCGANConfig:
    """Shape of a generator. channels: at 4, 8, ... pixels, before the last layer."""

    z_dim: int
    channels: tuple[int, ...]

    @property
    def resolution(self) -> int:
        """Edge length of an image in pixels."""
        return 4 * 2 ** len(self.channels)


class Stage(nnx.Module):
    """Transposed convolution (kernel 4), then scale and offset, the folded batch norm."""

    def __init__(self, n_in: int, n_out: int):
        self.weight = nnx.Param(jnp.zeros((4, 4, n_in, n_out)))
        self.scale = nnx.Param(jnp.ones((n_out,)))
        self.offset = nnx.Param(jnp.zeros((n_out,)))

    def first(self, z: Float[Array, "n z"]) -> Float[Array, "n 4 4 c"]:
        """From a vector: stride 1, no padding."""
        return jnp.einsum("nz,hwzc->nhwc", z, self.weight[...]) * self.scale[...] + self.offset[...]

    def up(self, x: Float[Array, "n h w i"]) -> Float[Array, "n 2*h 2*w o"]:
        """Twice the size: stride 2, padding 1."""
        return conv_transpose(x, self.weight[...]) * self.scale[...] + self.offset[...]


def conv_transpose(
    x: Float[Array, "n h w i"], kernel: Float[Array, "4 4 i o"]
) -> Float[Array, "n 2*h 2*w o"]:
    """torch's `ConvTranspose2d(i, o, 4, stride=2, padding=1)`, kernel as HWIO."""
    n, h, w, c = x.shape
    out = kernel.shape[-1]
    # Tap 0 reaches x[m-1] for the even phase and x[m] for the odd one, tap 1 x[m] and x[m+1]; the
    # odd phase is thus read one sample later.
    # [tap_h, phase_h, kw, i, o]
    taps = jnp.stack([jnp.stack([kernel[3], kernel[2]]), jnp.stack([kernel[1], kernel[0]])])
    taps = jnp.stack(
        [
            jnp.stack([taps[:, :, 3], taps[:, :, 2]], 2),
            jnp.stack([taps[:, :, 1], taps[:, :, 0]], 2),
        ],
        1,
    )
    # [tap_h, tap_w, i, (phase_h phase_w o)]
    dense = jnp.transpose(taps, (0, 1, 4, 2, 3, 5)).reshape(2, 2, c, 4 * out)
    y = conv2d(x, dense, padding=1).reshape(n, h + 1, w + 1, 2, 2, out)
    rows = jnp.stack([y[:, :h, :, 0], y[:, 1:, :, 1]], axis=2)  # [n, h, phase_h, w + 1, phase_w, o]
    # [n, h, phase_h, w, phase_w, o]
    both = jnp.stack([rows[:, :, :, :w, 0], rows[:, :, :, 1:, 1]], axis=4)
    return both.reshape(n, 2 * h, 2 * w, out)


class DCGAN(Sampling, nnx.Module):
    """A DCGAN generator behind the protocol of `types.Generator`; a pytree.

    Taps: "4x4", "8x8", ... below the image's size: each stage after batch norm and ReLU. w is z, as
        [n, 1, z_dim].
    """

    def __init__(self, config: DCGANConfig, info: Info | None = None):
        widths = (config.z_dim, *config.channels, 3)
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            setattr(self, f"stage{i}", Stage(n_in, n_out))
        self.config = config
        self.info = info or Info()

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def z_dim(self) -> int:
        return self.config.z_dim

    @property
    def num_ws(self) -> int:
        """One: the latent enters at the bottom only."""
        return 1

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the feature maps that `synthesize` can return, coarse to fine."""
        return tuple(f"{4 * 2**i}x{4 * 2**i}" for i in range(len(self.config.channels)))

    def latents(self, seeds: Iterable[int]) -> Float[Array, "n z"]:
        """z ~ N(0, 1), one row per seed."""
        return jnp.asarray(latents_from_seeds(seeds, self.z_dim))

    def map(
        self, z: Float[Array, "n z"], truncation: float | jax.Array = 1.0
    ) -> Float[Array, "n 1 z"]:
        """z itself as [n, 1, z_dim]; `truncation` (psi) scales it towards 0, the average of z."""
        z = jnp.asarray(z)
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise UsageError(f"z must be [n, {self.z_dim}] for this generator, got {list(z.shape)}")
        return (truncation * z)[:, None]

    def synthesize(
        self,
        w: Float[Array, "n *layers z"],
        noise: Noise = "const",
        taps: tuple[str, ...] = (),
        key: jax.Array | None = None,
        dtype: str = "float32",
    ) -> tuple[Float[Array, "n r r 3"], dict[str, Float[Array, "n s s c"]]]:
        """Image in [-1, 1] and the features named in `taps`, from w [n, 1, z_dim] or [n, z_dim];
        noise and key change nothing.

        dtype: "float32", or "bfloat16" for the convolutions. UsageError for another w or an unknown
            tap.
        """
        taps = check_taps(taps, self.taps)
        w = check_w(jnp.asarray(w), self.z_dim)
        check_noise(noise)
        return _synthesize(self, w, taps, dtype)


@partial(jax.jit, static_argnames=("taps", "dtype"))
def _synthesize(
    gen: DCGAN, z: jax.Array, taps: tuple[str, ...], dtype: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    features: dict[str, jax.Array] = {}
    stages: list[Stage] = [getattr(gen, f"stage{i}") for i in range(len(gen.taps) + 1)]
    x = jax.nn.relu(stages[0].first(z)).astype(dtype)
    for name, stage in zip(gen.taps, stages[1:]):
        features[name] = x
        y = stage.up(x)
        x = jax.nn.relu(y).astype(dtype)
    return jnp.tanh(y.astype(jnp.float32)), {tap: features[tap] for tap in taps}
