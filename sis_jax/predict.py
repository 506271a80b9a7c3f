"""Segment real photos with a run's student: `python -m sis_jax.predict RUN PHOTOS --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from sis_jax.runs import cli

if TYPE_CHECKING:
    import numpy as np

    from sis_jax.checkpoints.student import Student
    from sis_jax.data.masks import Masks


@cli.hooks("sis_jax.stages.predict", "plan", "results", "problems", needed=("out",))
def predict(
    run: str | Student,
    photos: str | np.ndarray | Sequence[Any],
    *,
    out: str | None = None,
    format: Literal["png", "coco", "voc", "yolo", "hf", "npz", "tfds"] = "png",  # noqa: A002
    soft: bool = False,
    cutouts: bool = False,
    flip: bool = True,
    size: int | None = None,
    tile: int = 1024,
    batch: int = 16,
    overwrite: bool = False,
) -> Masks:
    """Segment photos: one mask each, at the photo's own size.

    run: the run in which `distill` left a student, the student's folder, or "faces-student", which
        ships; in Python also the student itself.
    photos: a photo, a folder (searched to the bottom), a .zip, .tar or .npz; in Python also arrays
        uint8[h w 3], and lists of any of these.
    out: folder to write; in Python, without it, masks are returned in memory and nothing is
        written.
    format: png writes <stem>.png and classes.json; the others are those of `python -m sis_jax
        export`.
    soft: keep class probabilities: <stem>.npz with `scores` float16[h w c] beside each mask, or
        `.scores` in memory.
    cutouts: also write <stem>-cutout.png, the foreground with transparency.
    flip: average with the mirror image: a little better, twice the time.
    size: shorter side at which the network sees a photo; by default that of its training.
    tile: photos that are larger than this at that size are cut into overlapping tiles.
    batch: photos at once.
    overwrite: replace masks in `out` that were made with other settings.

    Returns Masks. A photo that cannot be read is in `.skipped` with the reason. Raises UsageError
    where there is nothing to segment.
    """
    from sis_jax.stages.predict import predict as work

    return work(
        run,
        photos,
        out=out,
        format=format,
        soft=soft,
        cutouts=cutouts,
        flip=flip,
        size=size,
        tile=tile,
        batch=batch,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(predict)
