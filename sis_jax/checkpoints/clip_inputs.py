"""Inputs of CLIP: photos to pixels, texts to tokens, both as the published code does it."""

from __future__ import annotations

import gzip
import html
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from sis_jax.data.files import parse_json
from sis_jax.types import SisError, UsageError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

VOCABULARY, MERGES = "vocab.json", "merges.txt"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_SHIPPED = "clip_vocab/bpe_simple_vocab_16e6.txt.gz"
_SHIPPED_SIZE = 49408
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Preprocessing:
    """Photos to pixels: shorter edge to `resize`, centred square of `size`, (x / 255 - mean) / std.

    dense: shorter edge in pixels for dense features; 0 is twice `size`.
    """

    size: int
    resize: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    dense: int = 0

    def __call__(self, photos: Any) -> Float[np.ndarray, "b s s 3"]:
        """One photo, a batch or a sequence: uint8[h w 3] RGB or Pillow; UsageError for others."""
        if isinstance(photos, (list, tuple)):
            several = list(photos)
        else:
            several = (
                [photos]
                if hasattr(photos, "convert") or np.ndim(photos) != 4
                else list(np.asarray(photos))
            )
        if not several:
            return np.zeros((0, self.size, self.size, 3), np.float32)
        return np.stack([self._one(photo) for photo in several])

    def _one(self, photo: Any) -> Float[np.ndarray, "s s 3"]:
        image = _image(photo)
        short = min(image.size)
        size = tuple(
            self.resize if edge == short else int(self.resize * edge / short) for edge in image.size
        )
        # Torchvision's rule, half to even
        left, top = (round((edge - self.size) / 2) for edge in size)
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC).crop(
            (left, top, left + self.size, top + self.size)
        )
        pixels = np.asarray(image, np.float32) / np.float32(255)
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def _image(photo: Any) -> Image.Image:
    """A photo as a Pillow image in RGB."""
    if isinstance(photo, Image.Image):
        return photo.convert("RGB")
    array = np.asarray(photo)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise UsageError(
            "a photo must be uint8[h, w, 3] (RGB, 0 to 255) or a Pillow image, got "
            f"{array.dtype}{list(array.shape)}; "
            f"images in [-1, 1] become photos by sis_jax.types.to_uint8"
        )
    return Image.fromarray(array)


@dataclass(frozen=True)
class Tokenizer:
    """Texts to ids. folder: of vocab.json and merges.txt; None is CLIP's own vocabulary.

    context: tokens per text, start and end included. vocabulary: tokens of the network. openai: as
        OpenAI's code (undoes HTML escapes, pads with 0), else as transformers (pads with the end
        token).
    """

    context: int
    vocabulary: int
    folder: str | None = None
    openai: bool = True

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "b n"], tuple[str, ...]]:
        """Ids int32[b context], and the texts that were cut."""
        tokenizer = self._tokenizer()
        clean = (
            [html.unescape(html.unescape(text)).strip() for text in texts]
            if self.openai
            else list(texts)
        )
        found: list[list[int]] = [tokenizer(text)["input_ids"] for text in clean]
        end = tokenizer.convert_tokens_to_ids(_END)
        ids = np.full((len(found), self.context), 0 if self.openai else end, np.int32)
        for row, tokens in zip(ids, found):
            kept = (
                tokens if len(tokens) <= self.context else [*tokens[: self.context - 1], tokens[-1]]
            )
            row[: len(kept)] = kept
        if ids.size and ids.max() >= self.vocabulary:
            raise SisError(
                f"the vocabulary has the id {ids.max()}, but the network knows {self.vocabulary} "
                "tokens: they do not belong together"
            )
        return ids, tuple(text for text, tokens in zip(texts, found) if len(tokens) > self.context)

    def strange(self, texts: Sequence[str]) -> tuple[str, ...]:
        """Words that a small vocabulary does not hold, and so spells in letters."""
        if self.folder is None or self.vocabulary >= _SHIPPED_SIZE // 2:
            return ()
        tokenizer, found = self._tokenizer(), []
        for word in dict.fromkeys(re.findall(r"[^\W_]+", " ".join(texts).lower())):
            pieces = tokenizer.convert_ids_to_tokens(tokenizer(word)["input_ids"])[1:-1]
            if not re.fullmatch("[a-z]", word) and any(
                len(piece.removesuffix("</w>")) == 1 for piece in pieces
            ):
                found.append(word)
        return tuple(found)

    @property
    def has_vocabulary(self) -> bool:
        """Whether texts can become tokens."""
        return self.folder is not None or self.vocabulary == _SHIPPED_SIZE

    def check(self) -> None:
        """SisError where the vocabulary is damaged or has ids that the network does not know."""
        if self.folder is None:
            return
        ids, _ = read_vocabulary(Path(self.folder))
        if max(ids.values()) >= self.vocabulary:
            raise SisError(
                f"{Path(self.folder) / VOCABULARY} has the id {max(ids.values())}, but the network "
                f"knows {self.vocabulary} tokens: they do not belong together"
            )

    def _tokenizer(self) -> CLIPTokenizer:
        if not self.has_vocabulary:
            raise UsageError(
                f"this CLIP knows {self.vocabulary} tokens and came without {VOCABULARY} and "
                f"{MERGES} (CLIP's own vocabulary has {_SHIPPED_SIZE}): "
                f"put both beside its weights, or give token ids"
            )
        return _tokenizer(self.folder)


@lru_cache(maxsize=4)
def _tokenizer(folder: str | None) -> CLIPTokenizer:
    vocabulary, pairs = shipped_vocabulary() if folder is None else read_vocabulary(Path(folder))
    merges: Any = pairs  # the library takes pairs, but declares strings
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"  # else it warns at import that torch is missing, which is not needed
    try:
        from transformers import CLIPTokenizer  # late: slow to import, only for text
    finally:
        os.environ.pop(quiet) if before is None else os.environ.__setitem__(quiet, before)
    # Long texts are cut here, not there: the library would warn without naming them.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=10**9)


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the pairs joined in order, from a folder; SisError where it is damaged."""
    try:
        vocabulary = parse_json((folder / VOCABULARY).read_text("utf-8"))
        merges = merges_of((folder / MERGES).read_text("utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise SisError(f"the vocabulary in {folder} cannot be read: {error}") from None
    whole = isinstance(vocabulary, dict) and all(
        type(v) is int and 0 <= v < 1 << 24 for v in vocabulary.values()
    )
    if (
        not whole
        or not {_START, _END} <= vocabulary.keys()
        or not all(a in vocabulary and b in vocabulary and a + b in vocabulary for a, b in merges)
    ):
        raise SisError(
            f"{folder / VOCABULARY} and {MERGES} are no vocabulary of CLIP: download both again"
        )
    return vocabulary, merges


def merges_of(lines: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of a merges.txt; the first line is its version."""
    pairs = [
        tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")
    ]
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError("a line of merges.txt is no pair of tokens")
    return [(pair[0], pair[1]) for pair in pairs]


def shipped_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's own: 256 bytes, the same as ends of words, 48894 joined pairs, start and end."""
    packed = resources.files("sis_jax.checkpoints").joinpath(_SHIPPED).read_bytes()
    merges = merges_of(
        gzip.decompress(packed).decode("utf-8").splitlines()[1 : _SHIPPED_SIZE - 2 * 256 - 2 + 1]
    )
    letters = byte_letters()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(a + b for a, b in merges),
        _START,
        _END,
    ]
    return {token: i for i, token in enumerate(tokens)}, merges


def byte_letters() -> list[str]:
    """A visible letter for each byte, in the vocabulary's order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def preprocessing_of(fields: Mapping[str, Any]) -> Preprocessing:
    """From the fields in a `config.json` of ours; SisError where they are no such thing."""
    try:
        size, resize, dense = fields["size"], fields["resize"], fields.get("dense", 0)
        mean, std = ([float(v) for v in fields[key]] for key in ("mean", "std"))
        if not (
            type(size) is int
            and type(resize) is int
            and type(dense) is int
            and 0 <= dense < 1 << 16
            and 0 < size <= resize < 1 << 16
            and len(mean) == len(std) == 3
        ):
            raise ValueError
        if not (all(map(math.isfinite, mean + std)) and min(std) > 0):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise SisError(
            "the sizes or colours of the preprocessing are damaged: convert the checkpoint again"
        ) from None
    return Preprocessing(size, resize, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), dense)
