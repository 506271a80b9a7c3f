"""FurryGAN's networks: a foreground and a background generator, the mask between them, and the
predictor of that mask (Bae et al., ECCV 2022, arXiv 2208.10422).

Where this differs from the released code:
* Both generators are StyleGAN2s as they stand here, with skip images and without a tanh, so that a
  trained one can be the foreground. The background has a third of its widths.
* Mask heads read every resolution, as skip images do: the last features of such a generator hold
  little but colours, and masks from them alone follow brightness. They add no noise.
* The mask predictor is a small network of its own, no branch of the discriminator, so that any
  discriminator works.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sis_jax.models.layers import Conv
from sis_jax.models.stylegan2 import (
    AnyArray,
    Buffer,
    GeneratorConfig,
    Linear,
    Mapping,
    Rng,
    StyleGAN2,
    Synthesis,
    normal,
    resolutions,
    taps_of,
)
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

RATIO = 3  # of the foreground's widths to the background's
BACKGROUND_LAYERS = 2  # of its mapping network
HEAD = 32  # channels whose mean is a mask
PREDICTED = 16  # pixels of a predicted mask
LAYERS: tuple[str, ...] = ("mask", "mask/coarse", "mask/fine", "foreground", "background")


@dataclass(frozen=True)
class FurryGANConfig:
    """Shapes of the two generators: of one resolution, unconditional, both of the same z."""

    foreground: GeneratorConfig
    background: GeneratorConfig

    def __post_init__(self) -> None:
        a, b = self.foreground, self.background
        if a.resolution != b.resolution or a.z_dim < b.z_dim or a.c_dim or b.c_dim:
            raise UsageError(
                "foreground and background must be unconditional, of one resolution, and the "
                "foreground's z at least as long as the background's"
            )

    @property
    def resolution(self) -> int:
        """Edge length of an image in pixels."""
        return self.foreground.resolution


def config_for(foreground: GeneratorConfig) -> FurryGANConfig:
    """The background has a third of the foreground's widths. UsageError for a conditional one."""
    a = foreground
    w_dim = max(a.w_dim // RATIO, 1)
    channels = tuple(max(c // RATIO, 1) for c in a.channels)
    behind = GeneratorConfig(
        a.resolution, channels, max(a.z_dim // RATIO, 1), w_dim,
        mapping_layers=BACKGROUND_LAYERS, mapping_width=w_dim,
    )  # fmt: skip
    return FurryGANConfig(a, behind)


class Mappings(nnx.Module):
    """z to the w of both generators, one after the other; w_avg: the average of both."""

    def __init__(self, config: FurryGANConfig, rng: Rng = None):
        self.foreground, self.background = (
            Mapping(half, rng) for half in (config.foreground, config.background)
        )
        del self.foreground.w_avg, self.background.w_avg
        self.w_avg = Buffer(jnp.zeros(config.foreground.w_dim + config.background.w_dim))

    def __call__(self, z: Float[Array, "n z"]) -> Float[Array, "n w"]:
        behind = z[:, : self.background.config.z_dim]
        return jnp.concatenate([self.foreground(z), self.background(behind)], axis=1)


class MaskHead(nnx.Module):
    """Features and styles to a mask: modulated 1 x 1 convolutions of every resolution, their sum as
    a skip image's, leaky ReLU, ReLU, mean of channels, each image's values from 0 to 1.
    """

    def __init__(self, config: GeneratorConfig, rng: Rng):
        self.sizes = resolutions(config.resolution)
        for size, channels in zip(self.sizes, config.channels):
            # Demodulation divides the kernel's size out, but not from the learning rate: a small
            # one learns in hundreds of steps.
            kernel = nnx.Param(normal(rng, 1, 1, channels, HEAD, scale=0.1))
            setattr(self, f"weight{size}", kernel)
            setattr(self, f"affine{size}", Linear(config.w_dim, channels, rng, bias=1.0))
        self.bias = nnx.Param(jnp.zeros(HEAD))

    def styles(self, w: Float[Array, "n s w"]) -> list[Float[Array, "n c"]]:
        """The scales of each resolution's features, from the w of its last layer."""
        return [getattr(self, f"affine{r}")(w[:, 2 * i + 1]) for i, r in enumerate(self.sizes)]

    def __call__(
        self, features: dict[str, Float[Array, "n _ _ _"]], styles: list[Float[Array, "n _"]]
    ) -> Float[Array, "n h w"]:
        y = jnp.zeros((len(styles[0]), 2, 2, HEAD))
        for size, style in zip(self.sizes, styles):
            x, kernel = features[f"{size}x{size}"], getattr(self, f"weight{size}")
            own = convolution.modulated_conv(x.astype(jnp.float32), kernel[...], style)
            y = convolution.upsample2d(y) + own
        return stretched(convolution.leaky_relu(y + self.bias[...]))


def stretched(x: Float[Array, "n h w c"]) -> Float[Array, "n h w"]:
    """The mean of what is positive, moved and scaled to 0..1 in each image."""
    y = jax.nn.relu(x).mean(-1)
    least, most = y.min((1, 2), keepdims=True), y.max((1, 2), keepdims=True)
    # A flat image's gradient stays finite.
    return (y - least) / (most - least + 1e-3)


class Composition(nnx.Module):
    """Styles to the image: mask x foreground + (1 - mask) x background.

    The mask is coarse + fine_weight x fine, from 0 to 1, of the foreground's features.
    """

    def __init__(self, config: FurryGANConfig, rng: Rng = None):
        self.foreground, self.background = (
            Synthesis(half, rng) for half in (config.foreground, config.background)
        )
        self.coarse, self.fine = (MaskHead(config.foreground, rng) for _ in range(2))
        self.fine_weight = Buffer(jnp.zeros(()))

    def styles(self, w: Float[Array, "n s w"]) -> dict[str, Any]:
        """W+ to the scales of every layer of both generators, and of the mask heads."""
        split = self.foreground.config.w_dim
        front, behind = w[..., :split], w[..., split:]
        return {
            "foreground": self.foreground.styles(front),
            "background": self.background.styles(behind),
            "coarse": self.coarse.styles(front),
            "fine": self.fine.styles(front),
        }

    def __call__(
        self, styles: dict[str, Any], noise: Noise = "const", taps: tuple[str, ...] = (),
        key: jax.Array | None = None, dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "n r r 3"], dict[str, Float[Array, "n ..."]]]:  # fmt: skip
        """Image, and what `taps` names: the foreground's features, and `LAYERS` of the image."""
        keys = (None, None) if key is None else jax.random.split(key)
        sizes = tuple(f"{r}x{r}" for r in resolutions(self.foreground.config.resolution))
        asked = tuple(tap for tap in taps if tap not in (*LAYERS, *sizes))
        front, found = self.foreground(styles["foreground"], noise, asked + sizes, keys[0], dtype)
        behind, _ = self.background(styles["background"], noise, (), keys[1], dtype)
        coarse = self.coarse(found, styles["coarse"])
        fine = self.fine(found, styles["fine"])
        mask = jnp.clip(coarse + self.fine_weight[...] * fine, 0, 1)
        found |= dict(zip(LAYERS, (mask, coarse, fine, front, behind)))
        return composite(mask, front, behind), {tap: found[tap] for tap in taps}


def composite(
    mask: Float[Array, "n h w"], front: Float[Array, "n h w 3"], behind: Float[Array, "n h w 3"]
) -> Float[Array, "n h w 3"]:
    """`front` where the mask is 1, `behind` where it is 0."""
    return mask[..., None] * front + (1 - mask[..., None]) * behind


class FurryGAN(Sampling, nnx.Module):
    """A generator behind the protocol of `types.Generator`; a pytree.

    Taps: those of the foreground's StyleGAN2. `synthesize` also takes the names in `layers`: the
    masks Float[n r r] in 0..1, and the images Float[n r r 3] that they compose. w holds the
    foreground's numbers, then the background's.
    """

    def __init__(self, config: FurryGANConfig, rng: Rng = None, info: Info | None = None):
        self.mapping = Mappings(config, rng)
        self.synthesis = Composition(config, rng)
        self.config = config
        self.info = info or Info()

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def z_dim(self) -> int:
        return self.config.foreground.z_dim

    @property
    def num_ws(self) -> int:
        return self.config.foreground.num_ws

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the foreground's feature maps, coarse to fine."""
        return taps_of(self.resolution)

    @property
    def layers(self) -> tuple[str, ...]:
        """Further names that `synthesize` takes as taps: masks and images before composition."""
        return LAYERS

    def latents(self, seeds: Iterable[int]) -> Float[Array, "n z"]:
        """z ~ N(0, 1), one row per seed."""
        return jnp.asarray(latents_from_seeds(seeds, self.z_dim))

    def map(
        self, z: Float[AnyArray, "n z"], truncation: float | Float[Array, ""] = 1.0
    ) -> Float[Array, "n s w"]:
        """z -> w [n s w], drawn towards the average by `truncation` (1 = not at all)."""
        z = jnp.asarray(z)
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise UsageError(f"z must be [n, {self.z_dim}] for this generator, got {list(z.shape)}")
        return _map(self, z, truncation)

    def synthesize(
        self, w: Float[AnyArray, "n s w"] | Float[AnyArray, "n w"], noise: Noise = "const",
        taps: tuple[str, ...] = (), key: jax.Array | None = None, dtype: str = "float32",
    ) -> tuple[Float[Array, "n r r 3"], dict[str, Float[Array, "n ..."]]]:  # fmt: skip
        """Image in about [-1, 1], and what `taps` names; otherwise as a StyleGAN2's."""
        taps = check_taps(taps, (*self.taps, *LAYERS))
        check_noise(noise)
        w, width = jnp.asarray(w), len(self.mapping.w_avg[...])
        if w.ndim == 2:
            w = jnp.broadcast_to(w[:, None], (w.shape[0], self.num_ws, w.shape[1]))
        if w.ndim != 3 or w.shape[1:] != (self.num_ws, width):
            raise UsageError(
                f"w must be [n, {self.num_ws}, {width}] or [n, {width}], got {list(w.shape)}"
            )
        return _synthesize(self, w, key, noise, taps, dtype)

    def fakes(
        self, ws: Float[Array, "n s w"], key: jax.Array, dtype: Any
    ) -> Float[Array, "n r r 3"]:
        """For the discriminator ("dual fake input"): images, of every second one the foreground
        alone.
        """
        styles = self.synthesis.styles(ws)
        image, found = self.synthesis(styles, "random", ("foreground",), key, dtype)
        whole = (jnp.arange(len(ws)) % 2 == 0)[:, None, None, None]
        return jnp.where(whole, image, found["foreground"])


@jax.jit
def _map(gen: FurryGAN, z: jax.Array, truncation: float | jax.Array) -> jax.Array:
    average, w = gen.mapping.w_avg[...], gen.mapping(z)
    w = average + truncation * (w - average)
    return jnp.broadcast_to(w[:, None], (len(z), gen.num_ws, w.shape[1]))


@partial(jax.jit, static_argnames=("noise", "taps", "dtype"))
def _synthesize(
    gen: FurryGAN, w: jax.Array, key: jax.Array | None, noise: Noise, taps: tuple[str, ...],
    dtype: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    return gen.synthesis(gen.synthesis.styles(w), noise, taps, key, jnp.dtype(dtype))


def around(foreground: StyleGAN2, rng: Rng) -> FurryGAN:
    """A generator whose foreground is this one; background and masks are random."""
    gen, front = FurryGAN(config_for(foreground.config), rng), nnx.clone(foreground)
    average = front.mapping.w_avg[...]
    gen.mapping.w_avg[...] = gen.mapping.w_avg[...].at[: len(average)].set(average)
    del front.mapping.w_avg
    gen.mapping.foreground, gen.synthesis.foreground = front.mapping, front.synthesis
    gen.info = foreground.info
    return gen


class Predictor(nnx.Module):
    """Images to the masks of their foregrounds, at `PREDICTED` pixels or the image's, if fewer."""

    def __init__(self, resolution: int, rng: Rng, width: int = HEAD):
        layers = [Conv(3, width, rng, bias=True)]
        while resolution > PREDICTED:
            layers.append(Conv(width, 2 * width, rng, stride=2, bias=True))
            width, resolution = 2 * width, resolution // 2
        # Wide enough to see the whole of an object
        layers += [Conv(width, width, rng, dilation=d, bias=True) for d in (1, 2, 4)]
        self.layers = nnx.List([*layers, Conv(width, HEAD, rng, size=1, bias=True)])

    def __call__(self, images: Float[Array, "n r r 3"]) -> Float[Array, "n s s"]:
        x = images
        for layer in list(self.layers)[:-1]:
            x = jax.nn.leaky_relu(layer(x), 0.2)
        return stretched(self.layers[-1](x))
