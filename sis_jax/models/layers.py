"""Layers that backbones and students share: convolution and the two normalisations. NHWC."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from sis_jax.ops.convolution import conv_same
from sis_jax.parallel import pmean

Tape = dict[str, tuple[Array, Array]]
Rng = np.random.Generator | None
_NHWC = ("NHWC", "HWIO", "NHWC")


class Statistic(nnx.Variable):
    """A running mean or variance: stored with the weights, not trained by gradients."""


class Conv(nnx.Module):
    """Convolution with He initialisation; `bias` where no normalisation follows.

    padding: zeros on every side (default: keeps the size at stride 1), or TensorFlow's "SAME".
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        rng: Rng,
        *,
        size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
        std: float = 0.0,
        padding: int | str | None = None,
    ):
        shape = (size, size, n_in, n_out)
        std = std or float(np.sqrt(2 / (size * size * n_out)))  # fan-out, as residual networks
        weight = (
            np.zeros(shape, np.float32)
            if rng is None
            else rng.standard_normal(shape, dtype=np.float32) * std
        )
        self.weight = nnx.Param(jnp.asarray(weight))
        self.bias = nnx.Param(jnp.zeros(n_out)) if bias else None
        self.stride, self.dilation, self.padding = stride, dilation, padding

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h2 w2 o"]:
        kernel = self.weight[...].astype(x.dtype)
        if kernel.shape[0] == self.stride == 1:
            # One matrix product: XLA's CPU backend is slow at derivatives with several batch axes.
            y = (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)
        elif self.stride == self.dilation == 1 and self.padding is None:
            y = conv_same(x, kernel)
        else:
            pad = (kernel.shape[0] // 2) * self.dilation if self.padding is None else self.padding
            y = lax.conv_general_dilated(
                x,
                kernel,
                (self.stride,) * 2,
                pad if isinstance(pad, str) else [(pad, pad)] * 2,
                rhs_dilation=(self.dilation,) * 2,
                dimension_numbers=_NHWC,
            )
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation, 8 channels a group: the same in training and use, and for any batch."""

    def __init__(self, channels: int):
        self.scale, self.shift = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        n, _, _, c = x.shape
        # Moments per channel first, then per group: the sums over the two large axes dominate the
        # cost.
        y = x.astype(jnp.float32)
        mean, square = (
            m.reshape(n, c // 8, 8).mean(-1) for m in (y.mean((1, 2)), jnp.square(y).mean((1, 2)))
        )
        spread = lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + 1e-5)
        scale = jnp.repeat(spread, 8, axis=1) * self.scale[...]
        shift = self.shift[...] - jnp.repeat(mean, 8, axis=1) * scale
        return (y * scale[:, None, None] + shift[:, None, None]).astype(x.dtype)


@jax.custom_vjp
def affine(
    x: Float[Array, "n h w c"], scale: Float[Array, "c"], shift: Float[Array, "c"]
) -> Float[Array, "n h w c"]:
    """x * scale + shift per channel."""
    return x * scale + shift


def _affine_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, scale = kept
    # Sums over the leading axes are only vectorised on CPUs where their argument is an array.
    product = lax.optimization_barrier(x * g)
    return g * scale, product.sum((0, 1, 2)), lax.optimization_barrier(g).sum((0, 1, 2))


affine.defvjp(lambda x, scale, shift: (x * scale + shift, (x, scale)), _affine_backward)


class BatchNorm(nnx.Module):
    """Batch normalisation; without a tape by the stored statistics. name: its key on the tape."""

    def __init__(self, channels: int, name: str, eps: float = 1e-5):
        self.scale, self.shift = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean, self.var = Statistic(jnp.zeros(channels)), Statistic(jnp.ones(channels))
        self.name, self.eps = name, eps

    def __call__(self, x: Float[Array, "n h w c"], tape: Tape | None) -> Float[Array, "n h w c"]:
        mean, var = self.mean[...], self.var[...]
        if tape is not None:
            y = x.astype(jnp.float32)
            mean, square = pmean((y.mean((0, 1, 2)), jnp.square(y).mean((0, 1, 2))))
            var = jnp.maximum(square - jnp.square(mean), 0)
            tape[self.name] = (mean, var)
        scale = lax.rsqrt(var + self.eps) * self.scale[...]
        return affine(x, scale.astype(x.dtype), (self.shift[...] - mean * scale).astype(x.dtype))


def relu6(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """min(max(x, 0), 6)."""
    return jnp.clip(x, 0, 6)


def max_pool(x: Float[Array, "n h w c"], size: int = 2, pad: int = 0) -> Float[Array, "n h2 w2 c"]:
    """The largest of every size x size pixels, two pixels on, with `pad` rows on every side that
    never win.

    By slices: the gradient of XLA's own reduction of windows is a loop over pixels on CPUs, and
    adds in no fixed order on GPUs.
    """
    for axis in (1, 2):
        around = [(pad, pad) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x, around, constant_values=-jnp.inf)
        last = padded.shape[axis] - size + 1
        shifted = (lax.slice_in_dim(padded, i, last + i, stride=2, axis=axis) for i in range(size))
        x = functools.reduce(jnp.maximum, shifted)
    return x


def space_to_depth(
    x: Float[Array, "n h w c"], block: int = 2
) -> Float[Array, "n h//{block} w//{block} c*{block}*{block}"]:
    """Every block x block pixels as channels."""
    n, h, w, c = x.shape
    h, w = h // block, w // block
    return (
        x.reshape(n, h, block, w, block, c)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(n, h, w, block * block * c)
    )


def depth_to_space(
    x: Float[Array, "n h w c"], block: int = 2
) -> Float[Array, "n h*{block} w*{block} c//({block}*{block})"]:
    """The inverse of `space_to_depth`."""
    n, h, w, c = x.shape
    c //= block * block
    return (
        x.reshape(n, h, w, block, block, c)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(n, block * h, block * w, c)
    )


def padded(x: Array, multiple: int) -> Array:
    """Edges repeated at the bottom and right up to a multiple, so that any size halves evenly."""
    h, w = (-s % multiple for s in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, h), (0, w), (0, 0)), mode="edge") if h or w else x
