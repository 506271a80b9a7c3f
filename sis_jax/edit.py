"""Change what a picture shows and keep its background: `python -m sis_jax.edit RUN --seed 3
--direction glasses`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sis_jax.runs import cli

if TYPE_CHECKING:
    import numpy as np

    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.data.edits import Edit
    from sis_jax.data.parts import Parts
    from sis_jax.stages.directions import Direction
    from sis_jax.types import Generator


@cli.hooks("sis_jax.stages.edit", "plan", "results")
def edit(
    run: str | Path | Parts,
    *,
    seed: int | tuple[int, ...] = 0,
    direction: str | Direction = "pca:0",
    strength: float | tuple[float, ...] = 1.0,
    slots: str | None = None,
    photo: str | tuple[str, ...] | np.ndarray | None = None,
    truncation: float | None = None,
    space: Literal["w", "w+"] = "w+",
    steps: int = 200,
    lpips: tuple[str, ...] = (),
    clip: str | CLIP | None = None,
    neutral: str = "a photo",
    n: int = 2000,
    name: str | None = None,
    gen: Generator | None = None,
    inpainter: Callable[..., Any] | None = None,
    overwrite: bool = False,
) -> Edit:
    """Move pictures along a direction and keep their background; writes RUN/edits/NAME.

    run: the folder in which `discover` left its parts; in Python also parts, with their generator
        as gen=, and nothing is written.
    seed: the pictures to edit, one number or several.
    direction: "pca:0" is the strongest principal component of w, pca:1 the next; a name of those
        kept in the run (what `discover --rare` learned, earlier edits, RUN/directions/); a
        .safetensors file; or a text, "a person with glasses", which needs a text model.
    strength: how far, one number or several, negative goes the other way. 1 is the displacement
        that a direction was learned with, or one standard deviation of w along it.
    slots: which slots of w are moved, "0-3" (shape) or "4-9" (colour); all by default.
    photo: real photos in place of seeds, a file, several or a folder; in Python also uint8[n r r 3]
        at the generator's size.
    truncation: psi of the pictures; by default that of the samples the parts were learned from.
    space: of the projection of photos: "w+" comes closer to the photo, "w" is edited better.
    steps: of the projection.
    lpips: of the projection: files with the weights of LPIPS on VGG16 (two as published, or one),
        used in place of the discriminator's features.
    clip: text model for a text, a name or a path; by default as in `label`.
    neutral: the text without what is wanted, "a person".
    n: samples from which a text's direction is learned.
    name: of the folder below RUN/edits; by default made from the direction.
    gen: the generator of the parts, in Python; found by its name otherwise.
    inpainter: in Python, (picture uint8[h w 3], hole bool[h w]) -> picture; completes backgrounds
        in place of OpenCV's inpainting.
    overwrite: replace an edit of this name that was made with other settings.

    Returns an Edit. Raises UsageError for an unknown direction (with the nearest names), parts
    without a background, and photos that are not there; SisError where no photo can be read.
    """
    from sis_jax.stages.edit import edit as work

    return work(
        run,
        seed=seed,
        direction=direction,
        strength=strength,
        slots=slots,
        photo=photo,
        truncation=truncation,
        space=space,
        steps=steps,
        lpips=lpips,
        clip=clip,
        neutral=neutral,
        n=n,
        name=name,
        gen=gen,
        inpainter=inpainter,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(edit)
