"""`load_clip`, and the object it returns: a CLIP with its preprocessing and its vocabulary."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from sis_jax import parallel
from sis_jax.checkpoints import clip_files, clip_names, convert, files, shards
from sis_jax.checkpoints.clip_inputs import Preprocessing, Tokenizer
from sis_jax.checkpoints.layouts import clip
from sis_jax.data.files import CannotWrite
from sis_jax.models.clip import CLIPConfig, CLIPNetwork
from sis_jax.ops import plan
from sis_jax.ops.progress import say
from sis_jax.ops.sampling import one_ahead
from sis_jax.types import Info, UsageError

DEFAULT = "openai/clip-vit-base-patch32"
AnyArray = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CLIP:
    """Images and texts to embeddings in one space (Radford et al. 2021), not normalised. A pytree;
    its encoders work inside jit and vmap.

    Batches are taken in chunks of `batch` rows, the last one filled up: one compilation, bounded
    memory.
    """

    network: CLIPNetwork
    preprocessing: Preprocessing = field(metadata={"static": True})
    tokenizer: Tokenizer = field(metadata={"static": True})
    info: Info = field(metadata={"static": True})

    @property
    def config(self) -> CLIPConfig:
        """Shape of both towers."""
        return self.network.config

    @property
    def logit_scale(self) -> Float[Array, ""]:
        """The factor on cosine similarities, 100 in OpenAI's models."""
        return jnp.exp(self.network.logit_scale[...])

    def preprocess(self, photos: Any) -> Float[np.ndarray, "b s s 3"]:
        """Photos to pixels [b s s 3] as published: bicubic, centred square, CLIP's mean and
        deviation.

        photos: one, a batch or a sequence of any sizes; uint8[h w 3] RGB or Pillow images.
            UsageError for others. Runs on the host.
        """
        return self.preprocessing(photos)

    def tokenize(self, texts: str | Sequence[str]) -> Int[np.ndarray, "b n"]:
        """Token ids int32[b context]; texts that are too long are cut, with a warning.

        Raises UsageError for what is no text, or for a checkpoint without its vocabulary.
        """
        ids, cut = self.tokenizer(_texts(texts))
        if cut:
            first, more = next(iter(cut)), f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
            warnings.warn(
                f"{first[:60]!r}{more} is longer than CLIP's {self.tokenizer.context} tokens: its "
                "end was cut off",
                stacklevel=2,
            )
        return ids

    def cut(self, texts: str | Sequence[str]) -> tuple[str, ...]:
        """Those of the texts that `tokenize` cuts."""
        return self.tokenizer(_texts(texts))[1]

    def encode_image(
        self, pixels: Float[AnyArray, "b h w 3"], batch: int = 32
    ) -> Float[Array, "b d"]:
        """Embeddings [b d] of images from `preprocess`; UsageError for integers and other sizes."""
        pixels = _array(pixels)
        self.network.check_pixels(pixels, native=True)
        return _in_chunks(_encode_image, self.network, pixels, batch)

    def encode_text(
        self, texts: str | Sequence[str] | Int[AnyArray, "b n"], batch: int = 64
    ) -> Float[Array, "b d"]:
        """Embeddings [b d] of texts or of ids from `tokenize`; UsageError for unknown ids."""
        if not isinstance(texts, AnyArray):
            texts = self.tokenize(texts)
        return _in_chunks(_encode_text, self.network, self._ids(texts), batch)

    def dense_features(
        self, pixels: Float[AnyArray, "b h w 3"], batch: int = 8
    ) -> Float[Array, "b h2 w2 d"]:
        """An embedding of every patch (ViT) or 32 x 32 pixels (ResNet), in the space of
        `encode_text`.

        The value path of the last attention layer (MaskCLIP, Zhou et al. 2022, section 3.2). Height
        and width are any multiples of the patch or of 32 pixels; UsageError for others.
        """
        pixels = _array(pixels)
        self.network.check_pixels(pixels, native=False)
        return _in_chunks(_dense, self.network, pixels, batch)

    def _ids(self, ids: AnyArray) -> AnyArray:
        context, vocabulary = self.config.text.context, self.config.text.vocabulary
        if ids.ndim != 2 or not 0 < ids.shape[1] <= context or ids.dtype.kind not in "iu":
            raise UsageError(
                f"token ids must be integers [b, {context}], got "
                f"{ids.dtype}{list(ids.shape)}: use clip.tokenize(texts)"
            )
        if (
            not isinstance(ids, Tracer)
            and ids.size
            and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
        ):
            raise UsageError(
                f"token ids must be from 0 to {vocabulary - 1} for this CLIP, got "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        return ids


def _texts(texts: Any) -> list[str]:
    several = (
        [texts]
        if isinstance(texts, str)
        else list(texts)
        if isinstance(texts, (list, tuple))
        else None
    )
    if several is None or not all(isinstance(text, str) for text in several):
        raise UsageError(f"texts must be a string or a list of strings, got {type(texts).__name__}")
    for text in several:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(
                f"{text[:60]!r} is no text: it holds half of a surrogate pair, which no file can "
                "hold"
            )
    return several


def _array(pixels: Any) -> AnyArray:
    """Images as one array; a list of images of one size is stacked."""
    if isinstance(pixels, AnyArray):
        return pixels
    try:
        return np.asarray(pixels)
    except (ValueError, TypeError):
        raise UsageError(
            "pixels must be one array [b, h, w, 3], got images of several sizes: use "
            "clip.preprocess(photos)"
        ) from None


def _in_chunks(
    body: Callable[[Any, Any], jax.Array], network: CLIPNetwork, rows: AnyArray, batch: int
) -> jax.Array:
    """`body` on at most `batch` rows per device at a time; a traced array is left whole."""
    if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
        raise UsageError(f"batch must be an integer of at least 1, got {batch!r}")
    n = rows.shape[0]
    if n <= batch or isinstance(rows, Tracer):
        return body(network, jnp.asarray(rows))
    here = parallel.local_devices()
    batch, needed = plan.rows_at_once(body, (None, 0), (network, rows), here[0].platform, batch)
    here = plan.devices_at_once(needed + plan.size_of(network), here[: -(-n // batch)])
    everywhere = parallel.replicate(network, here)
    run, step = parallel.map_devices(body, (None, 0), 0, devices=here), batch * len(here)

    def begun() -> Iterator[tuple[int, jax.Array]]:
        for at in range(0, n, step):
            chunk = np.asarray(rows[at : at + step])
            yield len(chunk), run(everywhere, parallel.shard(chunk, len(here), batch)[0])

    found = [parallel.unshard(np.asarray(out), size) for size, out in one_ahead(begun())]
    return jnp.concatenate(found)


@jax.jit
def _encode_image(network: CLIPNetwork, pixels: jax.Array) -> jax.Array:
    return network.visual(pixels)


@jax.jit
def _encode_text(network: CLIPNetwork, ids: jax.Array) -> jax.Array:
    return network.text(ids)


@jax.jit
def _dense(network: CLIPNetwork, pixels: jax.Array) -> jax.Array:
    return network.visual.dense(pixels)


def fingerprint(model: CLIP) -> Float[np.ndarray, "2 d"]:
    """Unit embeddings of an image of noise and of random tokens: they name the network."""
    size, text = model.config.vision.image_size, model.config.text
    rng = np.random.RandomState(0)
    pixels = rng.randn(1, size, size, 3).astype(np.float32)
    ids = rng.randint(0, text.vocabulary, (1, text.context)).astype(np.int32)
    ids[0, -1] = text.vocabulary - 1 if text.end is None else text.end
    embedded = np.concatenate([model.encode_image(pixels), model.encode_text(ids)])
    return embedded / np.linalg.norm(embedded, axis=1, keepdims=True)


def load_clip(name_or_path: str | os.PathLike = DEFAULT) -> CLIP:
    """A CLIP by name or path; nothing that a file carries is executed.

    name_or_path: a weights folder; a Hugging Face folder or hub name
        ("openai/clip-vit-base-patch32", downloaded, else from the hub's cache); OpenAI's .pt by
        path, or by name ("ViT-B/32") once it is in ported_weights/; an open_clip file beside its
        open_clip_config.json. Single files are converted once and kept. Raises UsageError for a
        name that is unknown or not here, SisError for damaged or foreign weights.
    """
    place = clip_names.find(name_or_path)
    stored = _read(place)
    for note in stored.notes:
        _tell(f"{stored.info.name}: {note}")
    network = clip.build_network(stored.config, stored.arrays, str(place), stored.info)
    return CLIP(network, stored.preprocessing, stored.tokenizer, stored.info)


def _read(place: Path) -> clip_files.Stored:
    """From a folder of ours, a foreign one, or a file (converted once and kept)."""
    if files.is_folder(place):
        return clip_files.read_folder(place)
    file = clip_files.weights_file(place)
    if not file.is_file():
        raise UsageError(
            f"{place} holds no CLIP: expected one of {', '.join(shards.WEIGHTS)} in it"
        )
    if shards.is_standard(file.name):  # a Hugging Face folder is read about as fast as a copy of it
        return clip_files.read_foreign(file)

    try:
        return clip_files.read_folder(convert.cached(file, "clip"))
    except CannotWrite:
        return clip_files.read_foreign(file)


@lru_cache(maxsize=64)
def _tell(text: str) -> None:
    """Once per text and process."""
    say(text)
