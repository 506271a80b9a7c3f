"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193): a vision transformer trained without any labels.

Registers (Darcet et al. 2023, arXiv 2309.16588) are four tokens without a position between the
class token and the patches. Layer scale is part of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sis_jax.models.clip import LayerNorm, Transformer, TransformerConfig, resize_positions
from sis_jax.types import UsageError

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@dataclass(frozen=True)
class DINOv2Config:
    """Shape of the network; patch in pixels; grid: patches along an edge in training."""

    width: int = 384
    layers: int = 12
    hidden: int = 1536
    patch: int = 14
    grid: int = 37
    registers: int = 0

    @property
    def heads(self) -> int:
        """Of each attention layer."""
        return self.width // 64


class DINOv2(nnx.Module):
    """Patch features of the last layer, normed, in a tuple as every backbone's: stride 14.

    Input: images in [-1, 1], from one patch on; pixels at the right and bottom that fill no patch
        are cut off.
    """

    def __init__(self, config: DINOv2Config):
        width, patch = config.width, config.patch
        self.patch = nnx.Param(jnp.zeros((patch, patch, 3, width)))
        self.patch_bias = nnx.Param(jnp.zeros(width))
        self.class_token = nnx.Param(jnp.zeros(width))
        self.positions = nnx.Param(jnp.zeros((1 + config.grid**2, width)))
        self.registers = (
            nnx.Param(jnp.zeros((config.registers, width))) if config.registers else None
        )
        self.transformer = Transformer(
            TransformerConfig(width, config.layers, config.heads, config.hidden, "gelu", 1e-6)
        )
        self.norm = LayerNorm(width, 1e-6)
        self.config = config
        self.strides, self.channels = (patch,), (width,)

    def __call__(self, x: Float[Array, "n h w 3"], tape: None = None) -> tuple[Array]:
        """tape: for the sake of one signature; there are no batch statistics."""
        grid = tuple(s // self.config.patch for s in x.shape[1:3])
        if 0 in grid:
            raise UsageError(
                f"an image of {x.shape[1]}x{x.shape[2]} pixels has no patch of "
                f"{self.config.patch}: give a larger one"
            )
        tokens = self.norm(self.transformer(self._tokens(x, grid)))
        skipped = 1 + self.config.registers
        return (tokens[:, skipped:].reshape(len(x), *grid, -1),)

    def _tokens(self, x: Array, grid: tuple[int, ...]) -> Float[Array, "n t c"]:
        """Class token, registers, then the patches row by row."""
        (rows, columns), p, n = grid, self.config.patch, len(x)
        mean, std = (np.asarray(a, np.float32) for a in (_MEAN, _STD))
        x = x[:, : rows * p, : columns * p]
        x = x * (0.5 / std).astype(x.dtype) + ((0.5 - mean) / std).astype(x.dtype)
        patches = x.reshape(n, rows, p, columns, p, 3).transpose(0, 1, 3, 2, 4, 5)
        y = patches.reshape(n, rows * columns, p * p * 3) @ self._kernel(x)
        y = y + self.patch_bias[...].astype(x.dtype)
        positions = self._positions((rows, columns)).astype(x.dtype)
        first = self.class_token[...].astype(x.dtype) + positions[0]
        parts = [jnp.broadcast_to(first, (n, 1, y.shape[-1])), y + positions[1:]]
        if self.registers is not None:
            registers = self.registers[...].astype(x.dtype)
            parts.insert(1, jnp.broadcast_to(registers, (n, *registers.shape)))
        return jnp.concatenate(parts, axis=1)

    def _kernel(self, x: Array) -> Float[Array, "i c"]:
        return self.patch[...].reshape(-1, self.config.width).astype(x.dtype)

    def _positions(self, grid: tuple[int, int]) -> Float[Array, "t c"]:
        """The table for another grid: plain bicubic without registers, antialiased with."""
        table, size = self.positions[...], self.config.grid
        if self.registers is None or grid == (size, size):
            return resize_positions(table, grid)
        patches = jax.image.resize(
            table[1:].reshape(size, size, -1),
            (*grid, table.shape[1]),
            "cubic",
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.concatenate([table[:1], patches.reshape(grid[0] * grid[1], -1)])
