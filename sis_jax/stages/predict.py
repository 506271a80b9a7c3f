"""The work of `sis_jax.predict`: one palette PNG per photo, at its own size, beside classes.json.

Photos stream through in batches; the same command goes on where it was stopped. A photo that cannot
be read is named and skipped, and the command exits with 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sis_jax import parallel
from sis_jax.checkpoints.student import Look, Student, load_student
from sis_jax.data import draw
from sis_jax.data.decode import Unusable
from sis_jax.data.exports.formats import write
from sis_jax.data.files import disk_errors, parse_json, plain, remove_temporary, write_atomic
from sis_jax.data.masks import (
    Masks,
    Prediction,
    cutout,
    mask_file,
    mask_path,
    write_classes,
    write_mask,
)
from sis_jax.data.names import flat, key, too_long
from sis_jax.data.photo_files import left_out, list_source, nothing_found, unread
from sis_jax.data.threads import cores, in_threads
from sis_jax.ops.progress import progress, say
from sis_jax.runs.configs.predict import PredictConfig
from sis_jax.runs.lock import FolderLock
from sis_jax.types import UsageError

_MARK = ".sis-masks.json"  # distinguishes a folder we wrote from one we must not touch
# A name, and a function that gives the image or raises `Unusable` with the reason.
Unread = tuple[str, Callable[[], np.ndarray]]
_THREADS = 8  # at most: each holds a photo or a mask at its own size


def predict(config: PredictConfig) -> Masks:
    """As `sis_jax.predict`, which explains the configuration."""
    process, processes = parallel.initialize()
    run, out = config.run, config.out
    student: Student = load_student(run) if isinstance(run, str | Path) else run
    if config.inference.batch < 1:
        raise UsageError(f"batch is {config.inference.batch}, expected at least 1")
    if out is None and (config.format != "png" or config.cutouts):
        raise UsageError("a format or cut-outs need a folder: give --out")
    classes = tuple(dict(c) for c in student.classes)
    student.check(config.inference.size, config.inference.tile)
    sources, skipped = _sources(config.photos), []
    if not sources:
        raise UsageError("there are no photos: the list is empty")
    for source in sources:
        for name, reason in source.refused:
            say(f"skipped {name}: {reason}")
            skipped.append((name, reason))
    if out is None:
        held = tuple(_segment(student, *_stream(sources, frozenset()), config, skipped))
        return Masks(classes, tuple(p.name for p in held), tuple(skipped), None, held)
    folder = Path(out)
    names = _names(sources, folder, config.format, config.cutouts, skipped)
    if config.format != "png":
        with parallel.together(processes):
            if process == 0:
                write(
                    config.format,
                    _segment(student, *_stream(sources, frozenset()), config, skipped),
                    classes,
                    folder,
                    split="photos",
                    overwrite=config.overwrite,
                    licence=student.info.licence,
                )
        return Masks(classes, _without(names, skipped), tuple(skipped), None)
    _check_apart(folder, config.photos)

    def write_files(prediction: Prediction) -> None:
        _write_extras(folder, prediction, config)  # before the mask: a mask that is there is whole
        write_mask(folder, prediction)

    with contextlib.ExitStack() as held:
        with parallel.together(processes):
            if process == 0:
                settings = _record(config, student)
                _open_folder(folder, names, settings, classes, config.overwrite, held)
        with parallel.together(processes):
            mine = set(names[process::processes])
            done = {n for n in names if n not in mine or (folder / mask_file(n)).is_file()}
            todo = _stream(sources, frozenset(done | {name for name, _ in skipped}))
            for _ in _segment(student, *todo, config, skipped, write_files):
                pass
    if processes > 1:  # what another process could not read has no mask
        names = [name for name in names if (folder / mask_file(name)).is_file()]
    return Masks(classes, _without(names, skipped), tuple(skipped), folder)


def _record(config: PredictConfig, student: Student) -> dict[str, Any]:
    """The settings that decide the masks, kept in the folder."""
    names = ("flip", "size", "tile", "edges", "soft", "cutouts")
    return {"student": student.info.sha256, **{name: config.flat()[name] for name in names}}


def _without(names: Sequence[str], skipped: list[tuple[str, str]]) -> tuple[str, ...]:
    bad = {name for name, _ in skipped}
    return tuple(n for n in names if n not in bad)


def _names(
    sources: list[Source], folder: Path, kind: str, cutouts: bool, skipped: list[tuple[str, str]]
) -> list[str]:
    """The photos that can be done; those whose result no file system takes go to `skipped`.
    UsageError where two would be written to one file.
    """
    names = []
    for number, source in enumerate(sources):
        for given in source.names:
            name = _name(number, given, len(sources))
            files = _files_of(name) if cutouts else _files_of(name)[:1]
            reasons = [too_long(folder / file) for file in files] if kind == "png" else []
            why = next(filter(None, reasons), "")
            if not why:
                names.append(name)
                continue
            say(f"skipped {name}: {why}")
            skipped.append((name, why))
    seen: dict[str, str] = {}
    for name in names:
        # A format that is no folder of masks has no folders in it.
        for file in _files_of(name) if kind == "png" else (flat(name),):
            if key(file) in seen:
                raise UsageError(
                    f"{seen[key(file)]} and {name} would both be written to {file}: rename one of "
                    "them"
                )
            seen[key(file)] = name
    return names


def _files_of(name: str) -> tuple[str, str]:
    """The mask and the cut-out of a photo."""
    mask = mask_file(name)
    return mask, mask.removesuffix(".png") + "-cutout.png"


def _name(number: int, name: str, sources: int) -> str:
    return f"{number:04d}" if sources > 1 and not name else name or "0000"


def _stream(sources: list[Source], done: frozenset[str]) -> tuple[Iterator[Unread], int]:
    """A stream of the photos that are not done, and how many there are."""
    todo = [
        {n for n in source.names if _name(i, n, len(sources)) not in done}
        for i, source in enumerate(sources)
    ]

    def stream() -> Iterator[Unread]:
        for number, source in enumerate(sources):
            for name, read in source.read(todo[number]):
                yield _name(number, name, len(sources)), read

    return stream(), sum(map(len, todo))


class Source(NamedTuple):
    """Photos given together. read: the wanted names -> (name, how to decode it). refused: (name,
    reason) of those that are there and cannot be read.
    """

    names: Sequence[str]
    read: Callable[[set[str]], Iterator[Unread]]
    refused: tuple[tuple[str, str], ...] = ()


def _sources(photos: Any) -> list[Source]:
    if isinstance(photos, str | Path):
        if (Path(photos) / "run.json").is_file():
            raise UsageError(
                f"{photos} is a run folder, not a folder of photos; its generated images are in "
                f"{photos}/data/train/images"
            )
        listing = list_source(Path(photos))
        if not listing.names:
            raise UsageError(nothing_found(str(photos), [listing]))
        return [Source(listing.names, lambda wanted: unread(listing, wanted), listing.refused)]
    if isinstance(photos, np.ndarray) and photos.ndim == 4:
        photos = list(photos)
    if isinstance(photos, np.ndarray):
        image = _checked(photos)
        return [Source(("",), lambda wanted: iter([("", lambda: image)] if wanted else []))]
    if hasattr(photos, "convert"):  # a Pillow image
        return _sources(np.asarray(photos.convert("RGB")))
    return [source for photo in photos for source in _sources(photo)]


def _checked(image: np.ndarray) -> np.ndarray:
    if (
        image.dtype != np.uint8
        or image.ndim not in (2, 3)
        or (image.ndim == 3 and image.shape[2] not in (1, 3, 4))
        or not image.size
    ):
        raise UsageError(
            f"a photo is {image.dtype}{list(image.shape)}, expected uint8[h w 3] (RGB, 0 to 255)"
        )
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.shape[2] == 4:  # transparency shows white, as in files
        alpha = image[..., 3:].astype(np.float32) / 255
        return (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return image


class Seen(NamedTuple):
    """A photo that was read. image: where it is needed later. look: or why there is none."""

    name: str
    image: np.ndarray | None
    look: Look | str


def _segment(
    student: Student,
    photos: Iterator[Unread],
    total: int,
    config: PredictConfig,
    skipped: list[tuple[str, str]],
    write: Callable[[Prediction], object] = lambda prediction: None,
) -> Iterator[Prediction]:
    """Decode in threads, label a batch of photos on the devices, enlarge and `write` in threads:
    few photos are held at their own size. Those that cannot be read go to `skipped`.
    """
    kept = config.out is None or config.cutouts or config.format != "png"
    soft = config.soft or (config.cutouts and config.format == "png")

    def read_one(photo: Unread) -> Seen:
        name, read = photo
        try:
            image = read()
        except Unusable as reason:
            return Seen(name, None, str(reason))
        found = student.look(image, config.inference.size, edges=config.inference.edges)
        return Seen(name, image if kept else None, found)

    def finish(labelled: tuple[str, np.ndarray | None, Look, np.ndarray]) -> Prediction:
        name, image, look, small = labelled
        scores = student.full_scores(small, look) if soft else None
        if scores is None:
            mask = student.mask(small, look)
        else:
            mask = student.ids[scores[..., student.ids].argmax(-1)]
        prediction = Prediction(name, image, mask, scores)
        write(prediction)
        return prediction

    threads = min(cores(), _THREADS)
    labelled = _labelled(student, in_threads(read_one, photos, threads), config, skipped)
    yield from progress(total, "predict", "photo", in_threads(finish, labelled, threads))


def _labelled(
    student: Student, seen: Iterator[Seen], config: PredictConfig, skipped: list[tuple[str, str]]
) -> Iterator[tuple[str, np.ndarray | None, Look, np.ndarray]]:
    """(name, image, look, probabilities at the size the network works at) of photos."""
    count = config.inference.batch * len(parallel.local_devices())
    while chunk := list(islice(seen, count)):
        good = []
        for name, image, look in chunk:
            if isinstance(look, str):
                say(f"skipped {name}: {look}")
                skipped.append((name, look))
            else:
                good.append((name, image, look))
        inputs = [look.seen for _, _, look in good]
        found = student.probabilities(
            inputs, flip=config.inference.flip, tile=config.inference.tile
        )
        yield from ((*photo, scores) for photo, scores in zip(good, found))


def _write_extras(folder: Path, prediction: Prediction, config: PredictConfig) -> None:
    target = mask_path(folder, prediction.name)
    if config.soft and prediction.scores is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, scores=prediction.scores.astype(np.float16))
        write_atomic(target.with_suffix(".npz"), buffer.getvalue())
    if config.cutouts and prediction.image is not None:
        write_atomic(
            target.with_name(f"{target.stem}-cutout.png"),
            draw.png(cutout(prediction.image, prediction.mask, prediction.scores)),
        )


def _check_apart(folder: Path, photos: Any) -> None:
    """Masks beside photos would be photos the next time, or take their place."""
    source = Path(photos).resolve() if isinstance(photos, str | Path) else None
    if (
        source is not None
        and source.is_dir()
        and (folder.resolve() == source or source in folder.resolve().parents)
    ):
        raise UsageError(
            f"--out {folder} is inside the folder of the photos, {photos}; give a folder outside it"
        )


def _open_folder(
    folder: Path,
    names: list[str],
    config: dict[str, Any],
    classes: tuple,
    overwrite: bool,
    held: contextlib.ExitStack,
) -> None:
    """Make the folder, or open one that predict wrote, and hold it as long as `held`."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; masks need a folder: give another --out")
    mark, config = folder / _MARK, plain(config)
    ours = mark.is_file()
    if folder.is_dir() and not ours and any(p.name[0] != "." for p in folder.iterdir()):
        raise UsageError(
            f"{folder} holds other files and no masks of ours: give an empty or new folder as --out"
        )
    same = ours and _read_mark(mark) == config
    if ours and not same and not overwrite:
        raise UsageError(
            f"{folder} holds masks made with another student or other settings: give another "
            "--out, or --overwrite"
        )
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held.callback(FolderLock(folder / ".lock").release)
        remove_temporary(folder)
        if ours and (overwrite or not same):
            # so that a run that is stopped now does not take the old ones for its own
            for name in names:
                (folder / mask_file(name)).unlink(missing_ok=True)
    if not same:
        write_atomic(mark, json.dumps(config).encode())  # first: now all that follows is ours
    if not (same and (folder / "classes.json").is_file()):
        write_classes(folder, classes)


def _read_mark(mark: Path) -> Any:
    try:
        return parse_json(mark.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def plan(config: PredictConfig) -> dict[str, Any]:
    png = config.format == "png"
    names = ["classes.json", "<stem>.png"] if png else [f"a dataset in the {config.format} format"]
    return {"files": [f"{config.out}/{n}" for n in names] if config.out else []}


def results(masks: Masks, config: PredictConfig) -> list[Path]:
    return [Path(config.out)] if config.out else []


def problems(masks: Masks) -> str:
    """The sentence for photos that were left out, "" where there are none."""
    if not masks.skipped:
        return ""
    return (
        f"{len(masks.skipped)} of {len(masks.skipped) + len(masks)} photos could not be read: "
        f"{left_out(masks.skipped)}"
    )


def summary(masks: Masks, config: PredictConfig) -> list[str]:
    if config.out is None or not isinstance(config.run, str) or not len(masks):
        return []
    photos = shlex.quote(config.photos) if isinstance(config.photos, str) else "PHOTOS/"
    return [
        f"{len(masks)} photos with masks of {', '.join(c['name'] for c in masks.classes)}",
        f"next, with masks annotated by hand: python -m sis_jax.evaluate {shlex.quote(config.run)} "
        f"--images {photos} --masks ANNOTATED/",
    ]
