"""Small networks with fixed weights, for tests that need a generator or a discriminator but not a
good one.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from sis_jax.models.dcgan import DCGAN, DCGANConfig
from sis_jax.models.discriminator import Discriminator, DiscriminatorConfig
from sis_jax.models.stylegan2 import GeneratorConfig, StyleGAN2
from sis_jax.runs.config import Config
from sis_jax.types import Info, Samples, latents_from_seeds

# `discover` with these takes a second or two on `tiny_stylegan2`.
TINY_PARTS = {"k": 3, "layer": "16x16", "n": 6, "n_init": 1, "max_points": 1536}


def _filled(module, seed, info):
    """`module` with every array redrawn N(0, 1), biases and strengths small: no layer is left at a
    zero that would hide it.
    """
    from sis_jax.checkpoints.build import arrays_of, build

    rng = np.random.default_rng(seed)
    arrays = {}
    for name, value in arrays_of(module).items():
        size = 0.1 if name.endswith(("bias", "noise_strength", "w_avg", "offset")) else 1.0
        drawn = size * rng.standard_normal(value.shape)
        arrays[name] = (drawn + (1.0 if name.endswith("affine.bias") else 0.0)).astype(np.float32)
    return build(lambda: module, arrays, "a fake", info)


def tiny_stylegan2(resolution=16, channels=8, latent=8, seed=0):
    """A StyleGAN2 with random weights: `channels` at every resolution, two mapping layers."""
    stages = resolution.bit_length() - 2
    config = GeneratorConfig(
        resolution, (channels,) * stages, latent, latent, mapping_layers=2, mapping_width=latent
    )
    return _filled(StyleGAN2(config), seed, Info(name="tiny", licence="none needed"))


def tiny_discriminator(resolution=16, channels=8, seed=1):
    """The discriminator of `tiny_stylegan2`'s size."""
    stages = resolution.bit_length() - 2
    return _filled(
        Discriminator(DiscriminatorConfig(resolution, (channels,) * stages)),
        seed,
        Info(name="tiny"),
    )


def tiny_dcgan(channels=(16, 8), z_dim=6, seed=2):
    """A DCGAN with random weights, 4 * 2 ** len(channels) pixels."""
    return _filled(DCGAN(DCGANConfig(z_dim, tuple(channels))), seed, Info(name="tiny-dcgan"))


class Blocks:
    """A generator in plain Python, no pytree, with known parts: a disc on a ground; `truth(seeds)`
    says which pixel is which.

    Its single tap holds inside three times and a little of z per pixel. mirrored=True draws two
    bands with equal features, left and right.
    """

    info = Info(name="blocks")

    def __init__(self, resolution=16, mirrored=False):
        self.resolution, self.z_dim, self.mirrored = resolution, 4, mirrored
        self.taps = (f"{resolution}x{resolution}",)

    def inside(self, shift, lib=np):
        """[n r r] where the disc (or the bands) of samples with these shifts [n] in pixels is."""
        side = self.resolution
        at = lib.arange(side) + 0.5 - side / 2
        x, y = at[None, None, :] - shift[:, None, None], at[None, :, None]
        return (
            (abs(x) > 0.2 * side) & (y == y) if self.mirrored else x**2 + y**2 < (0.36 * side) ** 2
        )

    def truth(self, seeds, truncation=1.0):
        """Which pixels are the disc: bool[n r r]."""
        return self.inside(np.tanh(truncation * latents_from_seeds(seeds, self.z_dim)[:, 0]))

    def latents(self, seeds):
        return latents_from_seeds(seeds, self.z_dim)

    def map(self, z, truncation=1.0):
        return (truncation * z)[:, None]

    def synthesize(self, w, noise="const", taps=()):
        mask = self.inside(jnp.tanh(w[:, 0, 0]), jnp).astype(jnp.float32)[..., None]
        own = jnp.broadcast_to(0.01 * w[:, 0, None, None, 1:2], mask.shape)
        features = {self.taps[0]: jnp.concatenate([4 * mask, 3 * mask, 2 * mask, own], -1)}
        return jnp.broadcast_to(2 * mask - 1, (*mask.shape[:3], 3)), {t: features[t] for t in taps}

    def sample(self, seeds, truncation=1.0, taps=()):
        z = self.latents(seeds)
        w = self.map(z, truncation)
        return Samples(tuple(seeds), z, w, *self.synthesize(w, taps=taps))


def configured(verb, **fields):
    """A configuration of any fields, to open a stage with."""
    rows = [(name, Any, dataclasses.field(default=None, kw_only=True)) for name in fields]
    cls = dataclasses.make_dataclass(
        "AnyConfig", rows, bases=(Config,), frozen=True, namespace={"verb": verb}
    )
    return cls(**fields)
