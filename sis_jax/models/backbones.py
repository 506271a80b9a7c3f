"""Backbones: networks trained on ImageNet's class labels, used here for their features.

* EfficientNet-Lite 0 to 4 (Google 2020: EfficientNet without squeeze-and-excitation, with ReLU6).
* ResNet 18, 34, 50 (He et al. 2016), in torchvision's layout; dilated, the trunk of students.

Input: images [n h w 3] in [-1, 1], from 32 pixels on. Output: features at strides 2 to 32, finest
first (`strides`, `channels`). `tape=None` uses the stored batch statistics ("frozen"); with a
dictionary, batch normalisation uses the batch over all devices and leaves its statistics there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sis_jax.models.layers import BatchNorm, Conv, Rng, Tape, max_pool, relu6
from sis_jax.ops.depthwise import depthwise_conv
from sis_jax.types import unknown_name

Features = tuple[Array, ...]

# EfficientNet-Lite: (width, depth) of each size; (kernel, stride, expansion, channels, repeats) of
# each stage; the last stage of each stride, from 2 to 32.
SCALES = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
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

# ResNet: blocks of each stage, and whether they are bottlenecks. ImageNet's mean and deviation.
RESNETS = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True)}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    """EfficientNet-Lite 0 to 4 without head and classifier; path: before its names on the tape."""

    strides = (2, 4, 8, 16, 32)

    def __init__(self, size: int, rng: Rng = None, path: str = ""):
        prefix = f"{path}." if path else ""
        self.stem = Conv(3, 32, rng, stride=2, padding="SAME")
        self.stem_norm = BatchNorm(32, f"{prefix}stem_norm", _EPS)
        blocks, taps, channels, n_in = [], [], [], 32
        stages = zip(_STAGES, lite_repeats(size), lite_channels(size))
        for stage, ((kernel, stride, expansion, _, _), repeats, n_out) in enumerate(stages):
            for i in range(repeats):
                name = f"{prefix}blocks.{len(blocks)}"
                step = 1 if i else stride
                blocks.append(
                    InvertedResidual(
                        n_in, n_out, rng, name, size=kernel, stride=step, expansion=expansion
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
        return tuple(features)


def lite_repeats(size: int) -> list[int]:
    """Blocks of each stage of EfficientNet-Lite `size`; the first and the last keep their depth."""
    depth, last = SCALES[size][1], len(_STAGES) - 1
    return [n if i in (0, last) else math.ceil(n * depth) for i, (*_, n) in enumerate(_STAGES)]


def lite_channels(size: int) -> list[int]:
    """Channels of each stage of EfficientNet-Lite `size`."""
    return [_round_channels(channels * SCALES[size][0]) for *_, channels, _ in _STAGES]


def _round_channels(channels: float) -> int:
    """To a multiple of 8, half up, never below 90 % of the requested number."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class ResidualBlock(nnx.Module):
    """Basic (3 x 3, 3 x 3) or bottleneck (1 x 1, 3 x 3, 1 x 1) block; a bottleneck's 3 x 3 strides
    and has the second of the dilations.
    """

    def __init__(
        self,
        n_in: int,
        width: int,
        rng: Rng,
        name: str,
        *,
        bottleneck: bool,
        stride: int,
        dilations: tuple[int, int],
    ):
        n_out = 4 * width if bottleneck else width
        sizes = (
            [(n_in, width, 1), (width, width, 3), (width, n_out, 1)]
            if bottleneck
            else [(n_in, width, 3), (width, width, 3)]
        )
        strided = 1 if bottleneck else 0
        self.convs = nnx.List(
            [
                Conv(
                    i,
                    o,
                    rng,
                    size=s,
                    stride=stride if n == strided else 1,
                    dilation=dilations[min(n, 1)] if s == 3 else 1,
                )
                for n, (i, o, s) in enumerate(sizes)
            ]
        )
        self.norms = nnx.List(
            [BatchNorm(o, f"{name}.norms.{n}") for n, (_, o, _) in enumerate(sizes)]
        )
        changed = stride != 1 or n_in != n_out
        self.skip = Conv(n_in, n_out, rng, size=1, stride=stride) if changed else None
        self.skip_norm = BatchNorm(n_out, f"{name}.skip_norm") if changed else None

    def __call__(self, x: Float[Array, "n h w i"], tape: Tape | None) -> Float[Array, "n h2 w2 o"]:
        y = x
        for n, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = norm(conv(jax.nn.relu(y) if n else y), tape)
        if self.skip is not None and self.skip_norm is not None:
            x = self.skip_norm(self.skip(x), tape)
        return jax.nn.relu(y + x)


class ResNet(nnx.Module):
    """ResNet 18, 34 or 50 without the classifier. path: as in `EfficientNetLite`.

    dilated: the last two stages are dilated by 2 and 4 instead of strided (stride 8). whole: also
        their first 3 x 3 convolutions, other than by torchvision's rule. imagenet: normalise images
        by ImageNet's mean and deviation.
    """

    def __init__(
        self,
        depth: int,
        rng: Rng = None,
        path: str = "",
        *,
        dilated: bool = False,
        whole: bool = True,
        imagenet: bool = True,
    ):
        blocks, bottleneck = RESNETS[depth]
        prefix = f"{path}." if path else ""
        self.stem, self.norm = Conv(3, 64, rng, size=7, stride=2), BatchNorm(64, f"{prefix}norm")
        made, taps, channels, n_in = [], [], [64], 64
        strides, dilations = ((1, 2, 1, 1), (1, 1, 2, 4)) if dilated else ((1, 2, 2, 2), (1,) * 4)
        for stage, (count, stride, dilation) in enumerate(zip(blocks, strides, dilations)):
            width = 64 * 2**stage
            for i in range(count):
                before = dilation if whole or i else max(dilation // 2, 1)
                # With torchvision's rule a basic block's first convolution, or a bottleneck's only
                # wide one, keeps the earlier dilation.
                both = (before, before) if bottleneck else (before, dilation)
                name, step = f"{prefix}blocks.{len(made)}", 1 if i else stride
                made.append(
                    ResidualBlock(
                        n_in, width, rng, name, bottleneck=bottleneck, stride=step, dilations=both
                    )
                )
                n_in = 4 * width if bottleneck else width
            taps.append(len(made) - 1)
            channels.append(n_in)
        self.blocks, self.taps = nnx.List(made), tuple(taps)
        self.channels, self.imagenet = tuple(channels), imagenet
        self.strides = (2, 4, 8, 8, 8) if dilated else (2, 4, 8, 16, 32)

    def __call__(self, x: Float[Array, "n h w 3"], tape: Tape | None = None) -> Features:
        if self.imagenet:
            mean, std = (np.asarray(a, np.float32) for a in (_MEAN, _STD))
            x = x * (0.5 / std).astype(x.dtype) + ((0.5 - mean) / std).astype(x.dtype)
        x = jax.nn.relu(self.norm(self.stem(x), tape))
        features = [x]
        x = max_pool(x, 3, pad=1)
        for i, block in enumerate(self.blocks):
            x = block(x, tape)
            if i in self.taps:
                features.append(x)
        return tuple(features)


NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    **{f"efficientnet-lite{size}": partial(EfficientNetLite, size) for size in SCALES},
    **{f"resnet{depth}": partial(ResNet, depth) for depth in RESNETS},
}


def build(arch: str, rng: Rng = None, path: str = "") -> nnx.Module:
    """A network of `NETWORKS` with random weights from `rng`, or zeros (shapes only) without."""
    if arch not in NETWORKS:
        raise unknown_name("backbone", arch, NETWORKS)
    return NETWORKS[arch](rng, path)
