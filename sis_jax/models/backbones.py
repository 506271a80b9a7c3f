"""Backbones: networks trained on ImageNet's class labels, used here for their features.

* EfficientNet-Lite 0 to 4 (Google 2020: EfficientNet without squeeze-and-excitation, ReLU6).
* ResNet 18, 34, 50 (He et al. 2016).

Both return features at strides 2, 4, 8, 16, 32, finest first. Input: images in [-1, 1], any size
from 32 pixels on; each network brings them to its own scale. `tape=None` uses the stored batch
statistics (frozen); with a dictionary, batch normalisation uses the batch over all devices and
leaves its statistics there.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sis_jax.models.layers import BatchNorm, Conv, Rng, Tape, relu6
from sis_jax.ops.depthwise import depthwise_conv

Features = tuple[Array, Array, Array, Array, Array]

# EfficientNet-Lite: (width, depth) of each size; (kernel, stride, expansion, channels, repeats) of
# each stage; the last stage of each stride, from 2 to 32.
_SCALES = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_TAPS = (0, 1, 2, 4, 6)
_EPS = 1e-3


class Depthwise(nnx.Module):
    """One k x k filter per channel."""

    def __init__(self, channels: int, rng: Rng, *, size: int, stride: int):
        shape = (size, size, channels)
        std = math.sqrt(2) / size
        weight = (
            np.zeros(shape, np.float32)
            if rng is None
            else rng.standard_normal(shape, dtype=np.float32) * std
        )
        self.weight = nnx.Param(jnp.asarray(weight))
        self.stride = stride

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
        return depthwise_conv(x, self.weight[...].astype(x.dtype), self.stride)


class InvertedResidual(nnx.Module):
    """1 x 1 expansion, k x k depthwise, 1 x 1 linear projection (Sandler et al. 2018)."""

    def __init__(
        self, n_in: int, n_out: int, rng: Rng, name: str, *, size: int, stride: int, expansion: int
    ):
        wide = n_in * expansion
        self.expand = Conv(n_in, wide, rng, size=1) if expansion > 1 else None
        self.expand_norm = BatchNorm(wide, f"{name}.expand_norm", _EPS) if expansion > 1 else None
        self.depthwise = Depthwise(wide, rng, size=size, stride=stride)
        self.depthwise_norm = BatchNorm(wide, f"{name}.depthwise_norm", _EPS)
        self.project = Conv(wide, n_out, rng, size=1)
        self.project_norm = BatchNorm(n_out, f"{name}.project_norm", _EPS)
        self.shortcut = stride == 1 and n_in == n_out

    def __call__(self, x: Float[Array, "n h w i"], tape: Tape | None) -> Float[Array, "n h2 w2 o"]:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = relu6(self.expand_norm(self.expand(y), tape))
        y = relu6(self.depthwise_norm(self.depthwise(y), tape))
        y = self.project_norm(self.project(y), tape)
        return x + y if self.shortcut else y


class EfficientNetLite(nnx.Module):
    """EfficientNet-Lite of size 0 to 4, without the classifier. path: its place in a larger network."""

    def __init__(self, size: int, rng: Rng = None, path: str = ""):
        width, depth = _SCALES[size]
        prefix = f"{path}." if path else ""
        self.stem = Conv(3, 32, rng, stride=2, padding="SAME")
        self.stem_norm = BatchNorm(32, f"{prefix}stem_norm", _EPS)
        blocks, taps, channels, n_in = [], [], [], 32
        for stage, (kernel, stride, expansion, n_out, repeats) in enumerate(_STAGES):
            n_out = _round_channels(n_out * width)
            # The first and the last stage keep their depth.
            repeats = repeats if stage in (0, 6) else math.ceil(repeats * depth)
            for i in range(repeats):
                blocks.append(
                    InvertedResidual(
                        n_in,
                        n_out,
                        rng,
                        f"{prefix}blocks.{len(blocks)}",
                        size=kernel,
                        stride=1 if i else stride,
                        expansion=expansion,
                    )
                )
                n_in = n_out
            if stage in _TAPS:
                taps.append(len(blocks) - 1)
                channels.append(n_out)
        self.blocks = nnx.List(blocks)
        self.taps, self.channels = tuple(taps), tuple(channels)

    def __call__(self, x: Float[Array, "n h w 3"], tape: Tape | None = None) -> Features:
        x = x * (127.5 / 128) + (0.5 / 128)  # (pixel - 127) / 128, as it was trained
        x = relu6(self.stem_norm(self.stem(x), tape))
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x, tape)
            if i in self.taps:
                features.append(x)
        return tuple(features)  # type: ignore[return-value]


def _round_channels(channels: float) -> int:
    """To a multiple of 8, half up, never below 90 % of what was asked."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
