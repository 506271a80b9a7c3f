"""Common parts of several formats."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sis_jax.data.exports.items import Item
from sis_jax.data.names import printable
from sis_jax.types import UsageError

Splits = Mapping[str, Iterable[Item]]
Classes = Sequence[Mapping[str, Any]]


def with_background(classes: Classes) -> dict[int, str]:
    """Class id -> name in order, the background included."""
    return dict(sorted({0: "background", **{c["id"]: c["name"] for c in classes}}.items()))


def unique_names(names: Iterable[str], forbidden: str = "") -> list[str]:
    """Names on one line each, all different, without the `forbidden` characters."""
    made: list[str] = []
    for number, name in enumerate(names):
        clean = re.sub(f"[{re.escape(forbidden)}]", "_", printable(str(name))) if forbidden else ""
        clean = clean or printable(str(name)) or f"class {number}"
        while clean in made:
            clean += f" ({number})"
        made.append(clean)
    return made


def yaml_text(text: str) -> str:
    """A text as a quoted YAML scalar; characters that YAML does not take are escaped."""
    quoted = json.dumps(str(text), ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]",
        lambda match: f"\\u{ord(match[0]):04x}",
        quoted,
    )


def need_image(item: Item, kind: str) -> None:
    """Raise UsageError where the format cannot do without the image."""
    if item.image is None:
        raise UsageError(
            f"the format {kind} keeps images with their masks, and {item.name} has only a mask; "
            "use coco, voc, yolo or npz"
        )
