"""StyleGAN2's generator: mapping and synthesis ("skip" architecture).

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958) and
"Training Generative Adversarial Networks with Limited Data" (arXiv 2006.06676) for conv_clamp and
the conditional parts.
Where we differ from the published code: NHWC; parameters in TensorFlow's orientation (convolutions
    HWIO, linear [in, out], style bias with its +1, rows of the discriminator's first linear layer
    in H, W, C order), so that one forward pass serves every layout; taps are explicit results.
    Modules only hold parameters; the maths is in `ops/convolution.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sis_jax.models.conditional import check_classes, check_labels, one_hot
from sis_jax.ops import convolution
from sis_jax.types import (
    Info,
    Noise,
    Sampling,
    UsageError,
    check_noise,
    check_taps,
    latents_from_seeds,
)

AnyArray = jax.Array | np.ndarray
# Activations and image after some of the layers
Stem = tuple[Float[Array, "_n _r _r _c"], Float[Array, "_n _s _s 3"]]
LR_MULTIPLIER = 0.01  # of the mapping network


class Buffer(nnx.Variable):
    """A stored array that no gradient reaches: noise maps and the average w."""


def channel_table(resolution: int, channel_base: int, channel_max: int) -> tuple[int, ...]:
    """Channels at 4, 8, ..., resolution: min(channel_base / r, channel_max)."""
    return tuple(min(channel_base // r, channel_max) for r in resolutions(resolution))


def resolutions(resolution: int) -> tuple[int, ...]:
    """4, 8, ..., resolution."""
    if resolution < 4 or resolution & (resolution - 1):
        raise UsageError(
            f"a StyleGAN2 draws squares of 4, 8, 16, ... pixels, not {resolution}; give a power "
            "of two"
        )
    return tuple(2**i for i in range(2, resolution.bit_length()))


def taps_of(resolution: int) -> tuple[str, ...]:
    """Names of the feature maps up to a resolution, coarse to fine."""
    names = [
        (f"{r}x{r}",) + ((f"{r}x{r}/conv0",) if r > 4 else ()) + (f"{r}x{r}/conv1",)
        for r in resolutions(resolution)
    ]
    return tuple(name for group in names for name in group)


@dataclass(frozen=True)
class GeneratorConfig:
    """Shape of a generator. channels: per resolution from 4 up. conv_clamp: bound on activations.

    Conditional ones: c_dim classes, embedded into embed_dim numbers (0: w_dim). label_concat: z and
        the embedding are normalised together (the first TensorFlow code), not each on its own
        (ADA). classes: those that `sample` draws from, empty for all.
    """

    resolution: int
    channels: tuple[int, ...]
    z_dim: int = 512
    w_dim: int = 512
    c_dim: int = 0
    mapping_layers: int = 8
    mapping_width: int = 512
    conv_clamp: float | None = None
    embed_dim: int = 0
    label_concat: bool = False
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.channels) != len(resolutions(self.resolution)):
            raise UsageError(
                f"{self.resolution} pixels need {len(resolutions(self.resolution))} channel "
                f"counts (4, 8, ...), got {len(self.channels)}"
            )

    @property
    def num_ws(self) -> int:
        """W+ layers: a block's RGB layer shares that of the next convolution."""
        return 2 * len(self.channels)


Rng = np.random.Generator | None


def normal(rng: Rng, *shape: int, scale: float = 1.0) -> jax.Array:
    """N(0, scale^2) by NumPy, which compiles nothing; zeros without an rng (shape only)."""
    if rng is None:
        return jnp.zeros(shape)
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32) * scale)


class Linear(nnx.Module):
    """Fully connected, equalised learning rate."""

    def __init__(
        self, n_in: int, n_out: int, rng: Rng, *, bias: float = 0.0, lr_multiplier: float = 1.0
    ):
        self.weight = nnx.Param(normal(rng, n_in, n_out, scale=1 / lr_multiplier))
        self.bias = nnx.Param(jnp.full((n_out,), bias))
        self.lr_multiplier = lr_multiplier

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        return convolution.linear(x, self.weight[...], self.bias[...], self.lr_multiplier)


class Mapping(nnx.Module):
    """f: Z -> W: normalise z (and the label's embedding), then linear layers with leaky ReLU."""

    def __init__(self, config: GeneratorConfig, rng: Rng = None):
        embedded = (config.embed_dim or config.w_dim) if config.c_dim else 0
        self.embed = Linear(config.c_dim, embedded, rng) if config.c_dim else None
        inner = [config.mapping_width] * (config.mapping_layers - 1)
        for i, (n_in, n_out) in enumerate(
            pairwise([config.z_dim + embedded, *inner, config.w_dim])
        ):
            setattr(self, f"fc{i}", Linear(n_in, n_out, rng, lr_multiplier=LR_MULTIPLIER))
        self.w_avg = Buffer(jnp.zeros((config.w_dim,)))
        self.config = config

    def __call__(
        self, z: Float[Array, "n z"], labels: Float[Array, "n c"] | None = None
    ) -> Float[Array, "n w"]:
        if self.embed is None:
            x = convolution.pixel_norm(z)
        elif labels is None:
            raise UsageError(
                f"this generator is conditional: give labels, one-hot rows of {self.config.c_dim}"
            )
        elif self.config.label_concat:
            x = convolution.pixel_norm(jnp.concatenate([z, self.embed(labels)], axis=-1))
        else:
            x = jnp.concatenate(
                [convolution.pixel_norm(z), convolution.pixel_norm(self.embed(labels))], axis=-1
            )
        for i in range(self.config.mapping_layers):
            x = convolution.leaky_relu(getattr(self, f"fc{i}")(x))
        return x

    def truncate(
        self, w: Float[Array, "n s w"], psi: float | Float[Array, ""], cutoff: int | None = None
    ) -> Float[Array, "n s w"]:
        """w_avg + psi (w - w_avg), on the W+ layers below `cutoff` only if one is given."""
        shifted = self.w_avg[...] + psi * (w - self.w_avg[...])
        if cutoff is None:
            return shifted
        return jnp.where(jnp.arange(w.shape[1])[None, :, None] < cutoff, shifted, w)


class StyledConv(nnx.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU (figure 2c of StyleGAN2)."""

    def __init__(
        self, n_in: int, n_out: int, resolution: int, config: GeneratorConfig, rng: Rng, *, up: bool
    ):
        self.weight = nnx.Param(normal(rng, 3, 3, n_in, n_out))
        self.affine = Linear(config.w_dim, n_in, rng, bias=1.0)
        self.bias = nnx.Param(jnp.zeros((n_out,)))
        self.noise_strength = nnx.Param(jnp.zeros(()))
        self.noise_const = Buffer(normal(rng, resolution, resolution))
        self.up, self.resolution, self.clamp = up, resolution, config.conv_clamp

    def __call__(
        self, x: jax.Array, style: jax.Array, noise: Noise, key: jax.Array | None
    ) -> jax.Array:
        y = convolution.modulated_conv(x, self.weight[...], style, up=self.up)
        if noise != "none":
            shape = (x.shape[0], self.resolution, self.resolution, 1)
            stored = self.noise_const[...][None, :, :, None]
            pattern = stored if key is None else jax.random.normal(key, shape)
            y = y + (pattern * self.noise_strength[...]).astype(y.dtype)
        return convolution.leaky_relu(y + self.bias[...].astype(y.dtype), self.clamp)


class ToRGB(nnx.Module):
    """Modulated 1x1 convolution to RGB, without demodulation."""

    def __init__(self, n_in: int, config: GeneratorConfig, rng: Rng):
        self.weight = nnx.Param(normal(rng, 1, 1, n_in, 3))
        self.affine = Linear(config.w_dim, n_in, rng, bias=1.0)
        self.bias = nnx.Param(jnp.zeros((3,)))
        self.clamp = config.conv_clamp

    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        y = convolution.modulated_conv(x, self.weight[...], style, demodulate=False)
        rgb = y.astype(jnp.float32) + self.bias[...]
        return rgb if self.clamp is None else jnp.clip(rgb, -self.clamp, self.clamp)


class SynthesisBlock(nnx.Module):
    """One resolution: conv0 (doubles the size; 4x4 has a constant instead), conv1, ToRGB."""

    def __init__(self, n_in: int, n_out: int, resolution: int, config: GeneratorConfig, rng: Rng):
        if resolution == 4:
            self.const = nnx.Param(normal(rng, 4, 4, n_out))
        else:
            self.conv0 = StyledConv(n_in, n_out, resolution, config, rng, up=True)
        self.conv1 = StyledConv(n_out, n_out, resolution, config, rng, up=False)
        self.torgb = ToRGB(n_out, config, rng)


class Synthesis(nnx.Module):
    """g: styles -> image and features. Layers are called `b4.conv1`, `b4.torgb`, `b8.conv0`, ..."""

    def __init__(self, config: GeneratorConfig, rng: Rng = None):
        before = 0
        for resolution, channels in zip(resolutions(config.resolution), config.channels):
            setattr(
                self, f"b{resolution}", SynthesisBlock(before, channels, resolution, config, rng)
            )
            before = channels
        self.config = config

    def layers(self) -> list[tuple[str, int]]:
        """(name, W+ layer) of every layer in the order they run."""
        found, index = [], 0
        for r in resolutions(self.config.resolution):
            for conv in ("conv0", "conv1") if r > 4 else ("conv1",):
                found.append((f"b{r}.{conv}", index))
                index += 1
            found.append((f"b{r}.torgb", index))  # shares that of the next convolution
        return found

    def layer(self, name: str) -> StyledConv | ToRGB:
        block, layer = name.split(".")
        return getattr(getattr(self, block), layer)

    def styles(self, w: Float[Array, "n s w"]) -> dict[str, Float[Array, "n _"]]:
        """W+ to style space: the per-channel scales of every layer (StyleSpace, Wu et al. 2021)."""
        return {name: self.layer(name).affine(w[:, index]) for name, index in self.layers()}

    def __call__(
        self, styles: dict[str, Float[Array, "n _"]], noise: Noise = "const",
        taps: tuple[str, ...] = (), key: jax.Array | None = None, dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "n r r 3"], dict[str, Float[Array, "n ..."]]]:  # fmt: skip
        """Image (float32) and the asked features (in `dtype`), after activation and clamp."""
        (_, image), features = self.advance(
            self.begin(styles["b4.conv1"].shape[0], dtype), styles, noise, key
        )
        return image, {tap: features[tap] for tap in taps}

    def begin(self, n: int, dtype: Any = jnp.float32) -> Stem:
        """The start of every image: the learnt constant, and no image yet."""
        # Blocks are attributes by name, unknown to type checkers.
        const = getattr(self, "b4").const[...]  # noqa: B009
        return jnp.broadcast_to(const.astype(dtype), (n, *const.shape)), jnp.zeros((n, 2, 2, 3))

    def advance(
        self, stem: Stem, styles: dict[str, Float[Array, "n _"]], noise: Noise = "const",
        key: jax.Array | None = None, first: int = 0, stop: int | None = None,
    ) -> tuple[Stem, dict[str, Float[Array, "n ..."]]]:  # fmt: skip
        """Run the W+ layers first, ..., stop - 1 (None: to the end): activations and image so far,
        and features on the way.

        Running up to one layer and from it on is the whole network, also with random noise of one
        key.
        """
        if noise == "random" and key is None:
            raise UsageError(
                'noise="random" needs a key: pass key=jax.random.key(seed), or use noise="const"'
            )
        x, image = stem
        features: dict[str, jax.Array] = {}
        for name, index in self.layers():
            layer, used = self.layer(name), None
            if noise == "random" and key is not None and isinstance(layer, StyledConv):
                # Also for layers that are passed over: each keeps its own noise
                key, used = jax.random.split(key)
            if index < first or (stop is not None and index >= stop):
                continue
            if isinstance(layer, StyledConv):
                x = layer(x, styles[name], noise, used)
                block = f"{layer.resolution}x{layer.resolution}"
                features[f"{block}/{name.split('.')[1]}"] = features[block] = x
            else:
                image = convolution.upsample2d(image) + layer(x, styles[name])
                features[f"{image.shape[1]}x{image.shape[1]}/rgb"] = image
        return (x, image), features


class StyleGAN2(Sampling, nnx.Module):
    """A generator: mapping and synthesis behind the protocol of `types.Generator`; a pytree.

    Taps: "RxR" (the last convolution at R pixels), "RxR/conv0", "RxR/conv1", after noise, bias and
        activation. A conditional generator's z has one more number, which picks the class
        (`models/conditional.py`); narrow the choice with `with_classes`, or give `map` labels.
    """

    def __init__(self, config: GeneratorConfig, rng: Rng = None, info: Info | None = None):
        self.mapping = Mapping(config, rng)
        self.synthesis = Synthesis(config, rng)
        self.config = config
        self.info = info or Info()

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def z_dim(self) -> int:
        """Numbers in z: the network's, and one for the class where it is conditional."""
        return self.config.z_dim + (self.config.c_dim > 0)

    @property
    def num_ws(self) -> int:
        return self.config.num_ws

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the feature maps that `synthesize` can return, coarse to fine."""
        return taps_of(self.resolution)

    @property
    def skips(self) -> tuple[str, ...]:
        """Further names that `synthesize` takes as taps: the image as it is at a resolution."""
        return tuple(f"{r}x{r}/rgb" for r in resolutions(self.resolution))

    def with_classes(self, classes: int | Iterable[int] | None) -> StyleGAN2:
        """The same generator, drawing from these classes only (None: all), or UsageError."""
        other = nnx.merge(*nnx.split(self))
        other.config = replace(self.config, classes=check_classes(classes, self.config.c_dim))
        return other

    def up_to(self, resolution: int) -> StyleGAN2:
        """The layers up to a resolution, as a generator of the image at it."""
        if self.resolution <= resolution:
            return self
        other = nnx.merge(*nnx.split(self))
        for r in resolutions(self.resolution)[len(resolutions(resolution)) :]:
            delattr(other.synthesis, f"b{r}")
        channels = self.config.channels[: len(resolutions(resolution))]
        other.config = replace(self.config, resolution=resolution, channels=channels)
        other.synthesis.config = other.config
        return other

    def latents(self, seeds: Iterable[int]) -> Float[Array, "n z"]:
        """z ~ N(0, 1), one row per seed, the same face for a seed as in the published tools."""
        return jnp.asarray(latents_from_seeds(seeds, self.z_dim))

    def map(
        self,
        z: Float[AnyArray, "n z"],
        truncation: float | Float[Array, ""] = 1.0,
        cutoff: int | None = None,
        labels: Float[AnyArray, "n c"] | None = None,
    ) -> Float[Array, "n s w"]:
        """z -> w [n s w], drawn towards the average by `truncation` (1 = not at all), on W+ layers
        < `cutoff` if given.

        labels: one-hot rows in place of z's classes; z may then lack its last number.
        """
        z = jnp.asarray(z)
        bare = labels is not None and z.ndim == 2 and z.shape[1] == self.config.z_dim
        if z.ndim != 2 or not (bare or z.shape[1] == self.z_dim):
            more = " (the last number picks the class; leave it out if you give labels)"
            more = more if self.config.c_dim else ""
            raise UsageError(
                f"z must be [n, {self.z_dim}] for this generator{more}, got {list(z.shape)}"
            )
        rows = check_labels(labels, len(z), self.config.c_dim) if labels is not None else None
        return _map(self, z, truncation, rows, cutoff)

    def synthesize(
        self,
        w: Float[AnyArray, "n s w"] | Float[AnyArray, "n w"],
        noise: Noise = "const",
        taps: tuple[str, ...] = (),
        key: jax.Array | None = None,
        dtype: str = "float32",
    ) -> tuple[Float[Array, "n r r 3"], dict[str, Float[Array, "n ..."]]]:
        """Image in about [-1, 1] and the features named in `taps` (or smaller images, see `skips`).

        w: one vector per image, or one per layer (W+). noise: "const" (the stored maps), "random"
            (needs `key`) or "none". dtype: "float32", or "bfloat16" for the convolutions.
        """
        if not set(taps) <= set(self.skips):
            taps = check_taps(taps, (*self.taps, *(t for t in taps if t in self.skips)))
        w = jnp.asarray(w)
        if w.ndim == 2:
            w = jnp.broadcast_to(w[:, None], (w.shape[0], self.num_ws, w.shape[1]))
        if w.ndim != 3 or w.shape[1:] != (self.num_ws, self.config.w_dim):
            raise UsageError(
                f"w must be [n, {self.num_ws}, {self.config.w_dim}] or [n, {self.config.w_dim}], "
                f"got {list(w.shape)}"
            )
        check_noise(noise)
        return _synthesize(self, w, key, noise, taps, dtype)

    def stem(self, w: Float[AnyArray, "n s w"], stop: int) -> Stem:
        """What the W+ layers before `stop` draw, for images that differ in later layers only."""
        self._check_layer(w, stop)
        return _stem(self, jnp.asarray(w), stop)

    def synthesize_from(
        self, stem: Stem, w: Float[AnyArray, "n s w"], first: int, taps: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "n r r 3"], dict[str, Float[Array, "n ..."]]]:
        """The rest of `synthesize` after `stem(..., first)`, with w's styles from that layer on.

        taps: of layers that run here, or of `skips_from`.
        """
        self._check_layer(w, first)
        if not set(taps) <= set(self.skips_from(first)):
            taps = check_taps(taps, self.taps_from(first))
        return _synthesize_from(self, stem, jnp.asarray(w), first, taps)

    def taps_from(self, first: int) -> tuple[str, ...]:
        """Taps of the layers that `synthesize_from` runs."""
        convs = [
            name[1:].split(".")
            for name, index in self.synthesis.layers()
            if index >= first and not name.endswith("torgb")
        ]
        names = {f"{r}x{r}/{conv}" for r, conv in convs} | {
            f"{r}x{r}" for r, conv in convs if conv == "conv1"
        }
        return tuple(tap for tap in self.taps if tap in names)

    def skips_from(self, first: int) -> tuple[str, ...]:
        """Images on the way that `synthesize_from` passes, named as in `skips`."""
        layers = dict(self.synthesis.layers())
        sizes = resolutions(self.resolution)
        return tuple(f"{r}x{r}/rgb" for r in sizes if layers[f"b{r}.torgb"] >= first)

    def _check_layer(self, w: AnyArray, first: int) -> None:
        if not 1 <= first < self.num_ws:
            raise UsageError(
                f"first is {first}, expected 1 to {self.num_ws - 1}: this generator has "
                f"{self.num_ws} W+ layers"
            )
        if np.ndim(w) != 3 or np.shape(w)[1:] != (self.num_ws, self.config.w_dim):
            raise UsageError(
                f"w must be [n, {self.num_ws}, {self.config.w_dim}] for this generator, got "
                f"{list(np.shape(w))}"
            )


@partial(jax.jit, static_argnames=("cutoff",))
def _map(
    gen: StyleGAN2,
    z: jax.Array,
    truncation: float | jax.Array,
    labels: jax.Array | None,
    cutoff: int | None,
) -> jax.Array:
    config = gen.config
    if config.c_dim and labels is None:
        labels = one_hot(z[:, -1], config.classes, config.c_dim)
    w = gen.mapping(z[:, : config.z_dim], labels)
    return gen.mapping.truncate(
        jnp.broadcast_to(w[:, None], (w.shape[0], gen.num_ws, w.shape[1])), truncation, cutoff
    )


@partial(jax.jit, static_argnames=("noise", "taps", "dtype"))
def _synthesize(
    gen: StyleGAN2,
    w: jax.Array,
    key: jax.Array | None,
    noise: Noise,
    taps: tuple[str, ...],
    dtype: str,
):
    return gen.synthesis(gen.synthesis.styles(w), noise, taps, key, jnp.dtype(dtype))


@partial(jax.jit, static_argnames=("stop",))
def _stem(gen: StyleGAN2, w: jax.Array, stop: int) -> Stem:
    start = gen.synthesis.begin(w.shape[0])
    return gen.synthesis.advance(start, gen.synthesis.styles(w), stop=stop)[0]


@partial(jax.jit, static_argnames=("first", "taps"))
def _synthesize_from(gen: StyleGAN2, stem: Stem, w: jax.Array, first: int, taps: tuple[str, ...]):
    (_, image), features = gen.synthesis.advance(stem, gen.synthesis.styles(w), first=first)
    return image, {tap: features[tap] for tap in taps}
