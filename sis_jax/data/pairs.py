"""Images with masks in memory, and an endless shuffled stream of batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sis_jax.data import draw
from sis_jax.data.threads import in_threads
from sis_jax.ops.progress import progress
from sis_jax.ops.selection import frame
from sis_jax.types import SisError

IGNORE = draw.IGNORE
_ONE_SIZE = "a student is trained on images of one size"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images uint8[n h w 3], masks uint8[n h w] of channels (255 = ignore), confidence, 255 = 1."""

    images: UInt8[np.ndarray, "n h w 3"]
    masks: UInt8[np.ndarray, "n h w"]
    certainty: UInt8[np.ndarray, "n h w"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | np.ndarray) -> Pairs:
        return Pairs(self.images[rows], self.masks[rows], self.certainty[rows])

    @classmethod
    def read(cls, examples: Sequence[Any], ids: Sequence[int], size: int, source: str) -> Pairs:
        """Examples of one size, at most `size` pixels; ids: the class id of each channel."""
        table, held = channel_table(ids), []

        def one(i: int) -> tuple[np.ndarray, ...]:
            example = examples[i]
            image, mask, confidence = _reduced(example, size)
            channels = table[mask]
            strange = mask[(channels == IGNORE) & (mask != IGNORE)]
            if len(strange):
                raise SisError(
                    f"the mask of {example.name} in {source} holds class id {int(strange[0])}, "
                    "which is not in classes.json"
                )
            return image, channels, confidence

        with progress(len(examples), f"reading {source}", "img") as bar:
            for i, row in enumerate(in_threads(one, range(len(examples)))):
                # One array from the start: stacking a list would take twice the memory.
                held = held or [np.empty((len(examples), *a.shape), np.uint8) for a in row]
                if row[0].shape != held[0].shape[1:]:
                    raise SisError(f"the images in {source} differ in size: {_ONE_SIZE}")
                for array, a in zip(held, row):
                    array[i] = a
                bar.update(1)
        if not held:
            raise SisError(f"there are no images in {source}: {_ONE_SIZE}")
        return cls(*held)

    def shares(self, classes: int) -> Float[np.ndarray, "{classes}"]:
        """Of the pixels that are labelled."""
        counts = np.bincount(self.masks.ravel(), minlength=256)[:classes]
        return counts / max(counts.sum(), 1)

    def without_odd_ones(self, trim: float) -> Pairs:
        """Without the share `trim` of images on whose frame the least background (channel 0) is.

        A mask without background is the commonest large mistake of a teacher that clusters.
        """
        if not 0 < trim < 1 or not (self.masks == 0).any():
            return self
        share = (self.masks[:, frame(*self.masks.shape[1:])] == 0).mean(1)
        count = max(1, round(len(self) * (1 - trim)))
        return self[np.sort(np.argsort(-share, kind="stable")[:count])]

    def batches(
        self, batch: int, seed: int = 0, start: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """An endless stream of permutations; batch t depends on (seed, t) alone."""
        for _, chosen in shuffled(len(self), batch, (seed, 5), start):
            yield self.images[chosen], self.masks[chosen], self.certainty[chosen]


def shuffled(
    n: int, batch: int, seed: tuple[int, int], start: int
) -> Iterator[tuple[int, np.ndarray]]:
    """An endless stream of (step, rows): each epoch a fresh permutation, a batch may span two.

    seed: the user's, and the number of the stream.
    """
    order = lru_cache(maxsize=4)(lambda epoch: np.random.default_rng([*seed, epoch]).permutation(n))
    for step in itertools.count(start):
        at = np.arange(step * batch, (step + 1) * batch)
        epochs = range(at[0] // n, at[-1] // n + 1)
        yield step, np.concatenate([order(e)[at[at // n == e] % n] for e in epochs])


def labelled(
    stream: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], ids: Sequence[int]
) -> Pairs:
    """From batches (images uint8, masks of class ids, confidence 0..1), as a teacher gives them."""
    table = channel_table(ids)
    images, masks, confidence = (np.concatenate(parts) for parts in zip(*stream))
    return Pairs(images, table[masks], _grey(confidence))


def channel_table(ids: Sequence[int]) -> UInt8[np.ndarray, "256"]:
    """Class id -> channel; everything else is ignored."""
    table = np.full(256, IGNORE, np.uint8)
    table[list(ids)] = np.arange(len(ids), dtype=np.uint8)
    return table


def _grey(certainty: Float[np.ndarray, "*n h w"]) -> UInt8[np.ndarray, "*n h w"]:
    return np.round(255 * np.clip(certainty, 0, 1)).astype(np.uint8)


def _reduced(example: Any, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image, mask, confidence) with the shorter edge at most `size` pixels."""
    image, mask = example.image, example.mask
    confidence = (
        np.full(mask.shape, 255, np.uint8)
        if example.certainty is None
        else _grey(example.certainty)
    )
    short = min(mask.shape)
    if short <= size:
        return image, mask, confidence
    height, width = (max(1, round(s * size / short)) for s in mask.shape)
    area, nearest = Image.Resampling.BOX, Image.Resampling.NEAREST
    shrunk = (
        np.asarray(Image.fromarray(a).resize((width, height), rule))
        for a, rule in ((image, area), (mask, nearest), (confidence, nearest))
    )
    return tuple(shrunk)  # type: ignore[return-value]
