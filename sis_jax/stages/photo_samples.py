"""A few photos with the masks that a run gave them, for its report: `RUN/photos/`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from sis_jax.checkpoints.student import Student, load_student
from sis_jax.data import draw
from sis_jax.data.masks import mask_path
from sis_jax.data.photo_files import list_source, readable
from sis_jax.runs.run import RunFolder

LOOKED_AT, WORST, OTHERS = 256, 8, 8  # photos
SHOWN = 192  # pixels of the longer edge
_BLOCK = 16


def write_samples(run: Path, photos: str, masks: Path) -> None:
    """Write the photos with the least confidence, and some of the others, each with its mask.

    Confidence: the student's highest class probability, mean over the pixels; of `LOOKED_AT`
    photos, evenly spread. masks: the folder that `predict` wrote.
    """
    found = sorted(_judged(load_student(run), photos, masks), key=lambda row: row[1])
    rest = found[WORST:]
    spread = np.unique(np.linspace(0, len(rest) - 1, OTHERS).round().astype(int)) if rest else ()
    chosen = [*found[:WORST], *(rest[i] for i in spread)]
    with RunFolder.open(run) as folder:
        shutil.rmtree(run / "photos", ignore_errors=True)
        for number, (name, _, image) in enumerate(chosen):
            with Image.open(mask_path(masks, name)) as file:
                mask = np.array(file.resize(image.size, Image.Resampling.NEAREST))
            folder.write_image(f"photos/{number:02d}_image.png", image)
            folder.write_image(f"photos/{number:02d}_mask.png", draw.palette_png(mask))
        facts = [{"name": name, "confidence": round(score, 4)} for name, score, _ in chosen]
        folder.write_json("photos/photos.json", {"looked_at": len(found), "photos": facts})


def _judged(student: Student, photos: str, masks: Path) -> Iterator[tuple[str, float, Image.Image]]:
    """(name, confidence, reduced photo) of photos that have a mask."""
    listing = list_source(Path(photos))
    names = [name for name in listing.names if mask_path(masks, name).is_file()]
    at = np.unique(np.linspace(0, len(names) - 1, LOOKED_AT).round().astype(int)) if names else ()
    stream = readable(listing, {names[i] for i in at})
    while chunk := list(islice(stream, _BLOCK)):
        small = [(name, _reduced(image)) for name, image in chunk if not isinstance(image, str)]
        scores = student.scores([np.asarray(image) for _, image in small], flip=False)
        for (name, image), score in zip(small, scores):
            yield name, float(score.max(-1).mean()), image


def _reduced(photo: np.ndarray) -> Image.Image:
    image = Image.fromarray(photo)
    image.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    return image
