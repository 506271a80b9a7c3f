"""Students: the segmenters that a generator's parts are distilled into.


* "unet-efficientnet-lite0", the default, "unet-resnet18": a U-Net on an ImageNet backbone
  (`models/backbone_unet.py`).
* "unet-small": a U-Net of dense 3 x 3 convolutions with group normalisation, fast on CPUs. It sees
  the image in blocks of 2 x 2 or 4 x 4, and predicts the pixels of a block at once.
* "unet": double convolutions 64-128-256-512-512 with batch normalisation, as Labels4Free and
  Melas-Kyriazi et al. (2022, section 4) use it.
* "resnet18": ResNet-18 dilated to output stride 8 with a 1 x 1 scoring layer, the student of
  Segmentation in Style (section 3.3).
* "deeplabv3-resnet18", "deeplabv3-resnet50": DeepLabV3 (Chen et al. 2017) on such a trunk.

Input: float images in [-1, 1], any size; output: logits per class and pixel. `network(x)` uses the
stored statistics; `network(x, tape)` those of the batch over all devices, left in `tape`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sis_jax.models import backbones
from sis_jax.models.backbone_unet import BackboneUNet
from sis_jax.models.backbones import ResNet
from sis_jax.models.layers import (
    BatchNorm,
    Conv,
    GroupNorm,
    Rng,
    Tape,
    depth_to_space,
    max_pool,
    padded,
    space_to_depth,
)
from sis_jax.ops.resize import resize_bilinear
from sis_jax.types import UsageError, unknown_name


@dataclass(frozen=True)
class StudentConfig:
    """arch: see the module. classes: output channels. width: channels of the first level of
    "unet-small"; block: edge of its blocks of pixels, 2 or 4. imagenet: whether a ResNet trunk
    normalises its images.
    """

    arch: str = "unet-small"
    classes: int = 2
    width: int = 32
    block: int = 2
    imagenet: bool = False

    def __post_init__(self) -> None:
        if self.arch not in NETWORKS:
            raise unknown_name("student", self.arch, NETWORKS)
        if not 2 <= self.classes <= 255:
            raise UsageError(f"a student needs 2 to 255 classes, got {self.classes}")
        if not 8 <= self.width <= 4096 or self.width % 8:
            raise UsageError(f"width is {self.width}, expected a multiple of 8 up to 4096")
        if self.block not in (2, 4):
            raise UsageError(f"block is {self.block}, expected 2 or 4 pixels")

    def __str__(self) -> str:
        return f"{self.arch} of width {self.width} and block {self.block}"


LEAST_SHARE = 1e-3  # of the pixels, of a class that `begin_with` expects
LEAST_SIDE = 128  # pixels, on a backbone whose coarsest features have a stride of 32


def usual_block(size: int) -> int:
    """The `block` for images of `size` pixels: 128 costs as much as 64, and sees as far."""
    return 4 if size >= 128 else 2


def begin_with(network: Any, shares: Float[np.ndarray, "k"]) -> None:
    """Let a new student predict the classes by their shares of the pixels. From equal ones the last
    features learn to be zero on a small class, which then stays at 0.5 for a hundred steps.
    """
    bias = network.head.bias
    log = np.log(np.maximum(shares, LEAST_SHARE)).astype(np.float32)
    bias[...] = jnp.tile(log - log.mean(), bias[...].size // len(shares))


def build(config: StudentConfig, rng: Rng = None) -> nnx.Module:
    """The network of a configuration, with random weights from `rng`, or zeros (shapes only)."""
    return NETWORKS[config.arch](config, rng)


# resampling


def upsample(x: Float[Array, "n h w c"], size: tuple[int, int]) -> Float[Array, "n h2 w2 c"]:
    """Bilinear with aligned corners, the rule of both papers' students."""
    return resize_bilinear(x, size, align_corners=True)


# U-Nets


class Residual(nnx.Module):
    """Two 3 x 3 convolutions beside a shortcut, normalised before each activation."""

    def __init__(self, n_in: int, n_out: int, rng: Rng):
        self.conv0, self.conv1 = Conv(n_in, n_out, rng), Conv(n_out, n_out, rng)
        self.norm0, self.norm1 = GroupNorm(n_out), GroupNorm(n_out)
        self.skip = Conv(n_in, n_out, rng, size=1) if n_in != n_out else None

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h w o"]:
        y = jax.nn.relu(self.norm0(self.conv0(x)))
        y = self.norm1(self.conv1(y))
        return jax.nn.relu(y + (x if self.skip is None else self.skip(x)))


class SmallUNet(nnx.Module):
    """Four levels from 1/block of the image on; the last one's mean is added everywhere."""

    levels = (1, 2, 4, 6)

    def __init__(self, config: StudentConfig, rng: Rng = None):
        widths = [config.width * m for m in self.levels]
        self.block = config.block
        self.stem = Conv(3 * self.block**2, widths[0], rng, bias=True)
        self.down = nnx.List(
            [
                Residual(widths[0] if i == 0 else 4 * widths[i - 1], w, rng)
                for i, w in enumerate(widths)
            ]
        )
        self.context = Conv(widths[-1], widths[-1], rng, size=1, bias=True)
        self.up = nnx.List([Residual(widths[i + 1] + widths[i], widths[i], rng) for i in (2, 1, 0)])
        self.head = Conv(
            widths[0], self.block**2 * config.classes, rng, size=3, bias=True, std=0.01
        )

    def __call__(
        self, x: Float[Array, "n h w 3"], tape: Tape | None = None
    ) -> Float[Array, "n h w k"]:
        h, w = x.shape[1:3]
        x = jax.nn.relu(self.stem(space_to_depth(padded(x, 8 * self.block), self.block)))
        kept = []
        for level, block in enumerate(self.down):
            x = block(space_to_depth(x) if level else x)
            kept.append(x)
        x = kept.pop()
        x = x + jax.nn.relu(self.context(x.mean((1, 2), keepdims=True)))
        for block, skip in zip(self.up, reversed(kept)):
            x = block(jnp.concatenate([jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), skip], axis=-1))
        return depth_to_space(self.head(x), self.block)[:, :h, :w]


class DoubleConv(nnx.Module):
    """Convolution, batch normalisation, ReLU, twice."""

    def __init__(self, n_in: int, n_mid: int, n_out: int, rng: Rng, name: str):
        self.conv0, self.conv1 = Conv(n_in, n_mid, rng), Conv(n_mid, n_out, rng)
        self.norm0 = BatchNorm(n_mid, f"{name}.norm0")
        self.norm1 = BatchNorm(n_out, f"{name}.norm1")

    def __call__(self, x: Float[Array, "n h w i"], tape: Tape | None) -> Float[Array, "n h w o"]:
        x = jax.nn.relu(self.norm0(self.conv0(x), tape))
        return jax.nn.relu(self.norm1(self.conv1(x), tape))


class UNet(nnx.Module):
    """Encoder 64-128-256-512-512 with max pooling, decoder with aligned bilinear upsampling."""

    def __init__(self, config: StudentConfig, rng: Rng = None):
        down = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 512)]
        up = [(1024, 512, 256), (512, 256, 128), (256, 128, 64), (128, 64, 64)]
        self.down = nnx.List(
            [DoubleConv(i, o, o, rng, f"down.{n}") for n, (i, o) in enumerate(down)]
        )
        self.up = nnx.List([DoubleConv(i, m, o, rng, f"up.{n}") for n, (i, m, o) in enumerate(up)])
        self.head = Conv(64, config.classes, rng, size=1, bias=True, std=0.01)

    def __call__(
        self, x: Float[Array, "n h w 3"], tape: Tape | None = None
    ) -> Float[Array, "n h w k"]:
        h, w = x.shape[1:3]
        x, kept = padded(x, 16), []
        for level, block in enumerate(self.down):
            x = block(max_pool(x) if level else x, tape)
            kept.append(x)
        x = kept.pop()
        for block, skip in zip(self.up, reversed(kept)):
            x = block(
                jnp.concatenate([skip, upsample(x, (skip.shape[1], skip.shape[2]))], axis=-1), tape
            )
        return self.head(x)[:, :h, :w]


# dilated residual networks


class ResNet18(nnx.Module):
    """The student of Segmentation in Style: trunk, 1 x 1 scoring layer, aligned upsampling."""

    def __init__(self, config: StudentConfig, rng: Rng = None):
        self.trunk = ResNet(18, rng, "trunk", dilated=True, imagenet=config.imagenet)
        self.head = Conv(self.trunk.channels[-1], config.classes, rng, size=1, bias=True, std=0.01)

    def __call__(
        self, x: Float[Array, "n h w 3"], tape: Tape | None = None
    ) -> Float[Array, "n h w k"]:
        return upsample(self.head(self.trunk(x, tape)[-1]), (x.shape[1], x.shape[2]))


class DeepLabV3(nnx.Module):
    """Atrous spatial pyramid pooling (12, 24, 36, and the mean), half-pixel upsampling."""

    rates = (1, 12, 24, 36)

    def __init__(self, config: StudentConfig, rng: Rng = None):
        self.trunk = ResNet(
            int(config.arch.removeprefix("deeplabv3-resnet")),
            rng,
            "trunk",
            dilated=True,
            whole=False,
            imagenet=config.imagenet,
        )
        n = self.trunk.channels[-1]
        self.branches = nnx.List(
            [Conv(n, 256, rng, size=1 if r == 1 else 3, dilation=r) for r in (*self.rates, 1)]
        )
        self.norms = nnx.List([BatchNorm(256, f"norms.{i}") for i in range(7)])
        self.project, self.conv = Conv(5 * 256, 256, rng, size=1), Conv(256, 256, rng)
        self.head = Conv(256, config.classes, rng, size=1, bias=True, std=0.01)

    def __call__(
        self, x: Float[Array, "n h w 3"], tape: Tape | None = None
    ) -> Float[Array, "n h w k"]:
        size = (x.shape[1], x.shape[2])
        x = self.trunk(x, tape)[-1]
        inputs = [x] * 4 + [x.mean((1, 2), keepdims=True)]
        seen = [
            jax.nn.relu(norm(conv(part), tape))
            for conv, norm, part in zip(self.branches, self.norms, inputs)
        ]
        seen[-1] = jnp.broadcast_to(seen[-1], seen[0].shape)
        x = jax.nn.relu(self.norms[5](self.project(jnp.concatenate(seen, -1)), tape))
        x = jax.nn.relu(self.norms[6](self.conv(x), tape))
        return resize_bilinear(self.head(x), size, antialias=False)


def _on_backbone(config: StudentConfig, rng: Rng = None) -> BackboneUNet:
    name = config.arch.removeprefix("unet-")
    return BackboneUNet(backbones.build(name, rng, "backbone"), config.classes, rng)


NETWORKS: dict[str, Any] = {
    "unet-efficientnet-lite0": _on_backbone,
    "unet-resnet18": _on_backbone,
    "unet-small": SmallUNet,
    "unet": UNet,
    "resnet18": ResNet18,
    "deeplabv3-resnet18": DeepLabV3,
    "deeplabv3-resnet50": DeepLabV3,
}


def to_float(images: UInt8[Array, "*n h w 3"]) -> Float[Array, "*n h w 3"]:
    """uint8 images as floats in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1
