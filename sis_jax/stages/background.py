"""The background of a run on photos, where `discover` found none or less than half of one.

The rule of `discover` is one for portraits: it counts the frame at the top, so behind people in a
street it can be content with the upper half, and the ground becomes foreground (IoU 0.06).

A generator of an hour blurs its clusters: of objects that fill 20 to 70 % of an image, with 15 to
25 % of the pixels in a wrong cluster, background is 1.2 to 1.5 times as common on the frame as in
the image, and the rule of `discover` asks for 1.5. The order stays: in simulated masks of that
kind the object's clusters were 0.4 to 0.95 times as common in the outermost columns. A segmenter
of photos needs a background, so here the order decides.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8

from sis_jax.data.part_names import BACKGROUND
from sis_jax.data.parts import Parts
from sis_jax.ops.progress import say
from sis_jax.ops.sampling import sample_seeds
from sis_jax.ops.selection import frame
from sis_jax.stages.teacher import Teacher

SAMPLES = 256
HALF = 0.5


def missing_background(run: str) -> dict[str, None]:
    """The parts of `run` that `at_the_sides` names, as names of an edits.json; most often {}."""
    parts = Parts.load(run)
    teacher = Teacher.from_run(run)
    seeds = sample_seeds(parts.seed, SAMPLES)
    names = parts.names
    chosen = at_the_sides((masks for _, masks, _ in teacher.label(seeds)), list(names))
    if chosen:
        found = "only a part of the background" if BACKGROUND in names else "no background"
        say(
            f"{found} was found with confidence, so {', '.join(names[i] for i in chosen)}, at "
            "least as common at the sides as elsewhere, became background: if "
            f"{run}/report.html shows the object there, give another --seed, or more time"
        )
    return dict.fromkeys(map(str, chosen))


def at_the_sides(masks: Iterable[UInt8[np.ndarray, "b h w"]], ids: list[int]) -> list[int]:
    """The classes of `ids` beside the background that are at least as common in the outermost
    columns as in the images; none where the background holds `HALF` of these columns, or where no
    other class would be left.
    """
    area, outer = np.zeros(256), np.zeros(256)
    for block in masks:
        columns = frame(*block.shape[1:])[-1]
        area += np.bincount(block.ravel(), minlength=256)
        outer += np.bincount(block[:, :, columns].ravel(), minlength=256)
    if outer[BACKGROUND] >= HALF * outer.sum():
        return []
    gains = (outer / outer.sum() >= area / area.sum()) & (area > 0)
    parts = [i for i in ids if i != BACKGROUND and area[i]]
    chosen = [i for i in parts if gains[i]]
    return chosen if len(chosen) < len(parts) else []
