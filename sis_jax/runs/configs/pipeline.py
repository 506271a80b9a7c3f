"""The configuration of `python -m sis_jax run`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

from tyro.conf import Positional

from sis_jax.runs.config import Config, spelled


@dataclass(frozen=True)
class RunConfig(Config):
    """A generator or photos in, a student and a report out.

    Args:
        source: a generator (name, weights folder, checkpoint file), or photos to train one on (a
            folder or archive); the default generator without it.
        out: run folder of all stages; a generator is trained in its sub-folder `training`.
        photos: real photos for the student to adapt to; by default those the generator was trained
            on here.
        resolution: pixels of the images of a generator trained here, a power of two.
        train_images: photos shown to its discriminator in all.
        n: generated images with masks.
        steps: of the student's training.
        seed: of every stage.
        overwrite: discard the results of other settings in `out`.
    """

    verb: ClassVar[str] = "run"

    source: Annotated[str | None, Positional, spelled("[GEN|PHOTOS]")] = None
    _: KW_ONLY
    out: str
    photos: str | None = None
    resolution: int = 64
    train_images: int = 5_000_000
    n: int = 10_000
    steps: int = 2000
    seed: int = 0
    overwrite: bool = False
