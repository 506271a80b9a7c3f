"""One encoded image to pixels: the only place where photos and masks are decoded."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

MAX_BYTES = 256 * 2**20  # one encoded image; larger ones are refused
MAX_PIXELS = 200_000_000  # one decoded image
# Pillow's other readers can start Ghostscript or read vector and document formats: a photo is none
# of those.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_ORIENTATION = 0x0112  # the tag of EXIF

Crop = Literal["center", "pad", "none"]
Fit = Literal["crop", "pad", "stretch"]  # the same in the words of a command line
CROPS: dict[Fit, Crop] = {"crop": "center", "pad": "pad", "stretch": "none"}


class Unusable(Exception):
    """Why one image is skipped, in a few words."""


def too_large(size: int) -> Unusable:
    """Of an encoded image, in bytes."""
    return Unusable(f"{size / 2**20:,.0f} MB, more than {MAX_BYTES // 2**20} MB")


def read_file(path: Path) -> bytes:
    """The bytes of an image's file; `Unusable` for none, too many, or no plain file."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise Unusable("not a plain file")
            data = file.read(MAX_BYTES + 1) if about.st_size <= MAX_BYTES else b""
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from None
    if about.st_size == 0:
        raise Unusable("the file is empty")
    if max(about.st_size, len(data)) > MAX_BYTES:
        raise too_large(max(about.st_size, len(data)))
    return data


def open_image(data: bytes | UInt8[np.ndarray, "_ _ _"]) -> Image.Image:
    """An image whose header was read and whose size is bounded; `Unusable` with the reason."""
    try:
        image = (
            Image.fromarray(data)
            if isinstance(data, np.ndarray)
            else Image.open(io.BytesIO(data), formats=FORMATS)
        )
    except Image.UnidentifiedImageError:
        raise Unusable("not an image that can be read; save it as JPEG or PNG") from None
    except Exception as error:
        raise because(error) from None
    if image.width * image.height > MAX_PIXELS:
        raise Unusable(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
    return image


def load_image(path: Path) -> Image.Image:
    """The decoded image in a file, whoever wrote it; `Unusable` with the reason."""
    image = open_image(read_file(path))
    try:
        image.load()
    except Exception as error:
        raise because(error) from None
    return image


def because(error: Exception) -> Unusable:
    """A decoder's error in one line: hostile files break decoders in many ways."""
    return Unusable(" ".join(str(error).split())[:120] or type(error).__name__)


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or the block is broken."""
    with suppress(OSError, ValueError, TypeError, KeyError, SyntaxError, ArithmeticError):
        found = image.getexif().get(_ORIENTATION)
        return found if isinstance(found, int) and 2 <= found <= 8 else 1
    return 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF block states."""
    with suppress(OSError, ValueError, TypeError, KeyError, SyntaxError, ArithmeticError):
        return ImageOps.exif_transpose(image)
    return image  # a broken EXIF block has no orientation; the pixels are fine


def decode(
    data: bytes | UInt8[np.ndarray, "_ _ 3"],
    resolution: int | None,
    *,
    crop: Crop = "center",
    min_size: int = 0,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """One image as uint8[r r 3] (None: its own size), as in `Photos.open`; raises `Unusable`."""
    image = open_image(data)
    short = min(image.size)
    if short < min_size:
        raise Unusable(f"{image.width}x{image.height} is smaller than {min_size}")
    try:
        if resolution is not None and short > 4 * resolution and image.format in ("JPEG", "MPO"):
            # Decodes fewer DCT coefficients: three times faster for a camera's photo, and still
            # twice as fine as needed.
            image.draft(
                None,
                (2 * resolution * image.width // short, 2 * resolution * image.height // short),
            )
        image.load()
        photo = _to_rgb(upright(image))
        return np.asarray(photo) if resolution is None else _fit(photo, resolution, crop)
    except Unusable:
        raise
    except Exception as error:
        raise because(error) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which old files announce as 32-bit
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unusable("32-bit pixels, expected 8 or 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Unusable("floating-point pixels, expected 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def padded(photo: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """The photo in the middle of a square, its border pixels repeated outwards."""
    (top, left), (h, w) = pad_before(photo.shape[:2]), photo.shape[:2]
    s = max(h, w)
    return np.pad(photo, ((top, s - h - top), (left, s - w - left), (0, 0)), mode="edge")


def pad_before(shape: Sequence[int]) -> tuple[int, int]:
    """Rows above and columns left of a photo [h w] in its padded square."""
    h, w = shape
    return (max(h, w) - h) // 2, (max(h, w) - w) // 2


def _fit(image: Image.Image, resolution: int, crop: str) -> UInt8[np.ndarray, "r r 3"]:
    if crop == "pad":
        image = Image.fromarray(padded(np.asarray(image)))
    if crop == "center":
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge))
    if image.size != (resolution, resolution):
        whole = image.width % resolution == 0 and image.height % resolution == 0
        image = image.resize(
            (resolution, resolution), Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
        )
    return np.asarray(image)
