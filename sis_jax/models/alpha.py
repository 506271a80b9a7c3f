"""The two networks of Labels4Free (Abdal et al. 2021, arXiv 2103.14968), as pure functions.

The alpha network reads both convolutions of a frozen StyleGAN2's last six resolutions through 1 x 1
convolutions, and neighbours only through the bicubic doubling between resolutions. The background
generator is the same StyleGAN2 with its coarsest information set to zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sis_jax.models.stylegan2 import StyleGAN2, resolutions
from sis_jax.ops.resize import upsample_bicubic
from sis_jax.types import UsageError

Params = dict[str, Any]  # arrays by name
LEVELS = 6  # resolutions read, at most
WIDTH = 3  # channels made of each convolution's features
SLOPE = 0.2


def alpha_taps(resolution: int) -> tuple[tuple[str, str], ...]:
    """conv0 and conv1 of the last six resolutions from 8 up; UsageError below 8 pixels."""
    sizes = [r for r in resolutions(resolution) if r >= 8][-LEVELS:]
    if not sizes:
        raise UsageError(
            "Labels4Free reads stages of 8 x 8 pixels and more, this generator draws "
            f"{resolution}: take a larger one"
        )
    return tuple((f"{r}x{r}/conv0", f"{r}x{r}/conv1") for r in sizes)


def flat_taps(resolution: int) -> tuple[str, ...]:
    """`alpha_taps` in one row: the order in which features are handed over."""
    return tuple(tap for pair in alpha_taps(resolution) for tap in pair)


def init_alpha(gen: StyleGAN2, seed: int) -> Params:
    """Parameters, uniform in +-1 / sqrt(fan in): "level{i}/{conv}/weight" [c 3], "mix{i}/weight"
    [12 6], "out/weight" [6 1], and biases.
    """
    rng = np.random.default_rng(seed)
    taps = alpha_taps(gen.resolution)
    shapes = {
        f"level{i}/{j}": (widths(gen)[tap], WIDTH)
        for i, pair in enumerate(taps)
        for j, tap in enumerate(pair)
    }
    shapes |= {f"mix{i}": (4 * WIDTH, 2 * WIDTH) for i in range(1, len(taps) - 1)} | {
        "out": (2 * WIDTH, 1)
    }
    params = {}
    for name, (fan_in, fan_out) in shapes.items():
        bound = fan_in**-0.5
        params[f"{name}/weight"] = jnp.asarray(
            rng.uniform(-bound, bound, (fan_in, fan_out)), jnp.float32
        )
        params[f"{name}/bias"] = jnp.asarray(rng.uniform(-bound, bound, fan_out), jnp.float32)
    return params


def widths(gen: StyleGAN2) -> dict[str, int]:
    """Channels of every tap."""
    channels = dict(zip(resolutions(gen.resolution), gen.config.channels))
    return {tap: channels[int(tap.split("x")[0])] for tap in gen.taps}


def alpha_logits(
    params: Params, features: tuple[Float[Array, "n _ _ _"], ...]
) -> Float[Array, "n r r 1"]:
    """The mask before the sigmoid; features: those of `alpha_taps`, in order.

    p_k: three channels of each of level k's two taps. h = up(p_0); h = up(lrelu(mix [p_k, h])) up
        to the level before the last; out(p_last + h).
    """
    projected = []
    for i in range(len(features) // 2):
        pair = [
            _conv(params, f"level{i}/{j}", features[2 * i + j].astype(jnp.float32)) for j in (0, 1)
        ]
        projected.append(jnp.concatenate(pair, axis=-1))
    *coarse, last = projected
    h = None
    for i, p in enumerate(coarse):
        h = upsample_bicubic(
            p
            if h is None
            else jax.nn.leaky_relu(
                _conv(params, f"mix{i}", jnp.concatenate([p, h], axis=-1)), SLOPE
            )
        )
    return _conv(params, "out", last if h is None else last + h)


def standardised(params: Params, scaling: tuple[Float[Array, "2 _"], ...]) -> Params:
    """Parameters for raw features that equal `params` on standardised ones (scaling)."""
    out = dict(params)
    for k, (mean, deviation) in enumerate(scaling):
        name = f"level{k // 2}/{k % 2}"
        weight = params[f"{name}/weight"] / jnp.maximum(deviation, 1e-6)[:, None]
        out |= {f"{name}/weight": weight, f"{name}/bias": params[f"{name}/bias"] - mean @ weight}
    return out


def _conv(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}/weight"] + params[f"{name}/bias"]


def composite(
    alpha: Float[Array, "n h w 1"], front: Float[Array, "n h w 3"], back: Float[Array, "n h w 3"]
) -> Float[Array, "n h w 3"]:
    """x = alpha front + (1 - alpha) back."""
    return alpha * front + (1 - alpha) * back


def stages(resolution: int) -> tuple[str, ...]:
    """The stages that can be zeroed: "const", "4x4", "RxR/conv0", "RxR" up to resolution / 4."""
    sizes = [r for r in resolutions(resolution) if 8 <= r <= max(resolution // 4, 8)]
    return ("const", "4x4", *(f"{r}x{r}{conv}" for r in sizes for conv in ("/conv0", "")))


def background_generator(gen: StyleGAN2, stage: str) -> StyleGAN2:
    """`gen` with the activations of one stage, and the image of the coarser ones, set to zero.

    A convolution without weight, bias and noise gives zeros. Raises UsageError for an unknown
    stage.
    """
    if stage not in stages(gen.resolution):
        raise UsageError(
            f"cannot zero stage {stage!r} of this generator; it has "
            f"{', '.join(stages(gen.resolution))}"
        )
    # Variables of its own: `nnx.split` and `merge` would hand over the same ones
    other = jax.tree.map(lambda a: a, gen)
    synthesis = other.synthesis
    if stage == "const":
        _clear(synthesis.b4.const)
        return other
    size, _, conv = stage.partition("/")
    resolution = int(size.split("x")[0])
    for r in resolutions(gen.resolution):
        if r < resolution:
            _clear(getattr(synthesis, f"b{r}").torgb.weight)
    layer = getattr(getattr(synthesis, f"b{resolution}"), conv or "conv1")
    for variable in (layer.weight, layer.bias, layer.noise_strength):
        _clear(variable)
    return other


def _clear(variable: nnx.Variable) -> None:
    variable[...] = jnp.zeros_like(variable[...])
