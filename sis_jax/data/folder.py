"""The image + mask dataset on disk: `data/` of a run.

    data/
    ├── classes.json       [{"id": 1, "name": "hair", "colour": "#c0392b", "prompts": [...],
    │                        "clusters": [3, 7], "score": .., "margin": ..}]
    ├── README.md          how it was made, and the licence that follows from the generator
    ├── train/images/000000.png · metadata.jsonl
    │         masks/000000.png   8-bit palette, pixel = class id
    └── val/ …

A split is whole once its `metadata.jsonl` is there: it goes last. Until then the rows wait in
`.chunks/`, one file per finished chunk, the state of a resumed run and of several processes that
write one dataset. Hugging Face `datasets` loads the folder as it is (`imagefolder`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sis_jax.data import draw
from sis_jax.data.decode import Unusable, load_image
from sis_jax.data.files import check_folder, json_bytes, parse_json, write_atomic
from sis_jax.data.names import below
from sis_jax.data.threads import in_threads
from sis_jax.types import SisError, UsageError

METADATA, CLASSES, CARD = "metadata.jsonl", "classes.json", "README.md"
_CHUNKS = ".chunks"
# zlib's, of images: the usual 6 takes two to four times as long for files that are 12 to 26 %
# smaller (generated images of 1024 pixels, with and without noise).
_LEVEL = 1
_MAKE = "make one with python -m sis_jax.synthesize RUN"


@dataclass(frozen=True)
class Example:
    """One image uint8[h w 3] with its mask uint8[h w] of class ids, 255 = ignore.

    certainty: float32[h w] in 0..1, the confidence per pixel, where kept. confidence: its mean.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    mask: UInt8[np.ndarray, "h w"]
    seed: int | None = None
    confidence: float | None = None
    certainty: Float[np.ndarray, "h w"] | None = None


@dataclass(frozen=True)
class Split(
    Sequence
):  # not Sequence[Example]: a checker of types would read an image to see whether it is one
    """The examples of one split, read when asked for."""

    path: Path
    rows: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        image = np.asarray(_open(self._place(row, "file_name")).convert("RGB"))
        mask = np.asarray(_open(self._place(row, "mask_file_name")))
        if mask.ndim != 2 or mask.shape != image.shape[:2]:
            raise SisError(
                f"{self.path / row['mask_file_name']} has the shape {mask.shape}, its image "
                f"{image.shape}: {_MAKE} --overwrite"
            )
        certainty = None
        if row.get("certainty_file_name"):
            certainty = (
                np.asarray(_open(self._place(row, "certainty_file_name")).convert("L"), np.float32)
                / 255
            )
        name = Path(row["file_name"]).stem
        return Example(
            name, image, mask.astype(np.uint8), row.get("seed"), row.get("confidence"), certainty
        )

    def _place(self, row: Mapping[str, Any], key: str) -> Path:
        return below(self.path, row.get(key), self.path / METADATA)


def _open(path: Path) -> Image.Image:
    try:
        return load_image(path)
    except Unusable as error:
        raise SisError(
            f"{path} cannot be read ({error}): the dataset is damaged; {_MAKE} --overwrite"
        ) from None


@dataclass(frozen=True)
class Dataset:
    """A dataset of images and masks. classes: as in classes.json; splits: those that are whole."""

    path: Path
    classes: tuple[dict[str, Any], ...]
    splits: tuple[str, ...]
    card: str = ""

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """The dataset in a data folder or a run; UsageError without one that is finished."""
        path = Path(path)
        check_folder(path)
        place = path / "data" if (path / "data" / CLASSES).is_file() else path
        if not (place / CLASSES).is_file():
            raise UsageError(f"{path} holds no dataset (looked for {CLASSES}): {_MAKE}")
        splits = tuple(sorted(f.parent.name for f in place.glob(f"*/{METADATA}")))
        if "train" not in splits:
            raise UsageError(
                f"the dataset in {place} is not finished: give the synthesize command again, it "
                "resumes"
            )
        try:
            classes = checked_classes(parse_json((place / CLASSES).read_text("utf-8")))
            card = (place / CARD).read_text("utf-8") if (place / CARD).exists() else ""
        except (OSError, ValueError) as error:
            raise SisError(
                f"{place / CLASSES} cannot be read ({error}); {_MAKE} --overwrite"
            ) from None
        return cls(place, classes, splits, card)

    @property
    def licence(self) -> str:
        """The terms of the images, from the card."""
        return next(
            (
                line.split(":", 1)[1].strip()
                for line in self.card.splitlines()
                if line.startswith("Licence:")
            ),
            "unknown",
        )

    @property
    def names(self) -> dict[int, str]:
        """Class id -> name."""
        return {c["id"]: c["name"] for c in self.classes}

    def split(self, name: str = "train") -> Split:
        """One split. Raises UsageError for a name that is not there."""
        if name not in self.splits:
            raise UsageError(
                f"the dataset in {self.path} has no split {name!r}; it has {', '.join(self.splits)}"
            )
        try:
            lines = (self.path / name / METADATA).read_text("utf-8").splitlines()
            rows = tuple(parse_json(line) for line in lines)
            for number, row in enumerate(rows, 1):
                _check_row(number, row)
            return Split(self.path / name, rows)
        except (OSError, ValueError) as error:
            raise SisError(
                f"{self.path / name / METADATA} cannot be read ({error}); {_MAKE} --overwrite"
            ) from None

    def __len__(self) -> int:
        return sum(len(self.split(name)) for name in self.splits)

    def show(self, count: int = 8, split: str = "train") -> Image.Image:
        """Images over their masks over both, as one image; a notebook draws it."""
        shown = self.split(split)[: max(1, count)]
        images, masks = np.stack([e.image for e in shown]), np.stack([e.mask for e in shown])
        return Image.fromarray(draw.sample_grid(images, masks, [e.name for e in shown]))

    def _repr_png_(self) -> bytes:
        return draw.png(self.show())


def _check_row(number: int, row: Any) -> None:
    """ValueError where a line of metadata.jsonl is no example; its names are checked on reading."""
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    seed, confidence = row.get("seed"), row.get("confidence")
    if not (seed is None or type(seed) is int):
        raise ValueError(f"the seed in line {number} is {str(seed)[:40]!a}, expected an integer")
    if not (confidence is None or type(confidence) in (int, float)):
        raise ValueError(f"the confidence in line {number} is {str(confidence)[:40]!a}")


def checked_classes(classes: Any) -> tuple[dict[str, Any], ...]:
    """The content of classes.json; ValueError where it is none."""
    whole = isinstance(classes, list) and all(
        isinstance(c, dict)
        and type(c.get("id")) is int
        and 0 <= c["id"] < draw.IGNORE
        and isinstance(c.get("name"), str)
        for c in classes
    )
    if not whole:
        raise ValueError('expected a list of {"id": 0 to 254, "name": "hair"}')
    if len({c["id"] for c in classes}) < len(classes):
        raise ValueError("two of the classes have one id")
    return tuple(classes)


class SplitWriter:
    """Writes one split in chunks, in any order, by any process, and again; then `finish`."""

    def __init__(self, folder: Path, total: int, chunk: int):
        self.folder, self.total, self.chunk = folder, total, chunk
        self.digits = max(6, len(str(total - 1)))

    def chunks(self) -> list[range]:
        """The chunks of example numbers."""
        return [
            range(start, min(start + self.chunk, self.total))
            for start in range(0, self.total, self.chunk)
        ]

    def _record(self, start: int) -> Path:
        return self.folder / _CHUNKS / f"{start:0{self.digits}d}.jsonl"

    def done(self, chunk: range) -> bool:
        """Whether this chunk was written before."""
        return self.finished or self._record(chunk.start).is_file()

    @property
    def finished(self) -> bool:
        return (self.folder / METADATA).is_file()

    def record(self, chunk: range, rows: Iterable[Mapping[str, Any]]) -> None:
        """Note that a chunk is written. rows: its lines of metadata.jsonl."""
        write_atomic(
            self._record(chunk.start), "".join(json.dumps(row) + "\n" for row in rows).encode()
        )

    def write_one(self, number: int, example: Example) -> dict[str, Any]:
        """Write the files of one example; returns its line of metadata.jsonl."""
        name = f"{number:0{self.digits}d}.png"
        row: dict[str, Any] = {"file_name": f"images/{name}", "mask_file_name": f"masks/{name}"}
        write_atomic(self.folder / row["file_name"], draw.png(example.image, compress_level=_LEVEL))
        write_atomic(self.folder / row["mask_file_name"], draw.png(draw.palette_png(example.mask)))
        if example.certainty is not None:
            row["certainty_file_name"] = f"certainty/{name}"
            grey = np.round(255 * np.clip(example.certainty, 0, 1)).astype(np.uint8)
            write_atomic(self.folder / row["certainty_file_name"], draw.png(grey))
        confidence = None if example.confidence is None else round(float(example.confidence), 5)
        return row | {"seed": example.seed, "confidence": confidence}

    def finish(self) -> None:
        """Put the metadata of all chunks into one file; SisError where a chunk is missing."""
        parts = [self._record(chunk.start) for chunk in self.chunks()]
        if not self.finished:
            missing = [p for p in parts if not p.is_file()]
            if missing:
                raise SisError(
                    f"{len(missing)} of {len(parts)} pieces of {self.folder} were not written: "
                    "give the same command again, it resumes"
                )
            rows = b"".join(p.read_bytes() for p in parts)
            write_atomic(self.folder / METADATA, rows, durable=True)
        for part in parts:  # a process that was stopped may have left some
            part.unlink(missing_ok=True)
        if (self.folder / _CHUNKS).is_dir():
            (self.folder / _CHUNKS).rmdir()


def write_chunks(
    todo: Sequence[tuple[SplitWriter, range]],
    examples: Iterator[Example],
    written: Callable[[int], object] = lambda count: None,
) -> None:
    """Write chunks one after another on all cores while the next images are drawn; the examples'
    names become their numbers.
    """
    places = ((writer, number) for writer, chunk in todo for number in chunk)

    def write_one(job: tuple[tuple[SplitWriter, int], Example]) -> dict[str, Any]:
        (writer, number), example = job
        return writer.write_one(number, example)

    def in_order() -> Iterator[dict[str, Any]]:
        for row in in_threads(write_one, zip(places, examples, strict=True)):
            written(1)
            yield row

    rows = in_order()
    for writer, chunk in todo:
        writer.record(chunk, list(islice(rows, len(chunk))))


def classes_json(classes: Sequence[Mapping[str, Any]]) -> bytes:
    """The content of classes.json."""
    return json_bytes(classes)
