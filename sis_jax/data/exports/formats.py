"""Datasets in other formats: one function `save(splits, classes, folder, card) -> note` each."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sis_jax.data.exports.items import items
from sis_jax.data.files import json_bytes, replacing, utf8
from sis_jax.ops.progress import progress, say
from sis_jax.types import UsageError, unknown_name

# name -> the function that writes it; each one's docstring states its losses.
FORMATS = {
    "coco": "sis_jax.data.exports.coco:save",
    "voc": "sis_jax.data.exports.voc:save",
    "yolo": "sis_jax.data.exports.yolo:save",
    "hf": "sis_jax.data.exports.hf:save",
    "npz": "sis_jax.data.exports.npz:save",
    "tfds": "sis_jax.data.exports.tfds:save",
    "tfrecord": "sis_jax.data.exports.tfds:save_tfrecord",
}
_MARK = ".sis-export.json"  # marks a folder we wrote; others must not be touched
_CLASSES = "classes.json"


def write(
    format: str,  # noqa: A002
    examples: Iterable[Any] | Mapping[str, Iterable[Any]],
    classes: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    card: str = "",
    licence: str = "",
    split: str = "train",
    overwrite: bool = False,
) -> Path:
    """Write images and masks to `folder` in another format, streamed; it appears whole or not at
    all.

    format: of `FORMATS`. examples: objects with `.name`, `.image` uint8[h w 3] or None, `.mask`
        uint8[h w], maybe `.seed`, `.confidence`, `.scores` float[h w c]; or tuples (name, image or
        None, mask[, scores]); or {split: such a stream}. classes: as in classes.json. card:
        Markdown on their origin. licence: one line, where the card has none. split: the name of a
        lone stream. overwrite: replace an earlier export.
    Returns the folder. Raises UsageError for an unknown format or a folder that is not empty,
    SisError for data that do not fit together.
    """
    save = _writer(format)
    streams = examples if isinstance(examples, Mapping) else {split: examples}
    with new_folder(folder, format, overwrite) as place:
        note = save(
            {name: items(stream, classes) for name, stream in streams.items()},
            list(classes),
            place,
            card,
        )
        if not (place / _CLASSES).exists():
            (place / _CLASSES).write_bytes(json_bytes(classes))
        (place / "README.md").write_bytes(utf8(_card(place, card, licence, format, note)))
    if note:
        say(f"{format}: {note}")
    return Path(os.path.abspath(Path(folder).expanduser()))


@contextlib.contextmanager
def new_folder(
    folder: str | os.PathLike[str],
    format: str,  # noqa: A002
    overwrite: bool = False,
) -> Iterator[Path]:
    """A temporary folder to fill; afterwards it is at `folder`, marked as ours, or not at all.

    Raises UsageError where `folder` is not empty (overwrite: no earlier export), SisError for a
    full disk.
    """
    target = Path(os.path.abspath(Path(folder).expanduser()))
    _check_target(target, overwrite)
    with replacing(target, last=_MARK) as place:
        yield place
        (place / _MARK).write_text(json.dumps({"format": format}) + "\n", encoding="utf-8")


def write_dataset(
    format_name: str, dataset: Any, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """`write` for a whole `Dataset`, all its splits."""
    streams = {name: dataset.split(name) for name in dataset.splits}
    shown = {
        name: progress(len(split), f"export {format_name}, {name}", "image", split)
        for name, split in streams.items()
    }
    return write(
        format_name, shown, dataset.classes, folder,
        card=dataset.card, licence=dataset.licence, overwrite=overwrite,
    )  # fmt: skip


def _writer(name: str) -> Callable[..., str]:
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS)
    module, _, function = FORMATS[name].partition(":")
    return getattr(importlib.import_module(module), function)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; an export needs a folder: give another --out")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"{target} is not empty; give another --out, or --overwrite to replace an earlier "
            "export"
        )
    if not (target / _MARK).is_file():
        raise UsageError(
            f"{target} holds other things than an export (no {_MARK}), so --overwrite leaves it "
            "alone; give another --out"
        )


def _card(folder: Path, card: str, licence: str, kind: str, note: str) -> str:
    """README.md: the dataset's card, then a description of this copy."""
    made = folder / "README.md"
    text = made.read_text(encoding="utf-8") if made.exists() else card
    parts = [text.rstrip()] if text.strip() else ["# Images and masks"]
    if licence and licence not in text:
        parts.append(f"Licence: {licence}")
    parts.append(
        f"## This copy\n\nWritten by sis_jax in the format `{kind}`." + (f" {note}" if note else "")
    )
    return "\n\n".join(parts) + "\n"
