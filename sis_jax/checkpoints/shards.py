"""Checkpoints of several files: Hugging Face's index, which stands for its shards everywhere."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from sis_jax.checkpoints import files
from sis_jax.checkpoints.containers import read_tree as read_file
from sis_jax.data.files import parse_json
from sis_jax.data.names import below
from sis_jax.types import SisError

# Names of the weights in a Hugging Face folder, best first: formats without pickle, then with.
WEIGHTS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_INDEX = re.compile(r"(?:model\.safetensors|pytorch_model\.bin)\.index(?:\.\w+)?\.json")
_VARIANT = re.compile(r"(?:open_clip_)?(?:model\.(\w+)\.safetensors|pytorch_model\.(\w+)\.bin)")
_SHARD = re.compile(r".*-\d{5}-of-(\d{5})(?:\.\w+)?\.(?:safetensors|bin)")
_ORDER = ("fp32", "bf16", "fp16")  # of variants, where the weights themselves are not there
_MAX_INDEX = 64 << 20  # bytes


def is_standard(name: str) -> bool:
    """True for a file with a generic name: its folder is the model."""
    return name in WEIGHTS or bool(_INDEX.fullmatch(name) or _VARIANT.fullmatch(name))


def find(folder: Path) -> Path | None:
    """The weights in a Hugging Face folder: whole, an index, or another precision; or None."""
    whole = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if whole is not None:
        return whole
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError:
        return None
    found = [name for pattern in (_INDEX, _VARIANT) for name in names if pattern.fullmatch(name)]
    return folder / min(found, key=_rank) if found else None


def _rank(name: str) -> tuple[bool, int, bool]:
    """safetensors before pickles, more precise before less, shards before one file."""
    words = name.split(".")
    place = next((i for i, word in enumerate(_ORDER, 1) if word in words), 0)
    return "safetensors" not in words, place, not _INDEX.fullmatch(name)


def parts_of(path: Path) -> list[Path]:
    """The files that hold the arrays; SisError for a damaged index or missing shards."""
    if not _INDEX.fullmatch(path.name):
        return [path]
    return [below(path.parent, name, path) for name in sorted(set(_weight_map(path).values()))]


def _weight_map(path: Path) -> dict[str, str]:
    """Array -> shard."""
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        table = parse_json(path.read_text("utf-8"))["weight_map"]
        if not table or not all(isinstance(v, str) for v in table.values()):
            raise ValueError("its weight_map names no files")
        shards = {below(path.parent, name, path) for name in set(table.values())}
    except SisError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SisError(f"{path} cannot be read as an index of shards: {error}") from None
    missing = sorted(shard.name for shard in shards if not shard.is_file())
    if missing:
        raise SisError(
            f"{path} names {len(shards)} shards, of which {len(missing)} are not beside it, the "
            f"first is {missing[0]}: download it again"
        )
    return table


def read_tree(path: Path) -> Any:
    """As `containers.read_tree`, shards as one table; SisError for a lone or incomplete one."""
    if not _INDEX.fullmatch(path.name):
        match = _SHARD.fullmatch(path.name)
        if match and int(match[1]) > 1:
            raise SisError(f"{path} is one of {int(match[1])} shards: give their folder")
        return read_file(path)
    table = _weight_map(path)
    whole: dict[str, Any] = {}
    for shard in parts_of(path):
        tree = read_file(shard)
        if not isinstance(tree, dict):
            raise SisError(f"{shard} holds no table of arrays: download it again")
        twice = next((key for key in tree if key in whole), None)
        lost = next((k for k, name in table.items() if name == shard.name and k not in tree), None)
        if twice is not None or lost is not None:
            what = f"holds {str(lost)[:80]!r} in no place" if twice is None else "repeats an array"
            raise SisError(f"{shard} {what}, contrary to {path.name}: download it again")
        whole |= tree
    return whole


def size_of(path: Path) -> int:
    """Bytes of all files that hold the arrays."""
    return sum(part.stat().st_size for part in parts_of(path))


def sha256_of(path: Path) -> str:
    """The digest of a checkpoint: of its file, or of the digests of its shards."""
    parts = parts_of(path)
    if parts == [path]:
        return files.sha256_of(path)
    rows = [f"{part.name} {files.sha256_of(part)}" for part in parts]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
