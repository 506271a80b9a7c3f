"""Our weights folders: `config.json` (shape, origin), `model.safetensors`, `README.md`.

`config.json` is written last with the digests of the others, so that a folder that was cut off or
changed is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sis_jax.data.files import parse_json, utf8, write_atomic, write_parts
from sis_jax.data.files import replacing as new_folder
from sis_jax.data.names import below
from sis_jax.types import Info, SisError, UsageError

CONFIG = "config.json"
MODEL = "model.safetensors"
DISCRIMINATOR = "discriminator.safetensors"
CARD = "README.md"
FORMAT = "sis_jax weights"
STUDENT_FORMAT = "sis_jax student"
VERSION = 1  # of both
_FLOAT16_MAX = 6e4
_OURS = {CONFIG, MODEL, DISCRIMINATOR, CARD, "vocab.json", "merges.txt"}
KINDS = {
    "stylegan2": "a StyleGAN2 generator",
    "dcgan": "a DCGAN generator",
    "biggan": "a BigGAN generator",
    "furrygan": "a FurryGAN generator",
    "clip": "a CLIP",
    "backbone": "a backbone",
}

Arrays = Mapping[str, np.ndarray]


def in_words(kind: str) -> str:
    """A kind as it stands in a sentence: "a StyleGAN2 generator"."""
    return KINDS.get(kind, f"weights of the kind {kind!r}")


def loader(kind: str) -> str:
    """The public function that loads weights of a kind."""
    return {"clip": "load_clip", "backbone": "load_backbone"}.get(kind, "load_generator")


@dataclass(frozen=True)
class Folder:
    """The content of `config.json`; generator, discriminator, clip, backbone: their configs'
    fields.

    source: file, sha256 and layout it was converted from. sha256: of this folder's files. notes:
        settings that the converter supplied. digests: of images of fixed seeds.
    """

    kind: str
    name: str
    licence: str
    generator: dict[str, Any]
    discriminator: dict[str, Any] | None = None
    source: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    digests: dict[str, Any] | None = None
    clip: dict[str, Any] | None = None
    backbone: dict[str, Any] | None = None

    def info(self, file: str = MODEL) -> Info:
        """The origin, as every network carries it; sha256 is that of `file`."""
        origin = self.source.get("file") or "trained by sis_jax"
        return Info(
            self.name,
            self.licence,
            origin,
            self.sha256.get(file, ""),
            self.source.get("layout", "sis_jax"),
        )


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise SisError(f"{os.fspath(path)} cannot be read: {error.strerror or error}") from None


def _parts(arrays: Arrays, dtype: str) -> Iterator[bytes | memoryview]:
    """A .safetensors file, array by array; the library's writer would hold it twice."""
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    kinds, end = {}, 0
    for key, value in arrays.items():
        fits = dtype == "float16" and (value.size == 0 or np.abs(value).max() < _FLOAT16_MAX)
        kinds[key] = np.dtype("<f2" if fits else "<f4")
        begin, end = end, end + value.size * kinds[key].itemsize
        header[key] = {
            "dtype": "F16" if fits else "F32",
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    data = (
        np.ascontiguousarray(value, kinds[key]).reshape(-1).data.cast("B")
        for key, value in arrays.items()
        if value.size
    )
    return chain([len(head).to_bytes(8, "little"), head], data)


def write_arrays(path: Path, arrays: Arrays, dtype: str) -> str:
    """Write a .safetensors file; returns its sha256."""
    return write_parts(path, _parts(arrays, dtype))


def digest_of(arrays: Arrays) -> str:
    """The sha256 that the float32 file of these arrays would have."""
    digest = hashlib.sha256()
    for part in _parts(arrays, "float32"):
        digest.update(part)
    return digest.hexdigest()


def is_folder(path: Path) -> bool:
    """Whether a folder is one of ours by its config; a damaged one is, Hugging Face's is not."""
    try:
        config = parse_json((path / CONFIG).read_text("utf-8"))
    except ValueError:
        return True
    except OSError:
        return False
    if not isinstance(config, dict) or "format" in config:
        return True
    return not {"model_type", "architecture"} & config.keys()


def is_ours(path: Path, kind: str = FORMAT) -> bool:
    """Whether `config.json` states it; asked before a folder is written or listed by name."""
    try:
        config = parse_json((path / CONFIG).read_text("utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(config, dict) and config.get("format") == kind


def replacing(folder: Path) -> AbstractContextManager[Path]:
    """A new folder that takes the place of `folder` at the end; foreign files there stay."""
    return new_folder(folder, _OURS, CONFIG)


def read_config(path: Path) -> Folder:
    """The `config.json` of a weights folder, checked; UsageError where it is none of ours."""
    if not is_folder(path):
        raise UsageError(
            f"{path} is no weights folder: looked for {CONFIG} beside {MODEL} in it; make one "
            "with scripts/convert_weights.py"
        )
    try:
        raw = parse_json((path / CONFIG).read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise SisError(
            f"{path / CONFIG} cannot be read ({error}): convert the checkpoint again"
        ) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UsageError(
            f'{path / CONFIG} is no weights folder of sis_jax: expected "format": "{FORMAT}" in it'
        )
    check_version(path, raw, "convert again")
    kind, generator = raw.get("kind"), raw.get("generator")
    if not isinstance(kind, str) or not isinstance(generator, dict):
        raise SisError(f'{path / CONFIG} lacks "kind" or "generator": convert the checkpoint again')
    texts = _texts(raw)
    discriminator, digests, clip, backbone = (
        raw[key] if isinstance(raw.get(key), dict) else None
        for key in ("discriminator", "digests", "clip", "backbone")
    )
    return Folder(
        kind=kind,
        name=texts.get("name", path.name),
        licence=texts.get("licence", Info.licence),
        generator=generator,
        discriminator=discriminator,
        source=_texts(raw.get("source")),
        sha256=_texts(raw.get("sha256")),
        notes=tuple(map(str, raw["notes"])) if isinstance(raw.get("notes"), list) else (),
        digests=digests,
        clip=clip,
        backbone=backbone,
    )


def check_version(path: Path, raw: Mapping[str, Any], cure: str) -> None:
    """UsageError for the `config.json` of a later version."""
    if raw.get("version") != VERSION:
        raise UsageError(
            f"{path / CONFIG} has version {raw.get('version')}, this sis_jax reads version "
            f"{VERSION}: update sis_jax, or {cure}"
        )


def _texts(table: Any) -> dict[str, str]:
    """The entries of a JSON object that are texts."""
    if isinstance(table, dict):
        return {key: value for key, value in table.items() if isinstance(value, str)}
    return {}


def read_arrays(path: Path, folder: Folder, file: str = MODEL) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of one file of a weights folder, and its sha256, checked against the config."""
    where = path / file
    if not where.is_file():
        raise UsageError(f"{path} holds no {file}")
    digest = sha256_of(where)
    if folder.sha256.get(file, digest) != digest:
        raise SisError(
            f"{where} is not the file that {CONFIG} describes (sha256 {digest[:12]}...): it is "
            "damaged or was changed; convert it again"
        )
    try:
        return dict(load_file(where)), digest
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise SisError(f"{where} cannot be read: {error}") from None


def write_folder(
    path: Path,
    folder: Folder,
    model: Arrays,
    discriminator: Arrays | None,
    card: str,
    dtype: str = "float32",
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> Folder:
    """Write a weights folder; returns its config, digests included.

    dtype: "float32", or "float16" (arrays beyond its range stay float32). others: more files by
        name.
    """
    if dtype not in ("float32", "float16"):
        raise UsageError(f'weights are stored as "float32" or "float16", not {dtype!r}')
    ours = is_ours(path)
    if not ours and (path / CONFIG).exists():
        raise UsageError(
            f'{path / CONFIG} is not one of sis_jax ("format": "{FORMAT}" is not in it) and stays '
            "as it is: give another folder"
        )
    digests = {}
    for file, arrays in ((MODEL, model), (DISCRIMINATOR, discriminator)):
        if arrays is None:
            continue
        digests[file] = write_arrays(path / file, arrays, dtype)
    for file, content in others.items():
        digests[file] = write_parts(below(path, file, path), [content])
    if discriminator is None and ours:
        (path / DISCRIMINATOR).unlink(missing_ok=True)
    write_atomic(path / CARD, utf8(card))
    folder = replace(folder, sha256=digests)
    write_config(path, folder)
    return folder


def write_config(path: Path, folder: Folder) -> None:
    """Write `config.json` of a folder."""
    content = {"format": FORMAT, "version": VERSION, **asdict(folder)}
    if folder.backbone is None:
        del content["backbone"]  # the configs of other kinds keep their bytes
    write_atomic(path / CONFIG, (json.dumps(content, indent=1) + "\n").encode())
