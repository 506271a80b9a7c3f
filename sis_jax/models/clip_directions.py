"""Cosines of generated images with a text, and directions that raise them: the parts of text
directions that run on a device.

Scores: Segmentation in Style, section 3.4 (a CLIP tags samples with a prompt). Latent optimisation
    and global directions in style space: StyleCLIP (Patashnik et al. 2021, arXiv 2103.17249,
    sections 4 and 6). The identity loss of StyleCLIP is left out: it needs a face recognition
    network, and no domain but faces has one. Bodies are as `ops/sampling.py` describes them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sis_jax.models.clip import CLIPNetwork
from sis_jax.models.clip_regions import Colours, to_pixels


def area_matrix(n: int, m: int) -> Float[np.ndarray, "m n"]:
    """Averaging of n values into m of equal width, fractions of a value included."""
    edges = np.arange(m + 1) * (n / m)
    cells = np.arange(n)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (np.maximum(overlap, 0) * (m / n)).astype(np.float32)


def published_pixels(images: Float[Array, "b h w 3"], side: int) -> Float[Array, "b s s 3"]:
    """How StyleCLIP and Segmentation in Style feed CLIP: enlarged seven times (nearest) and
    averaged down to 224, no mean or deviation applied.

    The two steps are one average over areas, here two small matrices and not an image of 7168
    pixels.
    """
    rows, columns = (jnp.asarray(area_matrix(size, side)) for size in images.shape[1:3])
    return jnp.einsum(
        "yi,xj,bijc->byxc", rows, columns, images, precision=jax.lax.Precision.HIGHEST
    )


def embed(
    network: CLIPNetwork, images: Float[Array, "b h w 3"], colours: Colours, published: bool = False
) -> Float[Array, "b d"]:
    """Unit vectors of images in [-1, 1], prepared as CLIP was trained, or as the published code
    does it. Differentiable.
    """
    side = network.config.vision.image_size
    pixels = (
        published_pixels(images, side) if published else to_pixels(images, (side, side), colours)
    )
    return unit(network.visual(pixels))


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Rows of unit length."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def score_body(
    gen: Any,
    z: Array,
    truncation: Array,
    network: CLIPNetwork,
    texts: Array,
    move: Array,
    *,
    colours: Colours,
    published: bool,
) -> tuple[Float[Array, "b t"], Float[Array, "b w"]]:
    """(cosines with the texts [t d], w of the first W+ layer) of samples that were moved by `move`
    [w] in every W+ layer after truncation.
    """
    w = gen.map(z, truncation)
    images = gen.synthesize(w + move, "const", ())[0]
    return embed(network, images, colours, published) @ texts.T, w[:, 0]


# Latent optimisation


def optimise_body(
    gen: Any,
    z: Array,
    truncation: Array,
    network: CLIPNetwork,
    text: Float[Array, "d"],
    *,
    colours: Colours,
    published: bool,
    steps: int,
    rate: float,
    pull: float,
) -> tuple[Float[Array, "b s w"], Float[Array, "b steps"]]:
    """w in W+ that minimises 1 - cos(image, text) + pull |w - w_start|^2 per sample (equation 1
    without its last term), and the loss at each step.

    Adam, the rate raised over the first twentieth and lowered by a cosine over the last quarter.
    Samples do not see each other.
    """
    start = gen.map(z, truncation)

    def loss(w: Array) -> tuple[Array, Array]:
        away = jnp.sum(jnp.square(w - start), axis=(1, 2))
        each = (
            1
            - embed(network, gen.synthesize(w, "const", ())[0], colours, published) @ text
            + pull * away
        )
        return each.sum(), each

    def one(
        carry: tuple[Array, Array, Array], i: Array
    ) -> tuple[tuple[Array, Array, Array], Array]:
        w, first, second = carry
        slope, each = jax.grad(loss, has_aux=True)(w)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * jnp.square(slope)
        at = i / steps
        ramp = 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.minimum(1.0, (1 - at) / 0.25))
        now = rate * ramp * jnp.minimum(1.0, (at + 1 / steps) / 0.05)
        corrected = (first / (1 - 0.9 ** (i + 1))) / (
            jnp.sqrt(second / (1 - 0.999 ** (i + 1))) + 1e-8
        )
        return (w - now * corrected, first, second), each

    (found, _, _), losses = jax.lax.scan(
        one,
        (start, jnp.zeros_like(start), jnp.zeros_like(start)),
        jnp.arange(steps, dtype=jnp.float32),
    )
    return found, losses.T


# Global directions


def styles_body(
    gen: Any, z: Array, truncation: Array, *, layers: tuple[str, ...]
) -> Float[Array, "b c"]:
    """The style vectors of these layers, one after another."""
    styles = gen.styles(gen.map(z, truncation))
    return jnp.concatenate([styles[name] for name in layers], axis=1)


def relevance_body(
    gen: Any,
    z: Array,
    truncation: Array,
    network: CLIPNetwork,
    channels: Array,
    low: Array,
    high: Array,
    *,
    layer: str,
    colours: Colours,
) -> Float[Array, "b c d"]:
    """Per sample and channel of one layer, the unit vector from the image with the channel at `low`
    to that with it at `high` (section 6.1).
    """
    styles = gen.styles(gen.map(z, truncation))

    def one(channel: Array, values: Array) -> Array:
        def seen(value: Array) -> Array:
            changed = styles[layer].at[:, channel].set(value)
            return embed(
                network, gen.synthesize(styles | {layer: changed}, "const", ())[0], colours
            )

        return unit(seen(values[1]) - seen(values[0]))

    return jnp.moveaxis(
        jax.lax.map(lambda x: one(*x), (channels, jnp.stack([low, high], axis=1))), 0, 1
    )


def layer_names(gen: Any, limit: int = 128) -> tuple[str, ...]:
    """The style layers that are edited: every convolution up to `limit` pixels; ToRGB layers are
    left out, as in section 6.
    """
    return tuple(
        name
        for name, _ in gen.synthesis.layers()
        if not name.endswith("torgb") and int(name[1:].split(".")[0]) <= limit
    )


compiled_embed = jax.jit(embed, static_argnames=("colours", "published"))
