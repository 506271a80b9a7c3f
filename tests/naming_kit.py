"""A CLIP that knows two words, and a generator that draws what they say."""

import fakes
import jax.numpy as jnp
import numpy as np

from sis_jax.checkpoints.build import arrays_of, build
from sis_jax.checkpoints.clip import CLIP
from sis_jax.checkpoints.clip_inputs import Preprocessing, Tokenizer
from sis_jax.models.clip import CLIPConfig, CLIPNetwork, TextConfig, TransformerConfig, ViTConfig
from sis_jax.types import Info, Samples, latents_from_seeds

_VOCABULARY, _CONTEXT, _SIDE, _PATCH = 49408, 12, 16, 4


def two_words(scale=5.0, name="two words"):
    """A CLIP whose points are (1, -1) for light patches and the word "white", (-1, 1) for dark ones
    and "black", and 0 for texts with neither.

    One block with uniform attention and nothing else, so that every number can be told beforehand.
    A third number is 0 but in the points of whole pictures, so that these lie between the two
    words: the more light patches, the nearer to "white".
    """
    block = TransformerConfig(3, 1, 1, 3)
    config = CLIPConfig(
        3, ViTConfig(_SIDE, _PATCH, block), TextConfig(_VOCABULARY, _CONTEXT, block)
    )
    tokenizer = Tokenizer(_CONTEXT, _VOCABULARY)
    arrays = {key: np.zeros_like(value) for key, value in arrays_of(CLIPNetwork(config)).items()}
    for key in arrays:
        if ".ln_" in key and key.endswith("weight"):
            arrays[key] += 1
        if key.endswith(("v.weight", "out.weight", "projection")):
            arrays[key] += np.eye(3, dtype=np.float32)
    arrays["visual.patch"][..., 0], arrays["visual.patch"][..., 1] = 1, -1
    arrays["visual.class_embedding"] += np.array([-0.15, -0.15, 0.3], np.float32)
    for word, sign in (("white", 1), ("black", -1)):
        arrays["text.token_embedding"][tokenizer([word])[0][0, 1]] = (sign, -sign, 0)
    arrays["logit_scale"] = np.asarray(np.log(scale), np.float32)
    network = build(lambda: CLIPNetwork(config), arrays, "a fake", Info(name))
    return CLIP(network, Preprocessing(_SIDE, _SIDE), tokenizer, Info(name, sha256="0" * 64))


def save(clip, folder):
    """A weights folder with it."""
    from sis_jax.checkpoints import clip_files

    clip_files.write_folder(
        clip_files.Stored(
            clip.config, arrays_of(clip.network), clip.preprocessing, clip.tokenizer, clip.info
        ),
        folder,
    )
    return folder


def disc_parts():
    """(generator, its two parts): a white disc, cluster and class 1 or 0, on black ground,
    class 0.
    """
    import sis_jax

    gen = fakes.Blocks(16)
    return gen, sis_jax.discover(gen, k=2, layer="16x16", n=8, n_init=2)


class Lamp:
    """A generator in plain Python that lights a picture from the left up to a column told by `axis`
    . w; its z is its w, in two slots.
    """

    info = Info(name="lamp")
    axis = np.array([0.6, 0.8, 0, 0, 0], np.float32)
    resolution, z_dim, taps = 16, 5, ("16x16",)

    def latents(self, seeds):
        return latents_from_seeds(seeds, self.z_dim)

    def map(self, z, truncation=1.0):
        return jnp.repeat((truncation * jnp.asarray(z))[:, None], 2, axis=1)

    def synthesize(self, w, noise="const", taps=()):
        edge = 8 + 4 * (w[:, 0] @ self.axis)
        lit = (jnp.arange(16) + 0.5 < edge[:, None]).astype(jnp.float32)
        images = jnp.broadcast_to(2 * lit[:, None, :, None] - 1, (len(w), 16, 16, 3))
        own = jnp.stack([lit, 1 - lit, jnp.zeros_like(lit)], -1)
        return images, {t: jnp.broadcast_to(own[:, None], (len(w), 16, 16, 3)) for t in taps}

    def sample(self, seeds, truncation=1.0, taps=()):
        z = self.latents(seeds)
        w = self.map(z, truncation)
        return Samples(tuple(seeds), z, w, *self.synthesize(w, taps=taps))
