"""The projected discriminator (Sauer et al. 2021, arXiv 2111.01007): small discriminators on the
features of a frozen backbone at strides 4 to 32, mixed over channels and scales at random.

Where this differs from the released code:
* Images are enlarged to 128 pixels, or reduced to 224, not always resized to 224.
* The mixed features keep the size of their stride instead of twice that, and have half the
  channels; every discriminator halves them down to 4 x 4 (7 x 7) and scores each of these places.
* Batch normalisation takes the images of one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from sis_jax.ops.resize import resize_bilinear

TAPS = (1, 2, 3, 4)  # of a backbone's features: strides 4, 8, 16, 32
MIXED = (32, 64, 128, 256)  # channels after mixing
WIDEST, LAST = 256, 4  # channels of a discriminator's last features, and their pixels at least
SIZES = 128, 224  # pixels of the images that the backbone sees, at least and at most


class Fixed(nnx.Variable):
    """Random weights that are never trained."""


class SingularVector(nnx.Variable):
    """An estimate of a kernel's first singular vector, better with every step."""


@dataclass(frozen=True)
class ProjectedConfig:
    """Shape of a projected discriminator. backbone: its name. channels: of its features at strides
    4 to 32. size: pixels of the images that it sees.
    """

    backbone: str
    channels: tuple[int, ...]
    size: int


def config_for(backbone: Any, resolution: int) -> ProjectedConfig:
    """For images of `resolution` pixels. backbone: of `load_backbone`, strides 2 to 32."""
    channels = tuple(backbone.channels[i] for i in TAPS)
    return ProjectedConfig(backbone.info.name, channels, int(np.clip(resolution, *SIZES)))


class ProjectedDiscriminator(nnx.Module):
    """Features of a backbone to scores, higher for real images."""

    def __init__(self, config: ProjectedConfig, rng: np.random.Generator):
        self.config = config
        across = [_random(rng, i, o) for i, o in zip(config.channels, MIXED)]
        down = [_random(rng, i, o) for o, i in pairwise(MIXED)]
        self.across, self.down = (nnx.List([Fixed(a) for a in part]) for part in (across, down))
        sizes = [config.size // stride for stride in (4, 8, 16, 32)]
        self.heads = nnx.List([Head(c, size, rng) for c, size in zip(MIXED, sizes)])

    def features(self, backbone: Any, images: Float[Array, "n r r 3"]) -> list[Array]:
        """Mixed features, Float[n h w c] each, the finest first. images: in [-1, 1]."""
        size = self.config.size
        found = backbone(resize_bilinear(images.astype(jnp.float32), (size, size)))
        mixed = [_mix(found[i], kernel) for i, kernel in zip(TAPS, self.across)]
        for i in reversed(range(len(mixed) - 1)):
            _, height, width, _ = mixed[i].shape
            coarser = resize_bilinear(mixed[i + 1], (height, width))
            mixed[i] = mixed[i] + _mix(coarser, self.down[i])
        return mixed

    def __call__(self, features: list[Array]) -> Float[Array, "n s"]:
        """Scores of all places at all scales; moves the estimates of the singular vectors on."""
        return jnp.concatenate([head(x) for head, x in zip(self.heads, features)], axis=1)


class Head(nnx.Module):
    """One discriminator: halving convolutions, one more, and a score per place."""

    def __init__(self, channels: int, size: int, rng: np.random.Generator):
        layers = []
        while size // 2 >= LAST:
            wide = min(4 * channels, WIDEST)
            layers.append(NormedConv(channels, wide, rng, size=4, stride=2))
            channels, size = wide, size // 2
        layers.append(NormedConv(channels, WIDEST, rng, size=3))
        self.layers = nnx.List(layers)
        self.norms = nnx.List([BatchMoments(layer.channels) for layer in layers])
        self.score = NormedConv(WIDEST, 1, rng, size=1)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n s"]:
        for layer, norm in zip(self.layers, self.norms):
            x = jax.nn.leaky_relu(norm(layer(x)), 0.2)
        return self.score(x).reshape(len(x), -1)


class NormedConv(nnx.Module):
    """Convolution by a kernel over its spectral norm (Miyato et al. 2018, arXiv 1802.05957)."""

    def __init__(
        self, n_in: int, n_out: int, rng: np.random.Generator, *, size: int, stride: int = 1
    ):
        # The kernel's size is divided out, but not from the learning rate.
        kernel = rng.standard_normal((size, size, n_in, n_out), dtype=np.float32)
        self.weight = nnx.Param(jnp.asarray(kernel / (size * math.sqrt(n_in))))
        self.vector = SingularVector(jnp.asarray(rng.standard_normal(n_out, dtype=np.float32)))
        self.channels, self.stride, self.pad = n_out, stride, (size - 1) // 2

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h2 w2 o"]:
        kernel = self.weight[...]
        flat = kernel.reshape(-1, kernel.shape[-1])
        left = _unit(flat @ self.vector[...])
        right = _unit(left @ flat)
        left, right = lax.stop_gradient((left, right))
        self.vector[...] = right
        return lax.conv_general_dilated(
            x, kernel / (left @ flat @ right), (self.stride,) * 2, [(self.pad, self.pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip


class BatchMoments(nnx.Module):
    """Batch normalisation by the moments of the batch alone: real and generated images apart."""

    def __init__(self, channels: int):
        self.scale, self.shift = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) * (lax.rsqrt(var + 1e-5) * self.scale[...]) + self.shift[...]


def _random(rng: np.random.Generator, n_in: int, n_out: int) -> Array:
    return jnp.asarray(rng.standard_normal((n_in, n_out), dtype=np.float32) / math.sqrt(n_in))


def _mix(x: Float[Array, "n h w i"], kernel: Any) -> Float[Array, "n h w o"]:
    """A 1 x 1 convolution as one matrix product."""
    return (x.reshape(-1, x.shape[-1]) @ kernel[...]).reshape(*x.shape[:-1], -1)


def _unit(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x / (jnp.linalg.norm(x) + 1e-8)
