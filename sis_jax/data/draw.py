"""Images of results with NumPy and Pillow only: class colours, overlays, labelled grids.

Colours are fixed per class id. The first eight are those of Okabe and Ito; the others were chosen
one after the other, each as far as possible from all before it for a normal, a protan, a deutan and
a tritan viewer at once (OKLab distance, dichromacy after Machado 2009).
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from sis_jax.types import UsageError

IGNORE = 255
Real = float | int
_COLOURS = (
    "7a7a7a e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 690000 3c0087 000ff0 "
    "00e1a5 0f4b5a 8778ff 784b00 c3d2ff 691eb4 a5ffb4 3c695a 87b478 d22dd2 4b4b87 "
    "87003c a5d269 ff78d2 875a87 3c5aff 4b1e5a c3f0e1 ffb4d2 c31e3c f0783c 960f78"
)
_HEX = _COLOURS.split()
PAD = 4  # white pixels around an image of a sheet
CELL = 256  # pixels of the longer edge of an image in a sheet, at most
DISTINCT = len(_HEX) - 1  # classes before colours repeat in a lighter or darker shade


@lru_cache(maxsize=1)
def palette() -> UInt8[np.ndarray, "256 3"]:
    """The colour of every mask value: 0 grey, 1 to 32 well apart, then shades, 255 near black."""
    base = np.array([[int(h[i : i + 2], 16) for i in (0, 2, 4)] for h in _HEX], np.float64)
    table = np.empty((256, 3))
    table[: len(base)] = base
    for i in range(len(base), 256):
        turn, shade = (i - 1) // DISTINCT, base[1 + (i - 1) % DISTINCT]
        towards = 255.0 if turn % 2 else 0.0
        table[i] = shade + (towards - shade) * min(0.2 + 0.1 * turn, 0.7)
    table[IGNORE] = 20
    table = table.round().astype(np.uint8)
    table.flags.writeable = False  # shared by every caller
    return table


def colour(class_id: int) -> str:
    """The colour of a class as "#rrggbb"."""
    return "#" + palette()[class_id].tobytes().hex()


def colour_mask(mask: Integer[np.ndarray, "*n h w"]) -> UInt8[np.ndarray, "*n h w 3"]:
    """A mask (values 0 to 255) drawn in its class colours."""
    return palette()[_as_mask(mask)]


def overlay(
    image: UInt8[np.ndarray, "*n h w 3"], mask: Integer[np.ndarray, "*n h w"]
) -> UInt8[np.ndarray, "*n h w 3"]:
    """The photo tinted by class with a line where classes meet; background and ignored pixels
    stay.
    """
    image, mask = np.asarray(image), _as_mask(mask)
    if image.shape[:-1] != mask.shape:
        raise UsageError(
            f"an overlay needs a mask of the image's size, got image {image.shape} and mask "
            f"{mask.shape}"
        )
    tinted = image + 0.5 * (palette()[mask].astype(np.float32) - image)
    plain = (mask == 0) | (mask == IGNORE)
    out = np.where(plain[..., None], image, tinted)
    out = np.where(edges(mask)[..., None], 0.25 * out + 0.75 * 255, out)
    return out.round().astype(np.uint8)


def edges(mask: Integer[np.ndarray, "*n h w"]) -> np.ndarray:
    """Bool[*n h w], true where the pixel to the right or below belongs to another class."""
    mask = np.asarray(mask)
    found = np.zeros(mask.shape, bool)
    found[..., :, :-1] |= mask[..., :, :-1] != mask[..., :, 1:]
    found[..., :-1, :] |= mask[..., :-1, :] != mask[..., 1:, :]
    return found


def cells(images: UInt8[np.ndarray, "n h w *c"]) -> UInt8[np.ndarray, "n H W *c"]:
    """Images or masks as a sheet shows them: `reduced`, or enlarged to about 128 pixels."""
    images = reduced(images)
    zoom = max(1, 128 // images.shape[1])
    return images.repeat(zoom, 1).repeat(zoom, 2)


def reduced(images: UInt8[np.ndarray, "n h w *c"]) -> UInt8[np.ndarray, "n H W *c"]:
    """Images or masks with a longer edge of at most `CELL` pixels."""
    longest = max(images.shape[1:3])
    if longest <= CELL:
        return images
    height, width = (max(1, round(s * CELL / longest)) for s in images.shape[1:3])
    rule = Image.Resampling.NEAREST if images.ndim == 3 else Image.Resampling.BOX
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((width, height), rule)) for image in images]
    )


def grid(
    images: Sequence[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "n h w 3"],
    columns: int,
    pad: int = PAD,
    labels: Sequence[str] | None = None,
    font_size: int = 14,
) -> UInt8[np.ndarray, "H W 3"]:
    """Images of one size in rows of `columns`, on white, each with its label below."""
    images = [np.asarray(i) for i in images]
    if not images or columns < 1:
        raise UsageError(
            f"a grid needs one image and one column at least, got {len(images)} images and "
            f"{columns} columns"
        )
    if len({i.shape for i in images}) > 1:
        raise UsageError(
            f"a grid needs images of one size, got {sorted({i.shape for i in images})}"
        )
    if labels is not None and len(labels) != len(images):
        raise UsageError(
            f"a grid needs one label per image, got {len(labels)} labels for {len(images)} images"
        )
    h, w = images[0].shape[:2]
    columns, text = min(columns, len(images)), 0 if labels is None else font_size + 8
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (h + text + pad) + pad, columns * (w + pad) + pad, 3), 255, np.uint8)
    corners = [
        (pad + (i // columns) * (h + text + pad), pad + (i % columns) * (w + pad))
        for i in range(len(images))
    ]
    for (top, left), image in zip(corners, images):
        sheet[top : top + h, left : left + w] = image
    if labels is not None:
        _write(sheet, [(left, top + h + 3) for top, left in corners], labels, w, font_size)
    return sheet


def _write(
    sheet: np.ndarray,
    places: Sequence[tuple[int, int]],
    labels: Sequence[str],
    width: int,
    size: int,
) -> None:
    canvas, font = Image.fromarray(sheet), ImageFont.load_default(size)
    pen = ImageDraw.Draw(canvas)
    for (x, y), label in zip(places, labels):
        pen.text((x + 1, y), fit(label, width - 2, font), fill=(35, 35, 40), font=font)
    sheet[...] = np.asarray(canvas)


def fit(label: str, width: Real, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`label`, shortened with an ellipsis until it is at most `width` pixels wide."""
    if font.getlength(label) <= width:
        return label
    longer = range(1, len(label) + 1)
    kept = bisect_right(longer, width, key=lambda n: font.getlength(label[:n] + "…"))
    return label[:kept].rstrip() + "…" if kept else ""


def sample_grid(
    images: UInt8[np.ndarray, "n h w 3"],
    masks: Integer[np.ndarray, "n h w"],
    labels: Sequence[str] | None = None,
    finer: Integer[np.ndarray, "n h w"] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Three rows for n samples: image, parts, overlay; with `finer` masks two overlays."""
    images, masks = np.asarray(images), np.asarray(masks)
    if finer is None:
        cells = [*images, *colour_mask(masks), *overlay(images, masks)]
    else:
        cells = [*images, *overlay(images, masks), *overlay(images, finer)]
    if labels is None:
        return grid(cells, len(images))
    top = grid(cells[: 2 * len(images)], len(images))
    below = grid(cells[2 * len(images) :], len(images), labels=labels)
    return np.concatenate([top, below[PAD:]])


def palette_png(mask: Integer[np.ndarray, "h w"]) -> Image.Image:
    """The mask as an 8-bit palette image: the pixel is the class id."""
    mask = _as_mask(mask)
    if mask.ndim != 2:
        raise UsageError(f"a mask has height and width only, got shape {mask.shape}")
    image = Image.fromarray(mask)
    # Turns the grey image into a palette one, pixels unchanged
    image.putpalette(palette().ravel().tolist())
    return image


def png(image: Image.Image | UInt8[np.ndarray, "h w *c"], **options: Any) -> bytes:
    """One image as a PNG file; options: Pillow's."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def _as_mask(mask: Any) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype == np.uint8:
        return mask
    if mask.dtype.kind not in "iub" or (mask.size and not (mask.min() >= 0 and mask.max() <= 255)):
        raise UsageError(
            f"a mask holds integers from 0 to 255, got {mask.dtype} from {mask.min()} to "
            f"{mask.max()}"
        )
    return mask.astype(np.uint8)
