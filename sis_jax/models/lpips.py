"""LPIPS on VGG16 (Zhang et al. 2018, arXiv 1801.03924, equation 1): how unlike two images look.

Features after the last ReLU of each of VGG16's five blocks, unit length per pixel, squared
difference weighted per channel by learnt gains, mean over pixels, sum over blocks. The weights are
not part of this library: `checkpoints/lpips.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from sis_jax.models.layers import max_pool

# Channels in, then out of each convolution
BLOCKS = (
    (3, 64, 64),
    (64, 128, 128),
    (128, 256, 256, 256),
    (256, 512, 512, 512),
    (512, 512, 512, 512),
)
LARGEST = 256  # pixels: larger images are averaged down first, as StyleGAN2's projector does
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LPIPS:
    """kernels Float[3 3 i o], biases Float[o]: of the thirteen convolutions. gains Float[o] >= 0:
    per channel of the five blocks. Arrays, or their shapes in a memory plan.
    """

    kernels: tuple[Any, ...]
    biases: tuple[Any, ...]
    gains: tuple[Any, ...]


def lpips_maps(net: LPIPS, images: Float[Array, "n r r 3"]) -> list[Float[Array, "n _ _ _"]]:
    """Features of images in [-1, 1], scaled so that LPIPS is the sum over maps of the mean squared
    difference; r is at least 16.
    """
    factor = max(1, images.shape[1] // LARGEST)
    if factor > 1:
        block = (1, factor, factor, 1)
        images = lax.reduce_window(images, 0.0, lax.add, block, block, "VALID") / factor**2
    x, maps, at = (images - _SHIFT) / _SCALE, [], 0
    for block, gain in zip(BLOCKS, net.gains):
        if at:
            x = max_pool(x)
        for _ in block[1:]:
            x = lax.conv_general_dilated(
                x, net.kernels[at], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x, at = jax.nn.relu(x + net.biases[at]), at + 1
        # The published + 1e-10 beside the root has no gradient at 0
        length = lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-20)
        maps.append(x * length * jnp.sqrt(gain))
    return maps
