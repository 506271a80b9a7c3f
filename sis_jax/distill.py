"""Distil the parts into a segmenter for real photos: `python -m sis_jax.distill RUN`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sis_jax.runs import cli

if TYPE_CHECKING:
    from sis_jax.checkpoints.student import Student
    from sis_jax.data.folder import Dataset


@cli.hooks("sis_jax.stages.distill", "plan", "results")
def distill(
    data: str | Dataset | None = None,
    *,
    out: str | None = None,
    student: Literal["unet-small", "unet", "resnet18", "deeplabv3-resnet18", "deeplabv3-resnet50"]
    | None = None,
    recipe: str = "default",
    start_from: str | None = None,
    steps: int | None = None,
    batch: int | None = None,
    side: int | None = None,
    width: int = 32,
    block: int = 0,
    backbone: str | None = None,
    binary: bool = False,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    optimizer: Literal["adamw", "adam"] | None = None,
    schedule: Literal["cosine", "poly"] | None = None,
    augment: Literal["aligned", "strong", "weak", "none"] | None = None,
    background: float | None = None,
    trim: float | None = None,
    weighting: float | None = None,
    soft: bool = False,
    ema: float | None = None,
    photos: str | None = None,
    rows: int | None = None,
    adapt_steps: int = 700,
    rounds: int = 2,
    fly: bool = False,
    n: int = 10_000,
    images: str | None = None,
    masks: str | None = None,
    limit: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    snapshot: int = 250,
    seed: int = 0,
    overwrite: bool = False,
) -> Student:
    """Train a segmenter on generated pictures; stop it any time, the same command goes on where it
    stopped.

    data: a run, its data folder or a Dataset; a run without a dataset labels pictures on the fly.
    out: run folder to write `student/` to; by default the run the data belong to.
    student: the network; unet-small by default.
    recipe: settings by name, default or paper, the published one of Segmentation in Style. Settings
        given beside it win; defaults below are the first's.
    start_from: a run, folder or name ("faces-student") with a student of the same network and
        classes to begin with, at any side. --steps 0 only adapts it.
    steps: of training on generated pictures (2000).
    batch: pictures per step over all devices (32).
    side: pixels of the pictures trained on, and of the shorter side of photos later; 0, the
        default, takes the generator's.
    width: channels of the first level of unet-small.
    block: pixels of the side of the squares that unet-small sees and predicts at once, 2 or 4; 0,
        the default, takes 4 from 128 pixels on, or that of --start-from. 4 costs a quarter at the
        same side.
    backbone: pretrained weights, a name, package or path; "none" for random ones.
    binary: background against everything else, whatever parts were found.
    learning_rate: at its highest (0.001).
    weight_decay: see optimizer (0.01).
    optimizer: adamw, the default, decouples the weight decay, adam adds it to the gradient.
    schedule: cosine after a warm-up, the default, or poly, (1 - t / T)^0.9.
    augment: how far pictures are varied; "strong" for objects of any size and place, "aligned", the
        default, varies size and place little.
    background: probability of another background behind a picture's foreground (0.5).
    trim: share of the pictures left out, those on whose frame the least background was found
        (0.25).
    weighting: exponent of the teacher's certainty as a pixel's weight, 0 = none (0.5).
    soft: the teacher's doubt as soft targets; the dataset must have been written with --soft.
    ema: decay of the averaged network, which is what is kept; 0 keeps the last one (0.999).
    photos: real photos without masks to adapt to, a folder, an archive or .npz.
    rows: use only the first so many of them.
    adapt_steps: of each round of adaptation, after the training.
    rounds: of adaptation: the student labels the photos, and learns from them.
    fly: label pictures on the fly even where a dataset lies in the run.
    n: pictures to label on the fly.
    images, masks: instead of generated pictures, photos with human masks, paired by name: the
        supervised reference.
    limit: use only the first so many of these.
    dtype: of the convolutions.
    snapshot: steps between two checkpoints and points of the curve.
    seed: of weights, order and variation.
    overwrite: throw away a student that was trained with other settings.

    Returns the Student. Raises UsageError for what cannot work.
    """
    from sis_jax.stages.distill import distill as work

    return work(
        data,
        out=out,
        student=student,
        recipe=recipe,
        start_from=start_from,
        steps=steps,
        batch=batch,
        side=side,
        width=width,
        block=block,
        backbone=backbone,
        binary=binary,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        augment=augment,
        background=background,
        trim=trim,
        weighting=weighting,
        soft=soft,
        ema=ema,
        photos=photos,
        rows=rows,
        adapt_steps=adapt_steps,
        rounds=rounds,
        fly=fly,
        n=n,
        images=images,
        masks=masks,
        limit=limit,
        dtype=dtype,
        snapshot=snapshot,
        seed=seed,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(distill)
