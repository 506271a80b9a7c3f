"""Items of an export: one image's name, pixels and mask, checked; and PNGs made a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from sis_jax.data import draw
from sis_jax.data import names as file_names
from sis_jax.data.threads import in_threads
from sis_jax.types import SisError


@dataclass(frozen=True)
class Item:
    """One image of an export. name: of its files, without suffix. image: None where only the mask
    is known. scores: per class id, 0..1. place: the name as given, a path below the photos' folder.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"] | None
    mask: UInt8[np.ndarray, "h w"]
    scores: Float[np.ndarray, "h w c"] | None = None
    seed: int | None = None
    confidence: float | None = None
    place: str = ""


def items(examples: Iterable[Any], classes: Sequence[Mapping[str, Any]]) -> Iterator[Item]:
    """Examples, or tuples (name, image or None, mask[, scores]), as checked `Item`s, streamed.

    Raises SisError, naming the image, for a misfitting shape or class id, and for a name that
    occurs twice.
    """
    known = np.zeros(256, bool)
    known[[0, draw.IGNORE, *(c["id"] for c in classes)]] = True
    seen: dict[str, str] = {}
    for example in examples:
        item = _item(example, known)
        key = file_names.key(item.name)
        if key in seen:
            raise SisError(
                f"two images are called {item.name!r} ({seen[key]} and {item.place}); rename one "
                "of them"
            )
        seen[key] = item.place
        yield item


def _item(example: Any, known: np.ndarray) -> Item:
    if isinstance(example, tuple):
        name, image, mask, scores = (*example, None)[:4]
        seed = confidence = None
    else:
        name = example.name
        image = example.image
        mask = example.mask
        scores = getattr(example, "scores", None)
        seed, confidence = getattr(example, "seed", None), getattr(example, "confidence", None)
    flat, place = file_names.flat(str(name)), str(name).replace("\\", "/").strip("/")
    why = file_names.problem(place)
    if why and image is None:
        raise SisError(f"an image cannot be called {str(name)[:80]!a}: {why}")
    image, scores = (None if x is None else np.asarray(x) for x in (image, scores))
    mask = np.asarray(mask)
    _check(flat, image, mask, scores, known)
    return Item(flat, image, mask, scores, seed, confidence, place)


def _check(
    name: str,
    image: np.ndarray | None,
    mask: np.ndarray,
    scores: np.ndarray | None,
    known: np.ndarray,
) -> None:
    if not name or name.startswith("."):
        raise SisError(f"an image cannot be called {name!r}")
    if mask.dtype != np.uint8 or mask.ndim != 2 or not mask.size:
        raise SisError(f"the mask of {name} is {mask.dtype}{list(mask.shape)}, expected uint8[h w]")
    if image is not None and (image.dtype != np.uint8 or image.shape != (*mask.shape, 3)):
        raise SisError(
            f"the image of {name} is {image.dtype}{list(image.shape)}, expected "
            f"uint8{[*mask.shape, 3]} like its mask"
        )
    if scores is not None and (scores.ndim != 3 or scores.shape[:2] != mask.shape):
        raise SisError(
            f"the scores of {name} are {list(scores.shape)}, expected {[*mask.shape, 'classes']}"
        )
    strange = np.flatnonzero(np.bincount(mask.ravel(), minlength=256).astype(bool) & ~known)
    if strange.size:
        raise SisError(
            f"the mask of {name} holds class id {strange[0]}, which is not among the classes"
        )


def ahead(work: Callable[[Item], Any], stream: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
    """(item, work(item)) in order, with a few at work in threads."""
    return in_threads(lambda item: (item, work(item)), stream, threads=4)


def pngs(item: Item) -> tuple[bytes | None, bytes]:
    """(image, mask) as PNG files; the mask is an 8-bit palette image, pixel = class id."""
    return image_png(item), draw.png(draw.palette_png(item.mask))


def grey_pngs(item: Item) -> tuple[bytes | None, bytes]:
    """Like `pngs`, the mask as a grey image: OpenCV, by which TFDS decodes, loses a palette."""
    return image_png(item), draw.png(item.mask)


def image_png(item: Item) -> bytes | None:
    """The image alone as a PNG file, for formats that keep the mask in another way."""
    return None if item.image is None else draw.png(item.image)
