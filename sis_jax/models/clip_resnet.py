"""CLIP's ResNet tower (Radford et al. 2021, arXiv 2103.00020, section 2.4): RN50 to RN50x64.

Against a plain ResNet-50: a stem of three convolutions, average pooling before every step down
    (Zhang 2019), and attention in place of mean pooling. Batch norm is folded into the
    convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from sis_jax.types import UsageError

_NHWC = ("NHWC", "HWIO", "NHWC")


@dataclass(frozen=True)
class ResNetConfig:
    """Shape. width: after the stem; layers: blocks at strides 4 to 32; heads: of pooling."""

    image_size: int
    width: int
    layers: tuple[int, int, int, int]
    heads: int

    @property
    def trunk(self) -> int:
        """Channels at stride 32."""
        return 32 * self.width


def check_floating(pixels: Shaped[Array | np.ndarray, "b h w 3"]) -> None:
    """UsageError for integers: weights would be cut to 0 and 1."""
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise UsageError(
            f"pixels must be floating point, got {pixels.dtype}: use clip.preprocess(photos)"
        )


class Dense(nnx.Module):
    """x W + b."""

    def __init__(self, n_in: int, n_out: int):
        self.weight = nnx.Param(jnp.zeros((n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros((n_out,)))

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        return x @ self.weight[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


def attend(
    q: Float[Array, "b n c"],
    k: Float[Array, "b m c"],
    v: Float[Array, "b m c"],
    heads: int,
    mask: Bool[Array, "n m"] | None = None,
) -> Float[Array, "b n c"]:
    """softmax(q k^T / sqrt(c / heads)) v per head (Vaswani et al. 2017), heads side by side."""
    c = q.shape[-1]
    q, k, v = (x.reshape(*x.shape[:2], heads, c // heads) for x in (q, k, v))
    logits = jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    y = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)
    return y.reshape(*y.shape[:2], c)


def pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
    """Mean over size x size pixels; height and width must be multiples of it."""
    b, h, w, c = x.shape
    return x.reshape(b, h // size, size, w // size, size, c).mean(axis=(2, 4)) if size > 1 else x


class Conv(nnx.Module):
    """A convolution (odd kernel, zero padding) with the batch norm after it folded in."""

    def __init__(self, kernel: int, n_in: int, n_out: int, stride: int = 1):
        self.weight = nnx.Param(jnp.zeros((kernel, kernel, n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros((n_out,)))
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        weight = self.weight[...].astype(x.dtype)
        half = weight.shape[0] // 2
        pad = [(half, half), (half, half)]
        return lax.conv_general_dilated(
            x, weight, (self.stride,) * 2, pad, dimension_numbers=_NHWC
        ) + self.bias[...].astype(x.dtype)


class Bottleneck(nnx.Module):
    """1x1, 3x3, (pooling,) 1x1 convolutions, added to the input, pooled and widened as needed."""

    def __init__(self, n_in: int, width: int, stride: int):
        self.conv1 = Conv(1, n_in, width)
        self.conv2 = Conv(3, width, width)
        self.conv3 = Conv(1, width, 4 * width)
        self.downsample = Conv(1, n_in, 4 * width) if stride > 1 or n_in != 4 * width else None
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        y = self.conv3(pool(y, self.stride))
        return jax.nn.relu(
            y + (x if self.downsample is None else self.downsample(pool(x, self.stride)))
        )


class AttentionPool(nnx.Module):
    """One attention layer whose only query is the mean of the map, at the native size."""

    def __init__(self, config: ResNetConfig, embed_dim: int):
        c = config.trunk
        self.positions = nnx.Param(jnp.zeros((1 + (config.image_size // 32) ** 2, c)))
        self.q = Dense(c, c)
        self.k = Dense(c, c)
        self.v = Dense(c, c)
        self.out = Dense(c, embed_dim)
        self.heads = config.heads

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        b, h, w, c = x.shape
        flat = x.reshape(b, h * w, c)
        flat = (
            jnp.concatenate([flat.mean(axis=1, keepdims=True), flat], axis=1) + self.positions[...]
        )
        return self.out(attend(self.q(flat[:, :1]), self.k(flat), self.v(flat), self.heads))[:, 0]

    def value_path(self, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        """C(V(x)) per position; affine, so a mean of positions may be projected instead."""
        return self.out(self.v(x))


class ResNet(nnx.Module):
    """Stem, four layers of bottlenecks (layer1_0, layer1_1, ...), attention pooling."""

    def __init__(self, config: ResNetConfig, embed_dim: int):
        width = config.width
        self.conv1 = Conv(3, 3, width // 2, stride=2)
        self.conv2 = Conv(3, width // 2, width // 2)
        self.conv3 = Conv(3, width // 2, width)
        n_in = width
        for layer, blocks in enumerate(config.layers, start=1):
            for i in range(blocks):
                planes = width * 2 ** (layer - 1)
                setattr(
                    self,
                    f"layer{layer}_{i}",
                    Bottleneck(n_in, planes, 2 if layer > 1 and i == 0 else 1),
                )
                n_in = 4 * planes
        self.attnpool = AttentionPool(config, embed_dim)
        self.config = config

    @property
    def stride(self) -> int:
        """Pixels from one position of `dense` to the next."""
        return 32

    def stages(self, pixels: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b h2 w2 c"]]:
        """The maps after "stem" and "layer1" (stride 4), "layer2" (8), "layer3" (16), "layer4"."""
        check_floating(pixels)
        x = pixels
        for conv in (self.conv1, self.conv2, self.conv3):
            x = jax.nn.relu(conv(x))
        maps = {"stem": pool(x, 2)}
        x = maps["stem"]
        for layer, blocks in enumerate(self.config.layers, start=1):
            for i in range(blocks):
                x = getattr(self, f"layer{layer}_{i}")(x)
            maps[f"layer{layer}"] = x
        return maps

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        return self.attnpool(self.stages(pixels)["layer4"])

    def dense(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 d"]:
        """The attention pool's value path at every position of the last map."""
        return self.attnpool.value_path(self.stages(pixels)["layer4"])
