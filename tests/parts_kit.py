"""Parts of a generator that does not exist, in one level or two, and runs that hold them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from fakes import configured

from sis_jax.data import draw
from sis_jax.data.part_names import finer_classes
from sis_jax.data.parts import Parts, classes_from
from sis_jax.runs.run import RunFolder
from sis_jax.types import Info

FACTS = {"border_share": 0.1, "agreement": 0.9, "confidence": 0.4}


def quarters() -> Parts:
    """Background, and parts 1 to 4, the clusters 1 to 4: a quarter of the images each."""
    clusters = [{"id": i, "share": 0.5 - 0.1 * i, "background": i == 0} | FACTS for i in range(5)]
    masks = np.zeros((2, 32, 32), np.uint8)
    for i, (y, x) in enumerate(((4, 4), (4, 16), (16, 4), (16, 16)), 1):
        masks[:, y : y + 12, x : x + 12] = i
    return Parts(
        method="segmentation_in_style",
        settings={"k": 5},
        arrays={"centers": np.zeros((5, 2), np.float32)},
        classes=classes_from(clusters, True),
        clusters=tuple(c | {"class_id": c["id"]} for c in clusters),
        background={"found": True, "why": "it is"},
        generator=Info("tiny", "none needed"),
        samples=draw.colour_mask(masks),
        masks=masks,
        seeds=(0, 1),
        confidence=(0.5, 0.4),
    )


def two_levels() -> Parts:
    """`quarters`, and finer: part 1 is split in the middle into the finer parts 1 and 2."""
    parts = quarters()
    shares = [0.5, 0.3, 0.1, 0.3, 0.2, 0.1]
    clusters = [
        {"id": i, "share": share, "background": i == 0, "parent": parent} | FACTS
        for i, (share, parent) in enumerate(zip(shares, (0, 1, 1, 2, 3, 4)))
    ]
    masks = np.array([0, 1, 3, 4, 5], np.uint8)[parts.masks]
    masks[(parts.masks == 1) & (np.arange(32) > 9)] = 2
    finer = replace(
        parts,
        arrays={},
        classes=finer_classes(parts.classes, clusters),
        clusters=tuple(c | {"class_id": c["id"]} for c in clusters),
        masks=masks,
    )
    return replace(parts, finer=finer)


def write_run(parts: Parts, folder: Path) -> Path:
    """A run in which `discover` left these parts."""
    config = configured("discover", gen="tiny", k=5)
    with RunFolder.open(folder) as run, run.stage(config, generator=parts.generator):
        for name, data in parts.files().items():
            run.write_bytes(f"parts/{name}", data)
    return folder
