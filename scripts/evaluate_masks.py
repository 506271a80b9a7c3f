"""How good a student's masks are on annotated photos, as framed and under changes of the photo.

    python scripts/evaluate_masks.py STUDENT PHOTOS [--masks MASKS] [--changes] [--worst DIR]

STUDENT is a run, a student's folder or name; PHOTOS an .npz or a folder, as for `evaluate`.
Background against the rest, one confusion over all pixels at the masks' own resolution: IoU of
foreground and background, their mean with a 95 % bootstrap interval over the photos, mean IoU
within 3 pixels of the boundary, and the share of each annotated class that is foreground in them.
`--changes` repeats it for crops, rolls, grey, dark and compressed photos; `--worst` writes the 24
photos with the lowest mean IoU beside their masks.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import sis_jax as sis
from sis_jax.data.ground_truth import open_pairs
from sis_jax.ops import metrics

BORDER = 3  # pixels
Pair = tuple[np.ndarray, np.ndarray]


def framed(factor: float, roll: float = 0.0) -> Callable[[np.ndarray, np.ndarray], Pair]:
    """The photo as if framed `factor` times as tightly and rolled by `roll` degrees."""

    def change(photo: np.ndarray, mask: np.ndarray) -> Pair:
        h, w = mask.shape
        cos, sin = (f(np.deg2rad(roll)) / factor for f in (np.cos, np.sin))
        y, x = h / 2, w / 2
        table = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
        size, affine = (w, h), Image.Transform.AFFINE
        seen = Image.fromarray(photo).transform(size, affine, table, Image.Resampling.BICUBIC)
        # Ids up to 254, so that what lies outside can be told from class 0.
        known = Image.fromarray(mask).transform(size, affine, table, fillcolor=255)
        return np.asarray(seen), np.asarray(known)

    return change


def grey(photo: np.ndarray, mask: np.ndarray) -> Pair:
    """Without colour."""
    return np.asarray(Image.fromarray(photo).convert("L").convert("RGB")), mask


def dark(photo: np.ndarray, mask: np.ndarray) -> Pair:
    """At 0.35 of its brightness."""
    return (photo * 0.35).astype(np.uint8), mask


def compressed(photo: np.ndarray, mask: np.ndarray) -> Pair:
    """JPEG of quality 20."""
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=20)
    return np.asarray(Image.open(file)), mask


CHANGES: dict[str, Callable[[np.ndarray, np.ndarray], Pair]] = {
    "as framed": lambda photo, mask: (photo, mask),
    "framing x 0.7": framed(0.7),
    "framing x 1.5": framed(1.5),
    "roll 30 degrees": framed(1.0, 30),
    "grey": grey,
    "dark": dark,
    "JPEG 20": compressed,
}


def counted(
    student: sis.Student, pairs: Iterator[Pair], batch: int = 64
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(confusion, confusion near the boundary, found mask) of each photo."""
    rows = list(pairs)
    for i in range(0, len(rows), batch):
        found = student.masks([photo for photo, _ in rows[i : i + batch]])
        for (_, mask), got in zip(rows[i : i + batch], found):
            gt = np.where(mask == 255, 255, mask > 0).astype(np.uint8)
            near = np.where(metrics.boundary_band(gt, BORDER), gt, 255)
            guess = (got > 0).astype(np.uint8)
            yield metrics.confusion(gt, guess, 2), metrics.confusion(near, guess, 2), guess


def summary(counts: np.ndarray, borders: np.ndarray) -> str:
    """One row: foreground / background IoU, mean with its interval, borders."""
    rng = np.random.default_rng(0)
    resampled = counts[rng.integers(len(counts), size=(1000, len(counts)))].sum(1)
    low, high = np.quantile([metrics.mean_iou(c) for c in resampled], (0.025, 0.975))
    background, foreground = metrics.iou(counts.sum(0))
    return (
        f"mean IoU {metrics.mean_iou(counts.sum(0)):.4f} ({low:.3f} to {high:.3f}), foreground "
        f"{foreground:.3f}, background {background:.3f}, "
        f"borders {metrics.mean_iou(borders.sum(0)):.3f}"
    )


def recalls(pairs: list[Pair], masks: list[np.ndarray], names: dict[int, str]) -> str:
    """Share of each annotated class that is foreground in the student's masks."""
    found = []
    for class_id, name in names.items():
        inside = [(mask == class_id) for _, mask in pairs]
        total = sum(int(m.sum()) for m in inside)
        if class_id and total:
            hits = sum(int((m & (got > 0)).sum()) for m, got in zip(inside, masks))
            found.append(f"{name} {hits / total:.3f}")
    return ", ".join(found)


def sheet(
    pairs: list[Pair], masks: list[np.ndarray], order: np.ndarray, size: int = 128
) -> Image.Image:
    """Photo, annotated mask and found mask, three columns to a photo, four photos to a row."""
    tiles = []
    for i in order:
        photo, mask = pairs[i]
        planes = (photo, *(np.repeat(255 * (m > 0)[..., None], 3, -1) for m in (mask, masks[i])))
        tiles.append(
            np.concatenate(
                [
                    np.asarray(Image.fromarray(p.astype(np.uint8)).resize((size, size)))
                    for p in planes
                ],
                axis=1,
            )
        )
    rows = [np.concatenate(tiles[i : i + 4], axis=1) for i in range(0, len(tiles) // 4 * 4, 4)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """See the module."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    flags.add_argument("student")
    flags.add_argument("photos")
    flags.add_argument("--masks")
    flags.add_argument("--changes", action="store_true")
    flags.add_argument("--worst", metavar="DIR")
    args = flags.parse_args()
    student, gt = sis.load_student(args.student), open_pairs(args.photos, args.masks)
    pairs = [(photo, mask) for _, photo, mask in gt]
    names = {int(c["id"]): str(c["name"]) for c in gt.classes}
    for name in CHANGES if args.changes else ["as framed"]:
        changed = [CHANGES[name](*pair) for pair in pairs]
        counts, borders, masks = zip(*counted(student, iter(changed)))
        print(f"{name:16} {summary(np.stack(counts), np.stack(borders))}", flush=True)
        if name == "as framed":
            print(f"{'found':16} {recalls(changed, list(masks), names)}", flush=True)
            if args.worst:
                order = np.argsort([metrics.mean_iou(c) for c in counts])[:24]
                Path(args.worst).mkdir(parents=True, exist_ok=True)
                sheet(changed, list(masks), order).save(Path(args.worst) / "worst.png")


if __name__ == "__main__":
    main()
