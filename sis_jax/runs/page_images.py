"""Images as data URIs, small enough for a page that is one file."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import numpy as np


def data_uri(image: Any, kind: str, **options: Any) -> str:
    """A PIL image as "data:image/KIND;base64,..."; options as its `save` takes them."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def jpeg_uri(pixels: np.ndarray, quality: int = 88) -> str:
    """Pixels uint8[h, w, 3] as a JPEG."""
    return data_uri(Image.fromarray(pixels), "JPEG", quality=quality)


def reduced(image: Any, width: int, budget: float) -> dict[str, Any]:
    """{"uri", "width"} of a PIL image, reduced until it fits its share of the page, in bytes."""
    width = min(image.width, width)
    while True:
        smaller = image.resize(
            (width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS
        )
        uri = data_uri(smaller, "JPEG", quality=86)
        if len(uri) <= budget or width <= 200:
            return {"uri": uri, "width": width}
        width = int(width * 0.8)
