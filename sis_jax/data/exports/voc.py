"""PASCAL VOC: files as they are stored, with palette masks."""

from __future__ import annotations

from pathlib import Path

from sis_jax.data import draw
from sis_jax.data.exports.common import Classes, Splits, unique_names, with_background
from sis_jax.data.exports.items import ahead, pngs


def save(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """PASCAL VOC: JPEGImages/ (PNG), SegmentationClass/ (palette PNG),
    ImageSets/Segmentation/<split>.txt.

    With more than one split, its name leads the file names. labelmap.txt holds name:r,g,b lines.
    """
    for kind in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / kind).mkdir(parents=True)
    for split, stream in splits.items():
        prefix = f"{split}_" if len(splits) > 1 else ""
        with open(
            folder / "ImageSets" / "Segmentation" / f"{split}.txt", "w", encoding="utf-8"
        ) as names:
            for item, (image, mask) in ahead(pngs, stream):
                name = prefix + item.name
                if image is not None:
                    (folder / "JPEGImages" / f"{name}.png").write_bytes(image)
                (folder / "SegmentationClass" / f"{name}.png").write_bytes(mask)
                names.write(name + "\n")
    colours = draw.palette()
    known = with_background(classes)
    labels = unique_names(known.values(), forbidden=":#")
    rows = [f"{name}:{','.join(map(str, colours[i]))}::" for i, name in zip(known, labels)]
    (folder / "labelmap.txt").write_text(
        "\n".join(["# label:color_rgb:parts:actions", *rows]) + "\n", encoding="utf-8"
    )
    changed = [f"{known[i]!a} is {name!a}" for i, name in zip(known, labels) if known[i] != name]
    lost = f"In labelmap.txt {', '.join(changed)}." if changed else "Nothing is lost."
    return f"Images are PNG, although the folder is called JPEGImages. {lost}"
