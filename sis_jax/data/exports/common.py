"""What several formats share: the streams they take, classes with the background, images that must
be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sis_jax.data.items import Item
from sis_jax.types import UsageError

Splits = Mapping[str, Iterable[Item]]
Classes = Sequence[Mapping[str, Any]]


def with_background(classes: Classes) -> dict[int, str]:
    """Class id -> name in order, the background included."""
    return dict(sorted({0: "background", **{c["id"]: c["name"] for c in classes}}.items()))


def need_image(item: Item, kind: str) -> None:
    """Raise UsageError where the format cannot do without the picture."""
    if item.image is None:
        raise UsageError(
            f"the format {kind} keeps pictures with their masks, and {item.name} has only a mask; "
            "use coco, voc, yolo or npz"
        )
