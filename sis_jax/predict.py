"""Segment real photos with a run's student: `python -m sis_jax.predict RUN PHOTOS --out DIR`.

One palette PNG per photo, at the photo's own size, beside classes.json. Photos stream through in batches, so a folder of any length needs the same
memory. A photo that cannot be read is named and skipped; the others are done, and the command exits with 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sis_jax.core import cli

if TYPE_CHECKING:
    from sis_jax.data.masks import Masks, Prediction
    from sis_jax.weights.student import Student

Photo = tuple[str, np.ndarray | str]  # name, and the picture or why there is none


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

    run: the run in which `distill` left a student, or the student's folder; in Python also the student itself.
    photos: a photo, a folder (searched to the bottom), a .zip, .tar or .npz; in Python also arrays uint8[h w 3], and lists of any of these.
    out: folder to write; in Python, without it, masks are returned in memory and nothing is written.
    format: png writes <stem>.png and classes.json; the others are those of `python -m sis_jax export`.
    soft: keep class probabilities: <stem>.npz with `scores` float16[h w c] beside each mask, or `.scores` in memory.
    cutouts: also write <stem>-cutout.png, the foreground with transparency.
    flip: average with the mirror image: a little better, twice the time.
    size: shorter side at which the network sees a photo; by default that of its training.
    tile: photos that are larger than this at that size are cut into overlapping tiles.
    batch: photos at once.
    overwrite: replace masks that are already in `out`.

    Returns Masks. A photo that cannot be read is in `.skipped` with the reason. Raises UsageError where there is nothing to segment.
    """
    from sis_jax.core.types import UsageError
    from sis_jax.data.masks import Masks
    from sis_jax.weights.student import load_student

    student = load_student(run) if isinstance(run, str | Path) else run
    if batch < 1:
        raise UsageError(f"batch is {batch}, expected at least 1")
    if out is None and (format != "png" or cutouts):
        raise UsageError("a format or cut-outs need a folder: give --out")
    classes = tuple(dict(c) for c in student.classes)
    stream, total = _open(photos)
    skipped: list[tuple[str, str]] = []
    options = {"flip": flip, "size": size, "tile": tile}
    found = _segment(student, stream, total, batch, soft or cutouts, options, skipped)
    if out is None:
        held = tuple(found)
        return Masks(classes, tuple(p.name for p in held), tuple(skipped), None, held)
    names = _write(Path(out), found, classes, format, soft, cutouts, overwrite, student.info.licence)
    return Masks(classes, tuple(names), tuple(skipped), Path(out) if format == "png" else None)


def _open(photos: Any) -> tuple[Iterator[Photo], int]:
    """A stream of photos, each read when its turn comes, and how many there are."""
    from sis_jax.core.types import UsageError

    sources = _sources(photos)
    if not sources:
        raise UsageError("there are no photos: the list is empty")
    total = sum(len(names) for names, _ in sources)
    many = len(sources) > 1

    def stream() -> Iterator[Photo]:
        for number, (_, read) in enumerate(sources):
            for name, picture in read():
                yield (f"{number:04d}" if many and not name else name or "0000"), picture

    return stream(), total


def _sources(photos: Any) -> list[tuple[Sequence[str], Any]]:
    """(names, function that yields (name, picture)) per source."""
    from sis_jax.core.types import UsageError
    from sis_jax.data.photo_files import list_source, nothing_found, readable

    if isinstance(photos, str | Path):
        listing = list_source(Path(photos))
        if not listing.names:
            raise UsageError(nothing_found(str(photos), [listing]))
        return [(listing.names, lambda: readable(listing))]
    if isinstance(photos, np.ndarray) and photos.ndim == 4:
        photos = list(photos)
    if isinstance(photos, np.ndarray):
        picture = _checked(photos)
        return [(("",), lambda: iter([("", picture)]))]
    if hasattr(photos, "convert"):  # a Pillow image
        return _sources(np.asarray(photos.convert("RGB")))
    return [source for photo in photos for source in _sources(photo)]


def _checked(image: np.ndarray) -> np.ndarray:
    from sis_jax.core.types import UsageError

    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)) or not image.size:
        raise UsageError(f"a photo is {image.dtype}{list(image.shape)}, expected uint8[h w 3] (RGB, 0 to 255)")
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.shape[2] == 4:  # transparency lies on white, as in files
        alpha = image[..., 3:].astype(np.float32) / 255
        return (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return image


def _segment(
    student: Student, photos: Iterator[Photo], total: int, batch: int, soft: bool, options: dict[str, Any], skipped: list[tuple[str, str]]
) -> Iterator[Prediction]:
    """A batch of photos at a time; those that cannot be read go to `skipped`."""
    from sis_jax.data.masks import Prediction

    bar = cli.progress(total, "predict", "photo")
    while chunk := list(islice(photos, batch)):
        bad = [(name, picture) for name, picture in chunk if isinstance(picture, str)]
        for name, reason in bad:
            cli.say(f"skipped {name}: {reason}")
            skipped.append((name, reason))
        good = [(name, picture) for name, picture in chunk if not isinstance(picture, str)]
        pictures = [picture for _, picture in good]
        if soft:
            scores = student.scores(pictures, **options)
            masks = [_winner(s, student.ids) for s in scores]
        else:
            masks, scores = student.masks(pictures, **options), [None] * len(good)
        for (name, picture), mask, score in zip(good, masks, scores):
            yield Prediction(name, picture, mask, score)
        bar.update(len(chunk))
    bar.close()


def _winner(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return ids[scores[..., ids].argmax(-1)]


def _write(
    folder: Path, found: Iterator[Prediction], classes: tuple, format: str, soft: bool, cutouts: bool, overwrite: bool, licence: str  # noqa: A002
) -> list[str]:  # fmt: skip
    """Write every prediction as it comes; returns the names."""
    from sis_jax.data.masks import mask_file, write_classes, write_mask

    names: list[str] = []

    def noted() -> Iterator[Prediction]:
        for prediction in found:
            names.append(prediction.name)
            yield prediction

    if format != "png":
        from sis_jax.data.formats import write

        write(format, noted(), classes, folder, split="photos", overwrite=overwrite, licence=licence)
        return names
    _check_folder(folder, overwrite)
    write_classes(folder, classes)
    seen: dict[str, str] = {}
    for prediction in noted():
        file = mask_file(prediction.name)
        if file in seen:
            from sis_jax.core.types import SisError

            raise SisError(f"{seen[file]} and {prediction.name} would both be written to {file}: rename one of them")
        seen[file] = prediction.name
        write_mask(folder, prediction)
        _write_extras(folder, prediction, soft, cutouts)
    return names


def _write_extras(folder: Path, prediction: Prediction, soft: bool, cutouts: bool) -> None:
    import io

    from sis_jax.data.items import png
    from sis_jax.data.masks import cutout, mask_file
    from sis_jax.data.run import write_atomic

    target = folder / mask_file(prediction.name)
    if soft and prediction.scores is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, scores=prediction.scores.astype(np.float16))
        write_atomic(target.with_suffix(".npz"), buffer.getvalue())
    if cutouts and prediction.image is not None:
        write_atomic(target.with_name(f"{target.stem}-cutout.png"), png(cutout(prediction.image, prediction.mask, prediction.scores)))


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Masks go into a new folder, or one that predict wrote: never among a user's own pictures."""
    from sis_jax.core.types import UsageError

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; masks need a folder: give another --out")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "classes.json").is_file():
        raise UsageError(f"{folder} holds other files and no masks of ours: give an empty or new folder as --out")
    if not overwrite:
        raise UsageError(f"{folder} already holds masks: give another --out, or --overwrite to replace them")


def _plan(config: dict[str, Any]) -> dict[str, Any]:
    names = ["classes.json", "<stem>.png"] if config["format"] == "png" else [f"a dataset in the {config['format']} format"]
    return {"files": [f"{config['out']}/{n}" for n in names] if config["out"] else []}


def _results(masks: Masks, config: dict[str, Any]) -> list[Path]:
    return [Path(config["out"])] if config["out"] else []


def _problems(masks: Masks) -> str:
    """What the command line ends with where photos were left out."""
    if not masks.skipped:
        return ""
    shown = ", ".join(f"{name} ({reason})" for name, reason in masks.skipped[:3])
    return f"{len(masks.skipped)} of {len(masks.skipped) + len(masks)} photos could not be read: {shown}" + (
        ", ..." if len(masks.skipped) > 3 else ""
    )


predict.plan = _plan  # type: ignore[attr-defined]
predict.results = _results  # type: ignore[attr-defined]
predict.problems = _problems  # type: ignore[attr-defined]
predict.needed = ("out",)  # type: ignore[attr-defined]


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(predict)
