"""Hugging Face `imagefolder`."""

from __future__ import annotations

import json
from pathlib import Path

from sis_jax.data.exports.common import Classes, Splits, need_image, with_background, yaml_text
from sis_jax.data.exports.items import ahead, pngs
from sis_jax.data.files import plain


def save(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """Hugging Face `imagefolder`: <split>/images, <split>/masks and metadata.jsonl."""
    for split, stream in splits.items():
        place = folder / split
        for kind in ("images", "masks"):
            (place / kind).mkdir(parents=True)
        with open(place / "metadata.jsonl", "w", encoding="utf-8") as rows:
            for item, (image, mask) in ahead(pngs, stream):
                need_image(item, "hf")
                file = f"{item.name}.png"
                (place / "images" / file).write_bytes(image or b"")
                (place / "masks" / file).write_bytes(mask)
                row = {
                    "file_name": f"images/{file}",
                    "mask_file_name": f"masks/{file}",
                    "seed": item.seed,
                    "confidence": item.confidence,
                }
                rows.write(json.dumps(plain(row)) + "\n")
    names = [f"  - {yaml_text(name)}" for name in with_background(classes).values()]
    head = (
        "---\ntask_categories:\n- image-segmentation\nclasses:\n" + "\n".join(names) + "\n---\n\n"
    )
    (folder / "README.md").write_text(
        (card if card.startswith("---\n") else head + card).rstrip() + "\n", encoding="utf-8"
    )
    return (
        "Load it with `datasets.load_dataset(FOLDER)`; a mask pixel is the class id. Nothing is "
        "lost."
    )
