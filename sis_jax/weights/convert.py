"""A checkpoint of any known layout to a weights folder. `scripts/convert_weights.py` is the door to this.

No torch, TensorFlow or CUDA is needed, and nothing that a checkpoint carries is ever run: see `restricted.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.core.types import Info, SisError, UsageError, to_uint8
from sis_jax.nn.conditional import check_classes
from sis_jax.weights import biggan, catalogue, clip_files, clip_model, dcgan, files, load, stylegan2
from sis_jax.weights.containers import read_tree
from sis_jax.weights.sources import Source, recognise

KINDS = ("auto", "stylegan2", "dcgan", "biggan", "clip")
CACHE = "SIS_JAX_CONVERTED"
_CACHE_VERSION = 2
_SEEDS, _PSI = (0, 1, 2, 3), 0.7
_GREY_LEVELS = 1
_POINTS = 5e-3  # of unit length; devices with short matrix products stay below, another network does not


def convert(
    src: str | os.PathLike,
    out: str | os.PathLike | None = None,
    kind: str = "auto",
    *,
    name: str | None = None,
    licence: str | None = None,
    dtype: str = "float32",
    classes: int | Iterable[int] | None = None,
) -> Path:
    """Convert a checkpoint file to a weights folder; returns the folder, ported_weights/<name> where `out` is not given.

    kind: "auto", or what the file must hold: "stylegan2", "dcgan", "biggan" or "clip". name: that of the file where not given. licence: that of the
    catalogue where the file has a known name, else unknown. classes: those that a conditional generator shall draw, all where not given. Raises SisError
    for a file that is damaged, hostile or of another network, and tells every array that does not fit.
    """
    path = biggan.checkpoint_in(clip_files.weights_file(Path(src)))
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}; use one of {', '.join(KINDS)}")
    if not path.is_file():
        raise UsageError(f"{path} is no file: give a .pkl, .pt, .pth, .bin, .safetensors or .h5 checkpoint")
    folder = Path(out) if out is not None else Path("ported_weights") / (name or _name_of(path))
    if folder.is_dir() and not files.is_folder(folder) and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty and no weights folder: give another --out")
    source = recognise(read_tree(path), path.stat().st_size, str(path))
    found = "clip" if source.clip is not None else source.layout if source.layout in ("dcgan", "biggan") else "stylegan2"
    if kind not in ("auto", found):
        raise UsageError(f"{path} holds a {found}, not a {kind}")
    if source.clip is not None:
        clip_files.write_folder(clip_files.read_foreign(path, source, name, licence), folder, dtype)
        return folder
    public, digest = catalogue.public_by_file(path.name), files.sha256_of(path)
    if public and public.sha256 and public.sha256 != digest:
        raise SisError(
            f"{path} is not the published {public.file} (sha256 {digest[:12]}..., published {public.sha256[:12]}...): download it again"
        )
    header = files.Folder(
        kind=found,
        name=name or (public.name if public else _name_of(path)),
        licence=licence or (public.licence if public else Info.licence),
        generator={},
        source={"file": path.name, "sha256": digest, "layout": source.layout},
    )
    _write(source, header, folder, path, dtype, classes)
    return folder


def _name_of(path: Path) -> str:
    """The stem of a checkpoint's name; that of its folder where every model has the same."""
    return clip_files.name_of(path)


def _write(source: Source, header: files.Folder, folder: Path, path: Path, dtype: str, classes: int | Iterable[int] | None) -> None:
    what = str(path)
    if source.generator is None:
        raise SisError(f"{what} holds a discriminator but no generator")
    other = None
    if source.layout == "dcgan":
        made = dcgan.convert_generator(source.generator.arrays, what)
    elif source.layout == "biggan":
        made = biggan.convert_generator(source.generator.arrays, biggan.published_settings(path), what)
    else:
        made = stylegan2.convert_generator(source.generator, source.layout, what)
        other = (
            stylegan2.convert_discriminator(source.discriminator, source.layout, f"{what} (discriminator)")
            if source.discriminator
            else None
        )
    if classes is not None:
        count = made.config.get("c_dim", made.config.get("num_classes", 0))
        made = replace(made, config={**made.config, "classes": check_classes(classes, count)})
    filled = replace(header, generator=made.config, discriminator=other.config if other else None, notes=(*source.notes, *made.notes))
    files.write_folder(folder, filled, made.arrays, other.arrays if other else None, catalogue.card(filled), dtype)


def cached(path: Path) -> Path:
    """The converted folder of a checkpoint file, made on first use and kept under SIS_JAX_CONVERTED (default ~/.cache/sis_jax)."""
    root = os.environ.get(CACHE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sis_jax")
    digest = files.sha256_of(path)
    settings = biggan.published_settings(path) if path.suffix == ".bin" else None
    if settings is not None:
        digest = hashlib.sha256(f"{digest} {json.dumps(settings, sort_keys=True)}".encode()).hexdigest()
    folder = Path(root) / "weights" / f"{digest[:24]}-{_CACHE_VERSION}"
    if not files.is_folder(folder):
        convert(path, folder, name=_name_of(path))
    return folder


def verify(path: str | os.PathLike) -> str:
    """Render four fixed seeds of a weights folder; store the digests in its config, or compare with those stored. Returns what was found.

    Pictures may differ by rounding between devices, so small averages are kept beside the digest; SisError where those differ too.
    """
    path = Path(path)
    folder = files.read_config(path)
    if folder.kind == "clip":
        return _verify_clip(path, folder)
    now = _digests(load.load_generator(path))
    before = folder.digests
    if before is None:
        files.write_config(path, replace(folder, digests=now))
        return f"stored the digests of {len(_SEEDS)} pictures"
    if before == now:
        return f"the {len(_SEEDS)} pictures are the same to the byte"
    try:
        old, new = (np.frombuffer(bytes.fromhex(d["averages"]), np.uint8).astype(int) for d in (before, now))
        worst = int(np.abs(old - new).max())
    except (KeyError, ValueError, TypeError):
        raise SisError(f'the "digests" in {path / files.CONFIG} are damaged: remove them and verify again') from None
    if worst > _GREY_LEVELS:
        raise SisError(f"{path} draws other pictures than when it was converted (averages differ by {worst} grey levels): convert it again")
    return f"the {len(_SEEDS)} pictures are the same up to rounding (averages within {worst} grey level)"


def _verify_clip(path: Path, folder: files.Folder) -> str:
    now = clip_model.fingerprint(clip_model.load_clip(path))
    if folder.digests is None:
        files.write_config(path, replace(folder, digests={"points": now.tolist()}))
        return "stored the points of one picture and one text"
    try:
        worst = float(np.abs(np.array(folder.digests["points"], np.float32) - now).max())
    except (KeyError, ValueError, TypeError):
        raise SisError(f'the "digests" in {path / files.CONFIG} are damaged: remove them and verify again') from None
    if not worst <= _POINTS:
        raise SisError(f"{path} gives other points than when it was converted (they differ by {worst:.2g}): convert it again")
    return f"the points of one picture and one text are the same (within {worst:.2g})"


def _digests(gen: Any) -> dict[str, Any]:
    pictures = to_uint8(gen.sample(_SEEDS, truncation=_PSI).images)
    n, h = len(pictures), pictures.shape[1] // 4
    averages = pictures.reshape(n, 4, h, 4, h, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    digest = hashlib.sha256(pictures.tobytes()).hexdigest()
    return {"seeds": list(_SEEDS), "truncation": _PSI, "sha256": digest, "averages": averages.tobytes().hex()}
