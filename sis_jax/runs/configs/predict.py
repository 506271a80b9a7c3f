"""The configuration of `sis_jax.predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional

from sis_jax.runs.config import Config, Switch, spelled

if TYPE_CHECKING:
    import numpy as np

    from sis_jax.checkpoints.student import Student

    Photos = str | np.ndarray | Sequence[Any]
else:
    Student = Photos = Any


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How the network reads a photo.

    Args:
        flip: average with the mirror image: a little better, twice the time.
        size: pixels of the shorter edge at which the network sees a photo; by default that of its
            training.
        tile: pixels; a photo that is larger at that size is cut into overlapping tiles.
        edges: let borders follow the photo's edges; without it they are as smooth as the network's.
        batch: photos at once on each device, from 1 on.
    """

    flip: bool = True
    size: int | None = None
    tile: int = 1024
    edges: bool = True
    batch: int = 16


@dataclass(frozen=True)
class PredictConfig(Config):
    """The student, the photos, and the files to write.

    Args:
        run: the run in which `distill` left a student, the student's folder, or "faces-student",
            which ships; in Python also the student itself.
        photos: a photo, a folder (with its sub-folders), a .zip, .tar or .npz; in Python also
            arrays uint8[h w 3], and lists of any of these.
        out: folder to write; in Python, without it, masks are returned in memory and nothing is
            written.
        format: png writes <stem>.png and classes.json; the others are those of `python -m sis_jax
            export`.
        soft: keep class probabilities: <stem>.npz with `scores` float16[h w c] beside each mask, or
            `.scores` in memory.
        cutouts: also write <stem>-cutout.png, the foreground with transparency.
        overwrite: replace masks in `out` that were made with other settings.
    """

    verb: ClassVar[str] = "predict"

    run: Annotated[str | Student, Positional, spelled("RUN")]
    photos: Annotated[Photos, Positional, spelled("PHOTOS")]
    _: KW_ONLY
    out: str | None = None
    format: Literal["png", "coco", "voc", "yolo", "hf", "npz", "tfds"] = "png"
    soft: Switch = False
    cutouts: Switch = False
    overwrite: Switch = False
    inference: Inference = field(default_factory=Inference)
