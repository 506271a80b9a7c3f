"""Projection: the latent of which a generator draws a given photo ("GAN inversion"; StyleGAN2,
Karras et al. 2020, arXiv 1912.04958, appendix D).

Per photo x, Adam on w and, if asked, on the noise maps n:

    minimise  distance(G(w + e, n), x)
              + 1e5 * sum over maps and their halvings down to 8 x 8
                of mean(n . roll_x n)^2 + mean(n . roll_y n)^2
              + pull * mean over layers of |w_layer - mean layer|^2 / spread^2

e ~ N(0, (0.05 |w| max(0, 1 - t / 0.75)^2)^2) explores at first, t = 0..1 is the time, |w| the root
mean squared distance of w from its mean. The rate rises over the first twentieth and falls by a
cosine over the last quarter. Noise maps are brought back to mean 0 and deviation 1 after every
step.

Where we differ, and why:
* The paper's distance is LPIPS on a VGG16 that has to be downloaded. Ours needs nothing: L1 between
  Laplacian pyramids, which sees colour and shape at every scale, plus squared distances between
  features of the discriminator that was trained with the generator, unit length per pixel as in
  LPIPS. LPIPS itself (`models/lpips.py`) where its weights are given. Measured on six photos that
  the default generator was not trained on (100 steps in W+, an eighth of the pixels held out):
  bands alone 22.2 dB on the seen and 21.5 on the held-out pixels, but blurred; features alone 21.4
  and 19.4; bands + 1.0 features 22.2 and 20.5; bands + 0.3 features, the default, 22.5 and 21.1,
  and sharp. Optimised noise maps gained nothing at 64 pixels, so they are off by default.
* The rate is a multiple of the spread of w, because latents of another network are larger or
  smaller.
* It begins at the nearest of some hundred samples, not at the mean.
* W+ (one w per layer; Abdal et al. 2019, arXiv 1904.03189) as well as W, with `pull` to keep the
  layers together: a w far from W is edited badly.
* A photo's result depends on that photo alone: any number may share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sis_jax.models.discriminator import Discriminator
from sis_jax.models.lpips import LPIPS, lpips_maps
from sis_jax.models.stylegan2 import AnyArray, StyleGAN2
from sis_jax.ops import convolution
from sis_jax.ops.sampling import image_of

NOISE_WEIGHT = 1e5
EXPLORE = 0.05  # deviation of e, in |w|
EXPLORE_UNTIL = 0.75
RISE, FALL = 0.05, 0.25  # shares of the time in which the rate rises and falls
THUMBNAIL = 16  # pixels at which samples to begin with are compared

Noise = dict[str, Float[AnyArray, "n _ _"]]
State = tuple[Any, Any]  # (optimised arrays, Adam's moments)
Seen = Any  # (bands, features) of images


@dataclass(frozen=True)
class Recipe:
    """How to project; fixed at compile time.

    space: "w+" has one w per layer, "w" one for all. rate: Adam's peak, in spreads of w. pyramid,
        features: weights of the distances. pull: of the distance between W+ layers. noise: optimise
        the noise maps too. explore: deviation of the noise on w, in |w|.
    """

    space: Literal["w", "w+"] = "w+"
    rate: float = 0.2
    pyramid: float = 1.0
    features: float = 0.3
    pull: float = 0.0
    noise: bool = False
    explore: float = EXPLORE


# Distances: one number per image


def laplacian(images: Float[Array, "n r r c"]) -> list[Float[Array, "n _ _ c"]]:
    """Band-pass images, fine to coarse, and the 4 x 4 rest (Burt and Adelson 1983)."""
    bands = []
    while images.shape[1] > 4 and images.shape[1] % 2 == 0:
        smaller = convolution.downsample2d(images)
        bands.append(images - convolution.upsample2d(smaller))
        images = smaller
    return [*bands, images]


def band_distance(
    a: list[Float[Array, "n _ _ c"]], b: list[Float[Array, "n _ _ c"]]
) -> Float[Array, "n"]:
    """Mean absolute difference of each band, summed over the bands."""
    return sum((jnp.abs(x - y).mean(axis=(1, 2, 3)) for x, y in zip(a, b)), jnp.zeros(len(a[0])))


def discriminator_maps(
    disc: Discriminator, images: Float[Array, "n r r 3"]
) -> list[Float[Array, "n _ _ _"]]:
    """The discriminator's features after its first layer and every block above 4 x 4."""
    x = disc.fromrgb(images, disc.config.conv_clamp)
    maps, r = [x], disc.config.resolution
    while r > 4:
        x = getattr(disc, f"b{r}")(x)
        maps.append(x)
        r //= 2
    return maps


def feature_distance(
    a: list[Float[Array, "n _ _ _"]], b: list[Float[Array, "n _ _ _"]]
) -> Float[Array, "n"]:
    """Squared distance per pixel, mean over pixels, sum over maps, as LPIPS."""
    return sum(
        (jnp.square(x - y).sum(-1).mean(axis=(1, 2)) for x, y in zip(a, b)), jnp.zeros(len(a[0]))
    )


def feature_maps(
    net: Discriminator | LPIPS, images: Float[Array, "n r r 3"]
) -> list[Float[Array, "n _ _ _"]]:
    """The compared features: LPIPS, or a discriminator's, where every map counts alike."""
    if isinstance(net, LPIPS):
        return lpips_maps(net, images)
    maps = discriminator_maps(net, images)
    return [
        x * jax.lax.rsqrt((jnp.sum(x * x, axis=-1, keepdims=True) + 1e-8) * len(maps)) for x in maps
    ]


def noise_penalty(noise: Noise) -> Float[Array, "n"]:
    """How much neighbours in the noise maps resemble each other, down to 8 pixels."""
    total: Any = 0.0
    for x in noise.values():
        while True:
            total = total + sum(
                jnp.square((x * jnp.roll(x, 1, axis)).mean(axis=(1, 2))) for axis in (1, 2)
            )
            if x.shape[1] <= 8:
                break
            n, r, _ = x.shape
            x = x.reshape(n, r // 2, 2, r // 2, 2).mean(axis=(2, 4))
    return total


# The generator at given latents


def noise_maps(gen: StyleGAN2) -> dict[str, Float[Array, "_ _"]]:
    """The stored noise maps by the name of their layer."""
    layers: list[tuple[str, Any]] = [
        (name, gen.synthesis.layer(name)) for name, _ in gen.synthesis.layers()
    ]
    return {name: layer.noise_const[...] for name, layer in layers if not name.endswith("torgb")}


def with_noise(gen: StyleGAN2, noise: dict[str, Float[AnyArray, "_ _"]]) -> StyleGAN2:
    """The same generator with other stored noise maps."""
    graph, state = nnx.split(gen)
    arrays = nnx.to_pure_dict(state)
    for name, value in noise.items():
        block, layer = name.split(".")
        arrays["synthesis"][block][layer]["noise_const"] = jnp.asarray(value)
    return nnx.merge(graph, arrays)


def drawn(gen: Any, w: Float[AnyArray, "n s w"], noise: Noise) -> Float[Array, "n r r 3"]:
    """Images of latents with their noise maps, or the generator's own where `noise` is empty."""
    if not noise:
        return gen.synthesize(w)[0]
    return jax.vmap(lambda one, maps: with_noise(gen, maps).synthesize(one[None])[0][0])(w, noise)


# Where to begin


def sample_body(
    gen: Any, z: Array, truncation: Array, *, small: str | None = None
) -> tuple[Float[Array, "b s w"], Float[AnyArray, "b t t 3"]]:
    """(w, small image) of samples; a body as in `ops/sampling.py`. small: the name of an image on
    the way to the whole one, to be looked at in its place.
    """
    w = gen.map(z, truncation)
    return w, thumbnails(image_of(gen, w, small))


def thumbnails(images: Float[AnyArray, "n r r c"]) -> Float[AnyArray, "n t t c"]:
    """Images at 16 pixels (or their own size, if smaller), averaged."""
    n, r, _, c = images.shape
    k = max(r // THUMBNAIL, 1)
    return images.reshape(n, r // k, k, r // k, k, c).mean(axis=(2, 4))


def map_body(gen: Any, z: Array, truncation: Array) -> Float[Array, "b w"]:
    """w of the first W+ layer of samples."""
    return gen.map(z, truncation)[:, 0]


# Steps


def begin(
    start: Float[np.ndarray, "n s w"], noise: dict[str, Float[np.ndarray, "_ _"]], recipe: Recipe
) -> State:
    """The optimised arrays, and Adam's two moments, at the start."""
    w = start[:, :1] if recipe.space == "w" else start
    maps = (
        {
            name: np.broadcast_to(value, (len(start), *value.shape)).copy()
            for name, value in noise.items()
        }
        if recipe.noise
        else {}
    )
    values = {"w": np.asarray(w, np.float32), "noise": maps}
    return values, (jax.tree.map(np.zeros_like, values), jax.tree.map(np.zeros_like, values))


def rate_at(t: Float[Array, ""]) -> Float[Array, ""]:
    """Share of the peak rate at time t in 0..1."""
    fall = 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.minimum(1.0, (1 - t) / FALL))
    return fall * jnp.minimum(1.0, t / RISE)


def steps_body(
    gen: Any,
    net: Any,
    length: Float[Array, ""],
    state: State,
    photos: Float[Array, "b r r 3"],
    known: Float[Array, "b r r 1"] | None,
    seeds: Int[Array, "b"],
    span: Int[Array, "3"],
    *,
    recipe: Recipe,
) -> tuple[State, Float[Array, "b"]]:
    """Steps first, ..., last - 1 of total (span), and the distance at the last, on one device.

    net: the discriminator, LPIPS or None. length: |w|. known: 1 where the photo shall be matched
        (None: everywhere); elsewhere it is the generated image. seeds: of the exploration, per
        photo.
    """
    layers, width = gen.num_ws, state[0]["w"].shape[-1]
    spread = length / np.sqrt(width)
    whole = None if known is not None else seen(net, photos, recipe)

    def target(images: Array) -> Seen:
        if known is None:
            return whole
        return seen(net, known * photos + (1 - known) * jax.lax.stop_gradient(images), recipe)

    def loss(values: dict[str, Any], away: Array) -> tuple[Array, Array]:
        w = values["w"]
        moved = jnp.broadcast_to(w + away, (w.shape[0], layers, width))
        images = drawn(gen, moved, values["noise"])
        each = distance(seen(net, images, recipe), target(images), recipe)
        extra = (
            recipe.pull * jnp.square((w - w.mean(1, keepdims=True)) / spread).mean(axis=(1, 2))
            if recipe.pull
            else 0.0
        )
        penalty = NOISE_WEIGHT * noise_penalty(values["noise"]) if values["noise"] else 0.0
        return (each + extra + penalty).sum(), each

    def step(i: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
        (values, (mean, square)), _ = carry
        t = i / span[2]
        size = recipe.explore * length * jnp.square(jnp.maximum(0.0, 1 - t / EXPLORE_UNTIL))
        keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), i))(seeds)
        away = size * jax.vmap(lambda k: jax.random.normal(k, values["w"].shape[1:]))(keys)
        slope, each = jax.grad(loss, has_aux=True)(values, away)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, slope)
        square = jax.tree.map(lambda m, g: 0.999 * m + 0.001 * jnp.square(g), square, slope)
        rate = recipe.rate * rate_at((i + 1) / span[2])
        scale = jnp.sqrt(1 - 0.999 ** (i + 1)) / (1 - 0.9 ** (i + 1))  # both moments begin at zero
        change = jax.tree.map(lambda m, v: rate * scale * m / (jnp.sqrt(v) + 1e-8), mean, square)
        w = values["w"] - spread * change["w"]
        noise = jax.tree.map(lambda x, c: _normalised(x - c), values["noise"], change["noise"])
        return ({"w": w, "noise": noise}, (mean, square)), each

    # One program for any number of steps
    return jax.lax.fori_loop(span[0], span[1], step, (state, jnp.zeros(len(photos))))


def seen(net: Any, images: Float[Array, "n r r 3"], recipe: Recipe) -> Seen:
    """The inputs of the distances: (bands, features), empty where they have no weight."""
    bands = laplacian(images) if recipe.pyramid else []
    return bands, feature_maps(net, images) if recipe.features and net is not None else []


def distance(a: Seen, b: Seen, recipe: Recipe) -> Float[Array, "n"]:
    """The recipe's distance between images in [-1, 1]: weights times the two distances."""
    total: Any = 0.0
    if a[0]:
        total = total + recipe.pyramid * band_distance(a[0], b[0])
    if a[1]:
        total = total + recipe.features * feature_distance(a[1], b[1])
    return total


def _normalised(x: Float[Array, "n r r"]) -> Float[Array, "n r r"]:
    x = x - x.mean(axis=(1, 2), keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=(1, 2), keepdims=True) + 1e-8)


draw = partial(jax.jit)(drawn)
