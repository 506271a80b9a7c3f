"""The shipped faces64 inside a config-F network of any resolution, which draws the same faces.

Every layer of the small network becomes a wide one: outputs are repeated until there are enough of
them, and inputs beyond the real ones weigh 0, so that channel c shows what channel c modulo the
real ones shows. Above 64 pixels convolutions are random and RGB is 0: the image is the 64-pixel
one, enlarged by the network's own filter. Mapping, and so w of a seed, stay as they are.
"""

import numpy as np

import sis_jax
from sis_jax.checkpoints.build import arrays_of, build
from sis_jax.models.stylegan2 import GeneratorConfig, StyleGAN2, channel_table
from sis_jax.types import Info


def embedded(resolution, small=None, seed=0):
    """A StyleGAN2 of config-F's channels at `resolution`, drawing what `small` (faces64) draws."""
    small = small or sis_jax.load_generator()
    old = small.config
    config = GeneratorConfig(
        resolution, channel_table(resolution, 32768, 512), old.z_dim, old.w_dim,
        mapping_layers=old.mapping_layers, mapping_width=old.mapping_width,
    )  # fmt: skip
    real, rng = arrays_of(small), np.random.default_rng(seed)

    def make():
        return StyleGAN2(config)

    arrays = {
        key: _widened(key, real[key], a.shape) if key in real else _above(key, a, rng)
        for key, a in arrays_of(make()).items()
    }
    return build(make, arrays, "config-F", Info(name="config-f", licence="for tests"))


def _widened(key, a, shape):
    """`a` in the first inputs, its outputs repeated, for layers that divide by the root of their
    inputs.
    """
    if a.shape == shape:
        return a
    if not key.endswith("weight"):
        return np.tile(a, [*(1,) * (a.ndim - 1), shape[-1] // a.shape[-1]])
    n_in, n_out = a.shape[-2:]
    out = np.zeros(shape, np.float32)
    out[..., :n_in, :] = np.tile(a, [*(1,) * (a.ndim - 1), shape[-1] // n_out])
    return out * np.float32(np.sqrt(shape[-2] / n_in))


def _above(key, a, rng):
    """A layer that the small network lacks: random where it convolves, silent where it paints."""
    if key.endswith("affine.bias"):
        return np.ones_like(a)
    drawn = key.endswith(("conv0.weight", "conv1.weight"))
    return rng.standard_normal(a.shape, np.float32) if drawn else np.zeros_like(a)
