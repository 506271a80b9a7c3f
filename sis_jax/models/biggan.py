"""BigGAN-deep's generator (Brock, Donahue, Simonyan 2019, arXiv 1809.11096, appendix B), inference
only.

Residual bottleneck blocks, batch norms conditioned on [z, class embedding], nearest-neighbour
upsampling, one self-attention layer. Parameters are NHWC/HWIO and [in, out], divided by their
spectral norms. The batch norms hold statistics for truncations in equal steps from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from scipy.special import ndtr, ndtri

from sis_jax.models.conditional import check_classes, check_labels, one_hot
from sis_jax.models.stylegan2 import AnyArray, Buffer
from sis_jax.ops.convolution import conv2d
from sis_jax.types import (
    Info,
    Noise,
    Sampling,
    UsageError,
    check_noise,
    check_taps,
    check_w,
    latents_from_seeds,
)

# [z, class embedding] and the place in the table of statistics, one row per image
Condition = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class BigGANConfig:
    """Shape of a generator. channels: at 4 pixels and after every block; bottlenecks: inside every
    block; ups: does the block double the size.

    attention: the block before which self-attention stands, or None. n_stats: truncations that the
        batch norms know. classes: those that `sample` draws from, empty for all.
    """

    z_dim: int
    embed_dim: int
    num_classes: int
    channels: tuple[int, ...]
    bottlenecks: tuple[int, ...]
    ups: tuple[bool, ...]
    attention: int | None
    n_stats: int = 51
    eps: float = 1e-4
    classes: tuple[int, ...] = ()

    @property
    def resolution(self) -> int:
        """Edge length of an image in pixels."""
        return 4 * 2 ** sum(self.ups)


class Conv(nnx.Module):
    """Convolution with stride 1, same size."""

    def __init__(self, n_in: int, n_out: int, size: int, bias: bool = True):
        self.weight = nnx.Param(jnp.zeros((size, size, n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros((n_out,))) if bias else None

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h w o"]:
        y = conv2d(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Norm(nnx.Module):
    """Batch norm (inference), then ReLU; gain and offset are linear in the condition, if any."""

    def __init__(self, channels: int, config: BigGANConfig, condition: int = 0):
        self.means = Buffer(jnp.zeros((config.n_stats, channels)))
        self.variances = Buffer(jnp.ones((config.n_stats, channels)))
        shape = (condition, channels) if condition else (channels,)
        self.scale = nnx.Param(jnp.zeros(shape))
        self.offset = nnx.Param(jnp.zeros(shape))
        self.eps = config.eps

    def __call__(self, x: Float[Array, "n h w c"], condition: Condition) -> Float[Array, "n h w c"]:
        vector, position = condition
        mean, variance = (
            interpolate(table[...], position) for table in (self.means, self.variances)
        )
        scale, offset = self.scale[...], self.offset[...]
        gain, offset = (1 + vector @ scale, vector @ offset) if scale.ndim == 2 else (scale, offset)
        gain = gain / jnp.sqrt(variance + self.eps)
        offset = offset - mean * gain
        return jax.nn.relu(
            x * gain[:, None, None].astype(x.dtype) + offset[:, None, None].astype(x.dtype)
        )


def interpolate(table: Float[Array, "s c"], position: Float[Array, "n"]) -> Float[Array, "n c"]:
    """Rows of the table at places between 0 and s - 1, linearly."""
    position = jnp.clip(position, 0, len(table) - 1)
    low = (
        jnp.minimum(position.astype(jnp.int32), len(table) - 2)
        if len(table) > 1
        else jnp.zeros(position.shape, jnp.int32)
    )
    high, share = jnp.minimum(low + 1, len(table) - 1), (position - low)[:, None]
    return table[low] * (1 - share) + table[high] * share


def stats_position(truncation: float | Float[Array, ""], n_stats: int) -> Float[Array, ""]:
    """Position of a truncation in [0, 1] in the table of statistics.

    Between two rows the published code gives each row the share of the other (at row 3.2, row 4
    counts 0.8); followed here, so that images are those of the published network.
    """
    exact = jnp.clip(jnp.asarray(truncation, jnp.float32), 0, 1) * (n_stats - 1)
    nearest = jnp.round(exact)
    low = jnp.floor(exact)
    return jnp.where(jnp.abs(exact - nearest) < 1e-3, nearest, low + 1 - (exact - low))


def double(x: Float[Array, "n h w c"]) -> Float[Array, "n 2*h 2*w c"]:
    """Twice the size, nearest neighbour."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Block(nnx.Module):
    """Residual block (figure 16a); the shortcut drops the channels it has too many."""

    def __init__(self, n_in: int, middle: int, n_out: int, up: bool, config: BigGANConfig):
        condition = config.z_dim + config.embed_dim
        widths, sizes = (n_in, middle, middle, middle, n_out), (1, 3, 3, 1)
        for i, (a, b) in enumerate(pairwise(widths)):
            setattr(self, f"bn{i}", Norm(a, config, condition))
            setattr(self, f"conv{i}", Conv(a, b, sizes[i]))
        self.up, self.n_out = up, n_out

    def __call__(
        self, x: Float[Array, "n h w i"], condition: Condition
    ) -> Float[Array, "n h2 w2 o"]:
        y = x
        for i in range(4):
            y = getattr(self, f"bn{i}")(y, condition)
            y = getattr(self, f"conv{i}")(double(y) if self.up and i == 1 else y)
        kept = x[..., : self.n_out]
        return y + (double(kept) if self.up else kept)


class Attention(nnx.Module):
    """Self-attention over the image; keys and values are pooled to half the size."""

    def __init__(self, channels: int):
        self.theta = Conv(channels, channels // 8, 1, False)
        self.phi = Conv(channels, channels // 8, 1, False)
        self.g = Conv(channels, channels // 2, 1, False)
        self.out = Conv(channels // 2, channels, 1, False)
        self.gamma = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        n, h, w, _ = x.shape
        query, key, value = self.theta(x), _pool(self.phi(x)), _pool(self.g(x))
        query, key, value = (a.reshape(n, -1, a.shape[-1]) for a in (query, key, value))
        weights = jax.nn.softmax(
            jnp.einsum("nqc,nkc->nqk", query, key).astype(jnp.float32), axis=-1
        ).astype(x.dtype)
        found = jnp.einsum("nqk,nkc->nqc", weights, value).reshape(n, h, w, -1)
        return x + self.gamma[...].astype(x.dtype) * self.out(found)


def _pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h/2 w/2 c"]:
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class BigGAN(Sampling, nnx.Module):
    """A BigGAN-deep generator behind the protocol of `types.Generator`; a pytree.

    z is [n, z_dim]: a latent, truncated normal in [-2, 2], then the number that picks the class
    (`models/conditional.py`). w is [n, 1, w_dim]: truncated latent, class embedding, and place in
    the batch norms' table. Taps: "4x4", "8x8", ..., the residual stream after the last block at
    that resolution.
    """

    def __init__(self, config: BigGANConfig, info: Info | None = None):
        self.embedding = nnx.Param(jnp.zeros((config.num_classes, config.embed_dim)))
        self.weight = nnx.Param(
            jnp.zeros((config.z_dim + config.embed_dim, 16 * config.channels[0]))
        )
        self.bias = nnx.Param(jnp.zeros((16 * config.channels[0],)))
        for i, (n_in, n_out) in enumerate(pairwise(config.channels)):
            setattr(
                self, f"block{i}", Block(n_in, config.bottlenecks[i], n_out, config.ups[i], config)
            )
            if i == config.attention:
                self.attention = Attention(n_in)
        self.bn = Norm(config.channels[-1], config)
        self.torgb = Conv(config.channels[-1], 3, 3)
        self.config = config
        self.info = info or Info()

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def z_dim(self) -> int:
        """The network's latent and one number for the class."""
        return self.config.z_dim + 1

    @property
    def num_ws(self) -> int:
        """One: every layer sees the same vector."""
        return 1

    @property
    def w_dim(self) -> int:
        return self.config.z_dim + self.config.embed_dim + 1

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the feature maps that `synthesize` can return, coarse to fine."""
        return tuple(f"{r}x{r}" for r in (4 * 2**i for i in range(sum(self.config.ups) + 1)))

    def with_classes(self, classes: int | Iterable[int] | None) -> BigGAN:
        """The same generator, drawing from these classes only (None: all), or UsageError."""
        other = nnx.merge(*nnx.split(self))
        other.config = replace(self.config, classes=check_classes(classes, self.config.num_classes))
        return other

    def latents(self, seeds: Iterable[int]) -> Float[Array, "n z"]:
        """z for seeds: `truncnorm(-2, 2)` of RandomState(seed), then the class's number."""
        seeds = tuple(int(s) for s in seeds)
        latents_from_seeds(seeds, 1)  # refuses seeds out of range
        rows = np.zeros((len(seeds), self.z_dim))
        for row, seed in zip(rows, seeds):
            rng = np.random.RandomState(seed)
            row[:-1] = ndtri(ndtr(-2) + rng.uniform(size=self.config.z_dim) * (ndtr(2) - ndtr(-2)))
            row[-1] = rng.randn()
        return jnp.asarray(rows.astype(np.float32))

    def map(
        self,
        z: Float[AnyArray, "n z"],
        truncation: float | Float[Array, ""] = 1.0,
        labels: Float[AnyArray, "n c"] | None = None,
    ) -> Float[Array, "n 1 w"]:
        """z -> w. truncation in (0, 1] scales the latent and picks the statistics.

        labels: one-hot rows or mixtures, in place of z's classes; z may then lack its last number.
        """
        z = jnp.asarray(z)
        bare = labels is not None and z.ndim == 2 and z.shape[1] == self.config.z_dim
        if z.ndim != 2 or not (bare or z.shape[1] == self.z_dim):
            raise UsageError(
                f"z must be [n, {self.z_dim}] for this generator (the last number picks the "
                f"class), got {list(z.shape)}"
            )
        rows = check_labels(labels, len(z), self.config.num_classes) if labels is not None else None
        return _map(self, z, truncation, rows)

    def synthesize(
        self,
        w: Float[AnyArray, "n *layers w"],
        noise: Noise = "const",
        taps: tuple[str, ...] = (),
        key: jax.Array | None = None,
        dtype: str = "float32",
    ) -> tuple[Float[Array, "n r r 3"], dict[str, Float[Array, "n s s c"]]]:
        """Image in [-1, 1] and the features named in `taps`, from w [n, 1, w_dim] or [n, w_dim];
        noise and key change nothing.

        dtype: "float32", or "bfloat16" for the blocks. UsageError for another w or an unknown tap.
        """
        taps = check_taps(taps, self.taps)
        w = check_w(jnp.asarray(w), self.w_dim)
        check_noise(noise)
        return _synthesize(self, w, taps, dtype)


@jax.jit
def _map(
    gen: BigGAN, z: jax.Array, truncation: float | jax.Array, labels: jax.Array | None
) -> jax.Array:
    config = gen.config
    if labels is None:
        labels = one_hot(z[:, -1], config.classes, config.num_classes)
    truncation = jnp.clip(jnp.asarray(truncation, jnp.float32), 0, 1)
    place = jnp.broadcast_to(stats_position(truncation, config.n_stats), (len(z), 1))
    return jnp.concatenate(
        [truncation * z[:, : config.z_dim], labels @ gen.embedding[...], place], axis=1
    )[:, None]


@partial(jax.jit, static_argnames=("taps", "dtype"))
def _synthesize(
    gen: BigGAN, w: jax.Array, taps: tuple[str, ...], dtype: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    config = gen.config
    condition = (w[:, :-1], w[:, -1])
    x = (
        (condition[0] @ gen.weight[...] + gen.bias[...])
        .reshape(len(w), 4, 4, config.channels[0])
        .astype(dtype)
    )
    features: dict[str, jax.Array] = {}
    for i in range(len(config.ups)):
        if i == config.attention:
            x = gen.attention(x)
        x = getattr(gen, f"block{i}")(x, condition)
        features[f"{x.shape[1]}x{x.shape[1]}"] = x
    image = jnp.tanh(gen.torgb(gen.bn(x, condition)).astype(jnp.float32))
    return image, {tap: features[tap] for tap in taps}
