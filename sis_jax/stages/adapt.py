"""Self-training on photos without labels: what is learned in a round, and whether it helped.

A round: the student labels its share of the photos (the mean with their mirror images, as
probabilities; foreground against background, the mean with what GrabCut and a guided filter make
of that from the photo's own colours), and goes on learning from varied views of them, many before
other photos' backgrounds (`training/self_training.py`). The next round's labels are the better for
it. In the first round, when the student has only seen generated images, one classifier of its
backbone's features tells background from the rest (`training/photo_labels.py`).

The criterion, without labels, on held-out photos: how stable the masks are under other colours, how
far they agree with what GrabCut makes of them from each photo's own colours, and whether the masks
of held-out generated images are still right. Five earlier students (U-Nets without a backbone) of
the default faces, 300 human masks:

| student | stability | colours | mean IoU |
|---|---|---|---|
| 40 steps, no photos | 0.839 | 0.647 | 0.647 |
| the same, adapted | 0.861 | 0.678 | 0.666 |
| of 64 pixels, shown 128 | 0.886 | 0.820 | 0.730 |
| 600 steps, no photos | 0.920 | 0.826 | 0.785 |
| the same, adapted | 0.940 | 0.877 | 0.812 |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from sis_jax import parallel
from sis_jax.checkpoints.student import Student
from sis_jax.data.composites import Layers
from sis_jax.data.pairs import shuffled
from sis_jax.data.threads import in_threads
from sis_jax.models import students
from sis_jax.ops import grabcut, metrics
from sis_jax.ops.progress import progress
from sis_jax.ops.student_augment import Augmentation, appearance
from sis_jax.training import student as training
from sis_jax.training.photo_labels import PhotoLabels

HELD = 256  # held-out photos of the judgement
FORGOTTEN = 0.1  # mean IoU on generated images that adaptation may cost
_BLOCK = 64


@dataclass(frozen=True)
class Judgement:
    """stability, agreement: mean IoU, see `judge`. val_iou: on held-out generated images."""

    stability: float
    agreement: float | None
    val_iou: float | None

    @property
    def score(self) -> float:
        """What is compared: the mean of what is known."""
        return self.stability if self.agreement is None else (self.stability + self.agreement) / 2

    def better_than(self, other: Judgement) -> bool:
        """A higher score, not paid for with the generated images: empty masks are stable, too."""
        if self.val_iou is None or other.val_iou is None:
            return self.score > other.score
        return self.score > other.score and self.val_iou > other.val_iou - FORGOTTEN

    def facts(self, when: str) -> dict[str, float]:
        """For run.json and the student's card."""
        named = {"stability": self.stability, "agreement": self.agreement, "val_iou": self.val_iou}
        return {
            f"{name}_{when}": round(value, 4) for name, value in named.items() if value is not None
        }

    def __str__(self) -> str:
        found = [f"stability of the masks of held-out photos {self.stability:.3f}"]
        if self.agreement is not None:
            found.append(f"agreement with their colours {self.agreement:.3f}")
        if self.val_iou is not None:
            found.append(f"mean IoU on generated images {self.val_iou:.3f}")
        return ", ".join(found)


def judge(
    student: Student, photos: UInt8[np.ndarray, "n r r 3"], val_iou: float | None, mirrored: bool
) -> Judgement:
    """The student on photos that it did not learn from; mirrored: whether a photo's mirror image is
    as likely as the photo.
    """
    return Judgement(
        stability(student, reduced(photos, student.side)),
        agreement(student, photos, mirrored),
        val_iou,
    )


@dataclass(frozen=True, eq=False)
class Round:
    """Photos of one round. target: the teacher's class probabilities, 255 = 1."""

    images: UInt8[np.ndarray, "n s s 3"]
    target: UInt8[np.ndarray, "n s s k"]
    layers: Layers | None

    @classmethod
    def labelled(
        cls,
        teacher: Student,
        photos: UInt8[np.ndarray, "n r r 3"],
        side: int,
        note: str,
        *,
        mirrored: bool = True,
        pasted: bool = True,
        classifier: PhotoLabels | None = None,
    ) -> Round:
        """Photos at `side` pixels with the masks of `teacher`.

        mirrored: whether the mean with the mirror image is meant, wrong where classes swap there.
        pasted: whether foregrounds will be pasted; without a background there are none to paste.
        classifier: tells background from the rest in place of the teacher.
        """
        seen = reduced(photos, min(photos.shape[1], max(side, teacher.side)))
        own, photos = photos, reduced(photos, side)
        target = np.empty((*photos.shape[:3], len(teacher.classes)), np.uint8)
        with progress(len(photos), note, "photo") as bar:
            for i in range(0, len(photos), _BLOCK):
                scores = predicted(teacher, seen[i : i + _BLOCK], mirrored)
                scores = np.stack([_resized(score, side) for score in scores])
                if classifier is not None:
                    background = classifier(np.asarray(own[i : i + _BLOCK]))
                    background = np.stack([enlarged(b, (side, side)) for b in background])
                    scores = with_background(scores, background)
                if _has_background(teacher):
                    scores = _corrected(photos[i : i + _BLOCK], scores)
                target[i : i + _BLOCK] = np.round(255 * scores)
                bar.update(len(scores))
        if not (pasted and _has_background(teacher)):
            return cls(photos, target, None)
        return cls(photos, target, Layers.of(photos, target[..., 0]))

    def batches(
        self, batch: int, seed: int, start: int, pasted: float
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """An endless stream of what `self_training_step` takes; batch t depends on (seed, t) alone.

        pasted: share of a batch that is reliable foregrounds before other photos' backgrounds.
        """
        pool = np.flatnonzero(self.layers.reliable) if self.layers is not None else ()
        count = round(batch * pasted) if len(pool) else 0
        for step, rows in shuffled(len(self.images), batch, (seed, 5), start):
            rng = np.random.default_rng([seed, 8, step])
            on = rng.permutation(batch) < count  # in any order, so that every device gets some
            rows = np.where(on, rng.choice(pool, batch), rows) if count else rows
            images, edge = self.images[rows], np.zeros((batch, 3), np.uint8)
            backgrounds = images
            if self.layers is not None and count:
                backgrounds = self.layers.backgrounds[self.layers.partners(rows, rng)]
                edge = self.layers.edge_colour[rows].round().astype(np.uint8)
            yield images, self.target[rows], backgrounds, on.astype(np.float32), edge


def stability(student: Student, photos: UInt8[np.ndarray, "n s s 3"]) -> float:
    """Mean IoU between masks of photos and of the same photos in other colours."""
    graph, params, statistics = training.split(student.network)
    run = parallel.map_devices(_two_views, (None, None, None, 0), 0, devices=1, graph=graph)
    found = []
    for i in range(0, len(photos), 64):
        straight, varied = (
            np.asarray(a)[0]
            for a in run(params, statistics, jax.random.key(i), photos[i : i + 64][None])
        )
        found += [_same(a, b, len(student.classes)) for a, b in zip(straight, varied)]
    return float(np.mean(found))


def agreement(
    student: Student, photos: UInt8[np.ndarray, "n r r 3"], mirrored: bool
) -> float | None:
    """Mean IoU, of background and the rest, of the masks with what the photos' colours make of
    them. None where nothing is background.
    """
    if not _has_background(student):
        return None
    background = predicted(student, reduced(photos, student.side), mirrored)[..., 0]
    prior = background.mean(0)
    prior = (prior + prior[:, ::-1]) / 2 if mirrored else prior
    size = photos.shape[1:3]

    def one(i: int) -> float:
        half = enlarged((background[i] + prior) / 2, size)
        cut = grabcut.foreground(photos[i], half, grabcut.LOOSE)
        own = enlarged(background[i], size) < 0.5
        return _same(own.astype(int), cut.astype(int), 2)

    return float(np.mean(list(in_threads(one, range(len(photos))))))


def _same(a: Integer[np.ndarray, "h w"], b: Integer[np.ndarray, "h w"], classes: int) -> float:
    """Mean IoU of two masks; 0 where both are of one class alone, which is stable but no mask."""
    if (a == a.flat[0]).all() and (b == a.flat[0]).all():
        return 0.0
    return metrics.mean_iou(metrics.confusion(a, b, classes))


def _has_background(student: Student) -> bool:
    return bool(student.classes[0]["id"] == 0)


def predicted(
    student: Student, photos: UInt8[np.ndarray, "n s s 3"], mirrored: bool
) -> Float[np.ndarray, "n s s k"]:
    """Class probabilities by channel; mirrored: the mean with the mirror image."""
    found = np.empty((*photos.shape[:3], len(student.classes)), np.float32)
    for i in range(0, len(photos), _BLOCK):
        block = list(photos[i : i + _BLOCK])
        for j, scores in enumerate(student.scores(block, flip=mirrored, edges=False)):
            found[i + j] = scores[..., student.ids]
    return found


def _resized(scores: Float[np.ndarray, "r r k"], side: int) -> Float[np.ndarray, "s s k"]:
    if scores.shape[0] == side:
        return scores
    return np.stack([enlarged(plane, (side, side)) for plane in np.moveaxis(scores, -1, 0)], -1)


def _corrected(
    photos: UInt8[np.ndarray, "n s s 3"], scores: Float[np.ndarray, "n s s k"]
) -> Float[np.ndarray, "n s s k"]:
    """Probabilities whose background, channel 0, follows the photos' colours; the other classes
    share the rest as before.
    """

    def one(i: int) -> np.ndarray:
        return grabcut.corrected(photos[i], scores[i, ..., 0])

    return with_background(scores, np.stack(list(in_threads(one, range(len(photos))))))


def with_background(
    scores: Float[np.ndarray, "n s s k"], background: Float[np.ndarray, "n s s"]
) -> Float[np.ndarray, "n s s k"]:
    """Probabilities with another background, channel 0; the other classes share the rest."""
    rest = scores[..., 1:] + 1e-6  # even where the teacher is certain that none is there
    rest /= rest.sum(-1, keepdims=True)
    background = background[..., None]
    return np.concatenate([background, rest * (1 - background)], -1)


def _two_views(
    params: dict, statistics: dict, key: jax.Array, photos: jax.Array, *, graph: object
) -> tuple[jax.Array, jax.Array]:
    """Masks (channels) of the photos, and of the same photos in other colours."""
    network, x = training.join(graph, params, statistics), students.to_float(photos)
    views = (x, appearance(key, x, Augmentation()))
    straight, varied = (network(v).argmax(-1).astype(jnp.int32) for v in views)
    return straight, varied


def reduced(photos: UInt8[np.ndarray, "n r r 3"], side: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Averaged down to `side` pixels: over whole blocks, or where `side` does not divide (a student
    of another side) over areas.
    """
    factor, n = photos.shape[1] // side, len(photos)
    if photos.shape[1] == side:
        return np.asarray(photos)
    if photos.shape[1] % side:
        return np.stack(
            [
                np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BOX))
                for p in photos
            ]
        )
    out = np.empty((n, side, side, 3), np.uint8)
    for i in range(0, n, 512):  # the float average of a block of photos at a time
        block = np.asarray(photos[i : i + 512])
        out[i : i + 512] = (
            block.reshape(len(block), side, factor, side, factor, 3).mean((2, 4)).round()
        )
    return out


def enlarged(plane: Float[np.ndarray, "s s"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Bilinear."""
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize(
            (size[1], size[0]), Image.Resampling.BILINEAR
        )
    )
