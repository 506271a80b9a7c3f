"""StyleGAN2's discriminator (Karras et al. 2020, arXiv 1912.04958, sections 4.2 and 4.3).

The label projection follows arXiv 2006.06676. Orientation of parameters: `models/stylegan2.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sis_jax.models.conditional import check_labels
from sis_jax.models.stylegan2 import LR_MULTIPLIER, AnyArray, Linear, Rng, normal, resolutions
from sis_jax.ops import convolution
from sis_jax.types import Info, UsageError

# Pixels from which on layers run for one image after another where they are differentiated, and
# again on the way back: those of four images of 1024 pixels would take 10 GB.
ONE_BY_ONE = 256


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of a discriminator. mbstd_group: images that share a minibatch standard deviation.

    Conditional ones have c_dim classes. cmap_dim: width of the label network whose output is
    compared with the image's (ADA); 0: the label picks one of c_dim scores (the first TensorFlow
    code).
    """

    resolution: int
    channels: tuple[int, ...]
    c_dim: int = 0
    cmap_dim: int = 0
    mapping_layers: int = 8
    mbstd_group: int = 4
    conv_clamp: float | None = None


class Conv(nnx.Module):
    """Convolution with equalised learning rate; `down` filters and halves."""

    def __init__(
        self, n_in: int, n_out: int, size: int, rng: Rng, *, bias: bool = True, down: bool = False
    ):
        self.weight = nnx.Param(normal(rng, size, size, n_in, n_out))
        self.bias = nnx.Param(jnp.zeros((n_out,))) if bias else None
        self.size, self.down = size, down

    def __call__(self, x: jax.Array, clamp: float | None = None) -> jax.Array:
        kernel = self.weight[...] * (1.0 / np.sqrt(self.weight[...].size // self.weight.shape[-1]))
        if self.down and self.size == 1:
            return convolution.conv2d(convolution.downsample2d(x), kernel)
        y = convolution.conv_down(x, kernel) if self.down else convolution.conv2d(x, kernel)
        if self.bias is None:
            return y
        return convolution.leaky_relu(y + self.bias[...].astype(y.dtype), clamp)


class DiscriminatorBlock(nnx.Module):
    """Residual block that halves the size: (conv1_down(conv0(x)) + skip(x)) / sqrt(2)."""

    def __init__(self, n_in: int, n_out: int, rng: Rng, clamp: float | None):
        self.conv0 = Conv(n_in, n_in, 3, rng)
        self.conv1 = Conv(n_in, n_out, 3, rng, down=True)
        self.skip = Conv(n_in, n_out, 1, rng, bias=False, down=True)
        self.clamp = clamp

    def __call__(self, x: jax.Array) -> jax.Array:
        half = np.sqrt(0.5).astype(np.float32)
        y = self.conv1(self.conv0(x, self.clamp)) * half.astype(x.dtype)
        if self.clamp is not None:  # the published networks fold the gain in before they clamp
            y = jnp.clip(y, -self.clamp * half, self.clamp * half)
        return y + self.skip(x) * half.astype(x.dtype)


class DiscriminatorEpilogue(nnx.Module):
    """The 4x4 end: minibatch standard deviation, convolution, linear layers or projection."""

    def __init__(self, channels: int, config: DiscriminatorConfig, rng: Rng):
        self.conv = Conv(channels + 1, channels, 3, rng)
        self.fc = Linear(16 * channels, channels, rng)
        self.out = Linear(channels, config.cmap_dim or config.c_dim or 1, rng)
        self.config = config

    def __call__(self, x: jax.Array, label: jax.Array | None) -> jax.Array:
        x = minibatch_stddev(x, self.config.mbstd_group)
        x = self.conv(x, self.config.conv_clamp)
        x = convolution.leaky_relu(self.fc(x.reshape(x.shape[0], -1)))
        x = self.out(x)
        gain = 1 / np.sqrt(self.config.cmap_dim) if self.config.cmap_dim else 1.0
        return x if label is None else jnp.sum(x * label, axis=1, keepdims=True) * gain


def minibatch_stddev(x: Float[Array, "n h w c"], group: int) -> Float[Array, "n h w c+1"]:
    """x with one more channel: the standard deviation over groups of images, averaged over the
    rest.

    Members of a group are n / group apart, as published; n is a multiple of the group, or smaller.
    """
    n = x.shape[0]
    group = min(group, n)
    if n % group:
        raise UsageError(
            f"the discriminator compares images in groups of {group}: give a multiple of {group} "
            f"images, not {n}"
        )
    y = x.astype(jnp.float32).reshape(group, n // group, *x.shape[1:])
    deviation = jnp.sqrt(jnp.var(y, axis=0) + 1e-8).mean(axis=(1, 2, 3))  # [n / group]
    extra = jnp.broadcast_to(jnp.tile(deviation, group)[:, None, None, None], (*x.shape[:3], 1))
    return jnp.concatenate([x, extra.astype(x.dtype)], axis=-1)


class LabelMapping(nnx.Module):
    """The discriminator's label network: embed, normalise, `layers` times linear and leaky ReLU."""

    def __init__(self, config: DiscriminatorConfig, rng: Rng):
        self.embed = Linear(config.c_dim, config.cmap_dim, rng)
        for i in range(config.mapping_layers):
            setattr(
                self,
                f"fc{i}",
                Linear(config.cmap_dim, config.cmap_dim, rng, lr_multiplier=LR_MULTIPLIER),
            )
        self.depth = config.mapping_layers

    def __call__(self, labels: jax.Array) -> jax.Array:
        x = convolution.pixel_norm(self.embed(labels))
        for i in range(self.depth):
            x = convolution.leaky_relu(getattr(self, f"fc{i}")(x))
        return x


class Discriminator(nnx.Module):
    """disc(images) -> one score per image, higher for images it takes as real."""

    def __init__(self, config: DiscriminatorConfig, rng: Rng = None, info: Info | None = None):
        sizes = resolutions(config.resolution)[::-1]
        channels = config.channels[::-1]
        self.fromrgb = Conv(3, channels[0], 1, rng)
        for r, n_in, n_out in zip(sizes, channels, channels[1:]):
            setattr(self, f"b{r}", DiscriminatorBlock(n_in, n_out, rng, config.conv_clamp))
        self.mapping = LabelMapping(config, rng) if config.c_dim and config.cmap_dim else None
        self.b4 = DiscriminatorEpilogue(channels[-1], config, rng)
        self.config = config
        self.info = info or Info()

    def score(
        self, images: jax.Array, labels: jax.Array | None = None, dtype: Any = jnp.float32
    ) -> jax.Array:
        """The pure forward pass, for losses: above 4x4 in `dtype`, the end in float32."""
        sizes = resolutions(self.config.resolution)[:0:-1]
        fine = [r for r in sizes if r >= ONE_BY_ONE]
        x = images.astype(dtype)
        if fine:
            one = jax.checkpoint(lambda image: self._down(image[None], fine, True)[0])
            x = jax.lax.map(one, x)
        x = self._down(x, sizes[len(fine) :], not fine)
        if not self.config.c_dim:
            return self.b4(x.astype(jnp.float32), None)
        if labels is None:
            raise UsageError(
                "this discriminator is conditional: give labels, one-hot rows of "
                f"{self.config.c_dim}"
            )
        return self.b4(
            x.astype(jnp.float32), labels if self.mapping is None else self.mapping(labels)
        )

    def _down(self, x: jax.Array, sizes: Sequence[int], images: bool) -> jax.Array:
        """The blocks of some resolutions, fine to coarse. images: whether x is images yet."""
        if images:
            x = self.fromrgb(x, self.config.conv_clamp)
        for r in sizes:
            x = getattr(self, f"b{r}")(x)
        return x

    def __call__(
        self, images: Float[AnyArray, "n r r 3"], labels: Float[AnyArray, "n c"] | None = None
    ) -> Float[Array, "n 1"]:
        """Scores of n images in [-1, 1], n at most 4 or a multiple. labels: one-hot."""
        images = jnp.asarray(images, jnp.float32)
        resolution = self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (resolution, resolution, 3):
            raise UsageError(
                f"images must be [n, {resolution}, {resolution}, 3] for this discriminator, got "
                f"{list(images.shape)}"
            )
        rows = check_labels(labels, len(images), self.config.c_dim) if labels is not None else None
        return _score(self, images, rows)


@jax.jit
def _score(disc: Discriminator, images: jax.Array, labels: jax.Array | None) -> jax.Array:
    return disc.score(images, labels)
