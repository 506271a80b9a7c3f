"""Our own weights folders: `config.json` (shape and origin), `model.safetensors`, `README.md`; a discriminator lies beside the generator.

Every file is written under a temporary name and renamed. `config.json` goes last and holds the digests of the others, so a folder that was
cut off while it was written, or changed afterwards, is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.core.types import Info, SisError, UsageError

CONFIG, MODEL, DISCRIMINATOR, CARD = "config.json", "model.safetensors", "discriminator.safetensors", "README.md"
FORMAT = "sis_jax weights"
VERSION = 1
_FLOAT16_MAX = 6e4

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Folder:
    """What `config.json` says. kind: "stylegan2" or "dcgan". generator, discriminator: the fields of the networks' configs.

    source: name of the file it was converted from, its sha256 and layout. sha256: digests of the files of this folder. notes: what the converter had
    to supply. digests: those of pictures of fixed seeds (`convert_weights.py --verify`).
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

    def info(self, file: str = MODEL) -> Info:
        """The origin, as every network carries it; sha256 is that of `file`."""
        origin = self.source.get("file") or "trained by sis_jax"
        return Info(self.name, self.licence, origin, self.sha256.get(file, ""), self.source.get("layout", "sis_jax"))


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SisError(f"cannot write {path}: {error.strerror or error}") from None


def is_folder(path: Path) -> bool:
    """True where a folder holds one of ours."""
    return (path / CONFIG).is_file()


def read_config(path: Path) -> Folder:
    """The `config.json` of a weights folder, checked. UsageError where the folder is none of ours."""
    if not is_folder(path):
        raise UsageError(f"{path} is no weights folder: looked for {CONFIG} beside {MODEL} in it; make one with scripts/convert_weights.py")
    try:
        raw = json.loads((path / CONFIG).read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SisError(f"{path / CONFIG} cannot be read ({error}): convert the checkpoint again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UsageError(f'{path / CONFIG} is no weights folder of sis_jax: expected "format": "{FORMAT}" in it')
    if raw.get("version") != VERSION:
        raise UsageError(
            f"{path / CONFIG} has version {raw.get('version')}, this sis_jax reads version {VERSION}: update sis_jax or convert again"
        )
    kind, generator = raw.get("kind"), raw.get("generator")
    if not isinstance(kind, str) or not isinstance(generator, dict):
        raise SisError(f'{path / CONFIG} lacks "kind" or "generator": convert the checkpoint again')
    texts = {
        key: raw[key] if isinstance(raw.get(key), str) else default for key, default in (("name", path.name), ("licence", Info.licence))
    }
    tables = {key: raw[key] if isinstance(raw.get(key), dict) else {} for key in ("source", "sha256")}
    optional = {key: raw[key] if isinstance(raw.get(key), dict) else None for key in ("discriminator", "digests")}
    notes = tuple(map(str, raw["notes"])) if isinstance(raw.get("notes"), list) else ()
    return Folder(kind=kind, generator=generator, notes=notes, **texts, **tables, **optional)


def read_arrays(path: Path, folder: Folder, file: str = MODEL) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of one file of a weights folder, with its sha256, which must be the one in the config."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    where = path / file
    if not where.is_file():
        raise UsageError(f"{path} holds no {file}")
    digest = sha256_of(where)
    if folder.sha256.get(file, digest) != digest:
        raise SisError(
            f"{where} is not the file that {CONFIG} describes (sha256 {digest[:12]}...): it is damaged or was changed; convert it again"
        )
    try:
        return dict(load_file(where)), digest
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise SisError(f"{where} cannot be read: {error}") from None


def write_folder(path: Path, folder: Folder, model: Arrays, discriminator: Arrays | None, card: str, dtype: str = "float32") -> Folder:
    """Write a weights folder; returns what its config says, digests included.

    dtype: "float32", or "float16" for half the size (numbers beyond its range keep the array in float32).
    """
    from safetensors.numpy import save

    if dtype not in ("float32", "float16"):
        raise UsageError(f'weights are stored as "float32" or "float16", not {dtype!r}')
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SisError(f"cannot make the folder {path}: {error.strerror or error}") from None
    digests = {}
    for file, arrays in ((MODEL, model), (DISCRIMINATOR, discriminator)):
        if arrays is None:
            continue
        data = save({key: _stored(value, dtype) for key, value in arrays.items()}, metadata={"format": "np"})
        write_atomic(path / file, data)
        digests[file] = hashlib.sha256(data).hexdigest()
    if discriminator is None:
        (path / DISCRIMINATOR).unlink(missing_ok=True)
    write_atomic(path / CARD, card.encode())
    folder = Folder(**{**_fields(folder), "sha256": digests})
    write_config(path, folder)
    return folder


def write_config(path: Path, folder: Folder) -> None:
    """Write `config.json` of a folder."""
    content = {"format": FORMAT, "version": VERSION, **asdict(folder)}
    write_atomic(path / CONFIG, (json.dumps(content, indent=1) + "\n").encode())


def _fields(folder: Folder) -> dict[str, Any]:
    return {key: getattr(folder, key) for key in Folder.__dataclass_fields__}


def _stored(value: np.ndarray, dtype: str) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if dtype == "float16" and (value.size == 0 or np.abs(value).max() < _FLOAT16_MAX):
        value = value.astype(np.float16)
    return np.array(value, order="C")
