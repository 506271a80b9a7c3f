"""A U-Net on a pretrained backbone: the default student.

The backbone's features at strides 32 to 2 meet in a decoder of 3 x 3 convolutions; at stride 2 it
sees the image itself as blocks of 2 x 2 pixels and predicts the four pixels of each block at once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sis_jax.models.layers import BatchNorm, Conv, Rng, Tape, depth_to_space, padded, space_to_depth

CHANNELS = (96, 64, 40, 24)  # of the decoder at strides 16, 8, 4, 2
STRIDE = 32
AT_ONCE = 4 * 256**2  # pixels of a CPU's share of a batch that go through the backbone together


class Merge(nnx.Module):
    """Twice the resolution, joined with the backbone's features, then one or two convolutions."""

    def __init__(self, n_in: int, n_skip: int, n_out: int, rng: Rng, name: str, *, twice: bool):
        self.conv0 = Conv(n_in + n_skip, n_out, rng)
        self.norm0 = BatchNorm(n_out, f"{name}.norm0")
        self.conv1 = Conv(n_out, n_out, rng) if twice else None
        self.norm1 = BatchNorm(n_out, f"{name}.norm1") if twice else None

    def __call__(
        self, x: Float[Array, "n h w i"], skip: Float[Array, "n 2*h 2*w s"], tape: Tape | None
    ) -> Float[Array, "n 2*h 2*w o"]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = jax.nn.relu(self.norm0(self.conv0(jnp.concatenate([x, skip], -1)), tape))
        if self.conv1 is None or self.norm1 is None:
            return x
        return jax.nn.relu(self.norm1(self.conv1(x), tape))


class BackboneUNet(nnx.Module):
    """See the module. backbone: returns features at strides 2 to 32, of `channels` each.

    frozen: whether the backbone keeps the batch statistics it came with; its weights are trained.
    """

    def __init__(self, backbone: Any, classes: int, rng: Rng = None):
        self.backbone, self.frozen = backbone, True
        *skips, deepest = backbone.channels
        inputs = (deepest, *CHANNELS[:-1])
        self.up = nnx.List(
            Merge(n_in, n_skip, n_out, rng, f"up.{i}", twice=i < len(CHANNELS) - 1)
            for i, (n_in, n_skip, n_out) in enumerate(zip(inputs, reversed(skips), CHANNELS))
        )
        self.last = Conv(CHANNELS[-1] + 12, CHANNELS[-1], rng)
        self.last_norm = BatchNorm(CHANNELS[-1], "last_norm")
        self.head = Conv(CHANNELS[-1], 4 * classes, rng, bias=True, std=0.01)

    def __call__(
        self, x: Float[Array, "n h w 3"], tape: Tape | None = None
    ) -> Float[Array, "n h w k"]:
        h, w = x.shape[1:3]
        x = padded(x, STRIDE)
        *skips, y = self._features(x, tape)
        for merge, skip in zip(self.up, reversed(skips)):
            y = merge(y, skip, tape)
        y = jnp.concatenate([y, space_to_depth(x)], -1)
        y = jax.nn.relu(self.last_norm(self.last(y), tape))
        return depth_to_space(self.head(y))[:, :h, :w]

    def _features(self, x: Float[Array, "n h w 3"], tape: Tape | None) -> tuple[Array, ...]:
        """The backbone's features; where a CPU trains on large images, few at a time and once more
        for the gradient, since the widest layers of a batch would take gigabytes.
        """
        n, fit = len(x), max(AT_ONCE // (x.shape[1] * x.shape[2]), 1)
        if not self.frozen or tape is None or n <= fit or jax.default_backend() != "cpu":
            return self.backbone(x, None if self.frozen else tape)
        rows = max(r for r in range(1, fit + 1) if n % r == 0)
        found = jax.lax.map(jax.checkpoint(self.backbone), x.reshape(-1, rows, *x.shape[1:]))
        return jax.tree.map(lambda f: f.reshape(n, *f.shape[2:]), found)
