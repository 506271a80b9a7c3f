"""TFDS export: array_record, read with or without TensorFlow, or tfrecord for `tf.data`.


    source = tfds.builder_from_directory(folder).as_data_source("train")
    source[0]["image"], source[0]["mask"]

Images reach TFDS as PNG bytes: it would need TensorFlow to encode arrays itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.data.exports.common import Classes, Splits, need_image, unique_names, with_background
from sis_jax.data.exports.items import Item, ahead, grey_pngs
from sis_jax.data.files import parse_json
from sis_jax.types import UsageError

VERSION = "1.0.0"


def save(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """Features: image, mask (`LabeledImage`), name, seed (-1 unknown), confidence (NaN unknown)."""
    builder_class = _builder_class()
    work = folder / ".tfds"
    builder = builder_class(
        data_dir=str(work),
        file_format="array_record",
        streams=splits,
        labels=labels_by_id(classes),
        card=card,
    )
    prepare(builder)
    for file in Path(builder.data_dir).iterdir():
        os.replace(file, folder / file.name)
    shutil.rmtree(work)
    return (
        "Read it with `tfds.builder_from_directory(FOLDER).as_data_source('train')`; TensorFlow "
        "is not needed. Nothing is lost."
    )


def labels_by_id(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for every class id up to the largest: TFDS looks names up by position."""
    known = with_background(classes)
    # TFDS wants each name once, and one class per line.
    return unique_names(known.get(i, f"unused {i}") for i in range(max(known) + 1))


def prepare(builder: Any) -> None:
    """`download_and_prepare`, quietly and without looking for anything on the network."""
    import tensorflow_datasets as tfds  # late: slow to import, only for this format

    config = tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
    bars = importlib.import_module("tensorflow_datasets.core.utils.tqdm_utils")
    shown = bars._active
    bars.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
            builder.download_and_prepare(download_config=config)
    finally:
        bars.display_progress_bar(shown)


@functools.cache
def _builder_class() -> Any:
    """The builder, made once: TFDS refuses a second class of the same name."""
    import tensorflow_datasets as tfds  # late: slow to import, only for this format

    class SisMasks(tfds.core.GeneratorBasedBuilder):
        """Images with class masks, written by sis_jax."""

        VERSION = tfds.core.Version(VERSION)
        # TFDS looks beside a builder's source for lists of downloads, and needs a package it does
        # not declare (importlib_resources) to find the place.
        code_path = None

        def __init__(
            self,
            *,
            streams: Mapping[str, Iterable[Item]],
            labels: list[str],
            card: str,
            **options: Any,
        ) -> None:
            self._streams, self._labels, self._card = streams, labels, card
            super().__init__(**options)

        def _info(self) -> Any:
            kinds = tfds.features
            features = {
                "image": kinds.Image(shape=(None, None, 3), encoding_format="png"),
                "mask": kinds.LabeledImage(
                    labels=self._labels, shape=(None, None, 1), encoding_format="png"
                ),
                "name": kinds.Text(),
                "seed": kinds.Scalar(np.int64),
                "confidence": kinds.Scalar(np.float32),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=kinds.FeaturesDict(features),
                description=self._card or "Images and masks.",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {
                split: self._generate_examples(stream) for split, stream in self._streams.items()
            }

        def _generate_examples(
            self, stream: Iterable[Item]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, (item, (image, mask)) in enumerate(ahead(grey_pngs, stream)):
                need_image(item, "tfds")
                yield (
                    number,
                    {
                        "image": io.BytesIO(image or b""),
                        "mask": io.BytesIO(mask),
                        "name": item.name,
                        "seed": -1 if item.seed is None else item.seed,
                        "confidence": float("nan") if item.confidence is None else item.confidence,
                    },
                )

    return SisMasks


# ----------------------------------------------------------------------------------------- tfrecord


def save_tfrecord(splits: Splits, classes: Classes, folder: Path, card: str) -> str:
    """The same examples framed as TFRecord, which needs TensorFlow to read."""
    checksum = _checksum()
    save(splits, classes, folder, card)
    for path in sorted(folder.glob("*.array_record*")):
        _reframe(path, path.with_name(path.name.replace("array_record", "tfrecord")), checksum)
        path.unlink()
    info = folder / "dataset_info.json"
    content = parse_json(info.read_text(encoding="utf-8"))
    content["fileFormat"] = "tfrecord"
    for split in content.get("splits", []):
        split["filepathTemplate"] = split.get("filepathTemplate", "").replace(
            "array_record", "tfrecord"
        )
    info.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return (
        "Read it with `tfds.builder_from_directory(FOLDER).as_dataset(split='train')`, which "
        "needs TensorFlow. Nothing is lost."
    )


def _checksum() -> Callable[[bytes], int]:
    try:
        import google_crc32c  # late: an optional package
    except ImportError:
        raise UsageError(
            "the format tfrecord needs google-crc32c: pip install google-crc32c, or use the "
            "format tfds"
        ) from None
    return google_crc32c.value


def _reframe(source: Path, target: Path, checksum: Callable[[bytes], int]) -> None:
    array_record_module = importlib.import_module("array_record.python.array_record_module")

    def masked(data: bytes) -> bytes:
        crc = checksum(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    reader = array_record_module.ArrayRecordReader(str(source))
    try:
        with open(target, "wb") as file:
            for _ in range(reader.num_records()):
                record = reader.read()
                length = struct.pack("<Q", len(record))
                file.write(length + masked(length) + record + masked(record))
    finally:
        reader.close()
