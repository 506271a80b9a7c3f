"""One mask image to class ids or grey values; an ambiguous image is refused, never guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sis_jax.data.decode import Unusable, because, open_image, orientation, read_file, upright
from sis_jax.types import SisError

_JPEG = 8  # how far the channels of a grey JPEG may differ
_ASPECT = 0.02  # a photo and its mask may differ in size, not in shape


def read_mask(source: bytes | Path | np.ndarray) -> UInt8[np.ndarray, "h w"]:
    """A mask image as its values, upright: palette index, grey value, or alpha of a single colour.

    Of equal channels the first counts. 16-bit images hold class ids or white is 65535,
    floating-point ones integers or 0..1. SisError, naming the mask, for everything else.
    """
    return read_shape(source)[0]


def read_shape(
    source: bytes | Path | np.ndarray, name: str = ""
) -> tuple[UInt8[np.ndarray, "h w"], bool]:
    """As `read_mask`, and whether the values are those of the alpha channel."""
    if isinstance(source, np.ndarray):
        return source, False
    name = name or str(source)
    try:
        image = open_image(read_file(source) if isinstance(source, Path) else source)
        deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        image.load()
    except Unusable as reason:
        raise SisError(f"the mask {name} cannot be read: {reason}") from None
    except Exception as error:
        raise SisError(f"the mask {name} cannot be read: {because(error)}") from None
    if deep and len(image.getbands()) > 1:
        raise SisError(
            f"the mask {name} has 16 bits per colour, of which 8 would be lost; save it with 8 "
            "bits, as a grey or palette PNG"
        )
    if image.format == "GIF":
        image = _grey_again(image)
    image = upright(image)
    values = np.array(image.convert("L") if image.mode == "1" else image)
    if values.ndim == 2:
        return _bytes(values, name), False
    if image.mode[-1] not in "Aa":
        return _one_channel(values, name), False
    return _with_alpha(values, name)


def _grey_again(image: Image.Image) -> Image.Image:
    """A grey image that was saved as GIF, which numbers its shades anew: the shade is the value."""
    shades = image.palette.colors if image.mode == "P" and image.palette else ((0, 1),)
    return image if any(np.ptp(shade[:3]) for shade in shades) else image.convert("L")


def _bytes(values: np.ndarray, name: str) -> UInt8[np.ndarray, "h w"]:
    """Grey of any depth as 8 bits, where that keeps its meaning."""
    if values.dtype == np.uint8:
        return values
    low, high = (float(f(values)) for f in (np.min, np.max)) if values.size else (0.0, 0.0)
    whole = bool(np.isfinite(values).all()) and bool((values == np.floor(values)).all())
    if whole and low >= 0 and high <= 255:
        return values.astype(np.uint8)
    if whole and low >= 0 and high == 65535 and not (values % 257).any():
        return (values // 257).astype(np.uint8)
    if values.dtype.kind == "f" and low >= 0 and high <= 1 and np.isfinite(values).all():
        return np.round(255 * values).astype(np.uint8)
    raise SisError(
        f"the mask {name} has values up to {high:g}, expected class ids from 0 to 255"
        + ("" if whole else ", or grey from 0 to 1")
    )


def _one_channel(values: np.ndarray, name: str) -> UInt8[np.ndarray, "h w"]:
    colours = values.astype(np.int16)
    if np.ptp(colours, axis=2).max(initial=0) > _JPEG:
        raise SisError(
            f"the mask {name} is a colour image; expected class ids in a palette or grey PNG, or "
            "black and white"
        )
    return _bytes(values[..., 0], name)


def _with_alpha(values: np.ndarray, name: str) -> tuple[UInt8[np.ndarray, "h w"], bool]:
    """The channel that holds the shape; SisError where colours and alpha hold two."""
    colours, alpha = values[..., :-1], values[..., -1]
    if alpha.min(initial=255) == 255:
        return _one_channel(colours, name), False
    seen = colours[alpha > 0]
    hidden = colours[alpha == 0]
    if (seen == seen[:1]).all() and (len(seen) or (hidden == hidden[:1]).all()):
        if len(seen) and seen[0].any() and not hidden.any() and _hard(alpha):
            return _one_channel(colours, name), False  # both hold the same shape
        return alpha, True
    if hidden.any() or not _hard(alpha):
        raise SisError(
            f"the mask {name} has a shape in its alpha channel and another in its colours; save it "
            "without transparency"
        )
    return _one_channel(colours, name), False


def _hard(alpha: np.ndarray) -> bool:
    return bool(((alpha == 0) | (alpha == 255)).all())


def turned_like(
    mask: UInt8[np.ndarray, "h w"], photo: bytes | Path | np.ndarray, shape: tuple[int, int]
) -> UInt8[np.ndarray, "_ _"]:
    """The mask turned as its photo (of this shape) is seen, where that was turned by 90 degrees."""
    if isinstance(photo, np.ndarray) or alike(mask.shape, shape):
        return mask
    if not alike(mask.shape[::-1], shape):
        return mask
    image = open_image(read_file(photo) if isinstance(photo, Path) else photo)
    way = orientation(image)
    return np.ascontiguousarray(_TURNS[way](mask)) if way in _TURNS else mask


def alike(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two images of these (height, width) can be of one shape, whatever their sizes."""
    return abs(a[1] * b[0] / (a[0] * b[1]) - 1) <= _ASPECT


_TURNS = {
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a),
}
