"""The background of a run on photos, where `discover` found none or only some of it.

The rule of `discover` is one for portraits: it counts the frame at the top, so behind people in a
street it can be content with the upper half, and the ground becomes foreground (IoU 0.06), or with
the ground, and what stands beside the people becomes foreground. The photos know better: of the
parts, those are foreground whose place begins the fit that stands out most there
(`training/photo_labels.py`).

`at_the_sides` asks the masks alone, where many clusterings are compared. A part that lies further
outside than the background that was found is background. Where none was found, or one that holds
less than half of the sides, so is every part that is as common there as elsewhere: a generator of
an hour blurs its clusters; of objects that fill 20 to 70 % of an image, with 15 to 25 % of the
pixels in a wrong cluster, background is 1.2 to 1.5 times as common on the frame as in the image,
and the rule of `discover` asks for 1.5. In simulated masks of that kind the object's clusters were
0.4 to 0.95 times as common in the outermost columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
from jaxtyping import UInt8

from sis_jax.data.part_names import BACKGROUND
from sis_jax.data.parts import Parts
from sis_jax.ops.progress import say
from sis_jax.ops.sampling import sample_seeds
from sis_jax.ops.selection import frame
from sis_jax.stages.teacher import Teacher
from sis_jax.training.photo_labels import PhotoLabels

SAMPLES = 256
HALF = 0.5


def missing_background(run: str, photos: PhotoLabels) -> dict[str, None]:
    """The parts of `run` that are background by `in_photos`, as names of an edits.json."""
    parts = Parts.load(run)
    teacher = Teacher.from_run(run)
    seeds = sample_seeds(parts.seed, SAMPLES)
    names = parts.names
    masks = np.concatenate([masks for _, masks, _ in teacher.label(seeds)])
    chosen = in_photos(masks, list(names), photos)
    if chosen:
        found = "only a part of the background" if BACKGROUND in names else "no background"
        say(
            f"{found} was found with confidence, so {', '.join(names[i] for i in chosen)} became "
            "background, since what is left stands out best in the photos: if "
            f"{run}/report.html shows the object there, give another --seed, or more time"
        )
    return dict.fromkeys(map(str, chosen))


def in_photos(masks: UInt8[np.ndarray, "n h w"], ids: list[int], photos: PhotoLabels) -> list[int]:
    """The classes of `ids` that are background beside the one that was found: those without which
    the foreground stands out most in the photos.
    """
    parts = [i for i in ids if i != BACKGROUND]
    least = int(BACKGROUND not in ids)
    choices = [c for n in range(least, len(parts)) for c in combinations(parts, n)]
    if not choices:
        return []
    return list(max(choices, key=lambda c: photos.standing_out(~np.isin(masks, [BACKGROUND, *c]))))


def at_the_sides(masks: Iterable[UInt8[np.ndarray, "b h w"]], ids: list[int]) -> list[int]:
    """The classes of `ids` that are background by where they lie, beside the one that was found;
    none where no other class would be left.
    """
    area, outer, edge = np.zeros((3, 256))
    for block in masks:
        quarter = max(block.shape[2] // 4, 1)
        half = np.concatenate([block[:, :, :quarter], block[:, :, -quarter:]], axis=2)
        columns = frame(*block.shape[1:])[-1]
        area += np.bincount(block.ravel(), minlength=256)
        outer += np.bincount(half.ravel(), minlength=256)
        edge += np.bincount(block[:, :, columns].ravel(), minlength=256)
    share = outer / np.maximum(area, 1)
    further = (share > share[BACKGROUND]) & (area[BACKGROUND] > 0)
    if edge[BACKGROUND] < HALF * edge.sum():
        further |= edge / edge.sum() >= area / area.sum()
    parts = [i for i in ids if i != BACKGROUND and area[i]]
    chosen = [i for i in parts if further[i]]
    return chosen if len(chosen) < len(parts) else []
