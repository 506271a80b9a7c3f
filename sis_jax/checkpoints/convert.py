"""A checkpoint of any known layout to a weights folder; nothing that it carries is run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sis_jax.checkpoints import catalogue, clip_files, clip_names, files, shards
from sis_jax.checkpoints.layouts import biggan, dcgan, dinov2, efficientnet, resnet, stylegan2
from sis_jax.checkpoints.sources import Source, recognise
from sis_jax.data.files import CannotWrite, disk_errors
from sis_jax.data.names import flat
from sis_jax.models.conditional import check_classes
from sis_jax.types import Info, SisError, UsageError

KINDS = ("auto", *files.KINDS)
CACHE = "SIS_JAX_CONVERTED"
_CACHE_VERSION = 2


def convert(
    src: str | os.PathLike,
    out: str | os.PathLike | None = None,
    kind: str = "auto",
    *,
    name: str | None = None,
    licence: str | None = None,
    dtype: str = "float32",
    classes: int | Iterable[int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint file to a weights folder; returns the folder (ported_weights/<name>).

    kind: "auto", or the kind that the file must hold: "stylegan2", "dcgan", "biggan", "clip" or
        "backbone". name, licence: those of the file and the catalogue where not given. classes:
        those that a conditional generator shall draw (all). overwrite: replace weights made of
        another checkpoint. Raises UsageError where `out` is no weights folder or the source's own,
        SisError for a damaged, hostile or foreign file, with every misfit. The folder is replaced
        as a whole.
    """
    given = Path(catalogue.text_of(src))
    path = biggan.checkpoint_in(clip_files.weights_file(given))
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}; use one of {', '.join(KINDS)}")
    if not path.is_file():
        raise UsageError(
            f"{path} is no file: give a .pkl, .pt, .pth, .bin, .safetensors or .h5 checkpoint"
        )
    digest = shards.sha256_of(path)
    folder = (
        Path(catalogue.text_of(out))
        if out is not None
        else Path("ported_weights") / flat(Path(name or clip_files.name_of(path)).name)
    )
    _check_out(folder, given, path, digest, overwrite)
    source = recognise(shards.read_tree(path), shards.size_of(path), str(path))
    found = clip_files.kind_of(source)
    if kind not in ("auto", found):
        raise UsageError(f"{path} holds {files.in_words(found)}, not {files.in_words(kind)}")
    catalogue.check_published(path, catalogue.public_by_file(path.name), digest)
    _write(
        source,
        folder,
        path,
        _Wishes(digest, name, licence, dtype, classes, keep_digests=not overwrite),
    )
    return folder


@dataclass(frozen=True)
class _Wishes:
    """The wanted folder. digest: the checkpoint's sha256. keep_digests: of images, as they were."""

    digest: str
    name: str | None = None
    licence: str | None = None
    dtype: str = "float32"
    classes: int | Iterable[int] | None = None
    keep_digests: bool = False


def _check_out(folder: Path, given: Path, path: Path, digest: str, overwrite: bool) -> None:
    """UsageError unless the folder may be written."""
    there, own = folder.resolve(), path.parent.resolve()
    if (
        there == own
        or there in own.parents
        or (given.is_dir() and given.resolve() in there.parents)
    ):
        raise UsageError(
            f"{folder} is the folder of the checkpoint itself, or is inside it: give another --out"
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give a folder as --out")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not files.is_ours(folder):
        raise UsageError(f"{folder} is not empty and no weights folder: give another --out")
    if overwrite:
        return
    old = files.read_config(folder)
    if old.source.get("sha256") != digest:
        raise UsageError(
            f"{folder} holds {old.name}, made of another file ({old.source.get('file', 'none')}): "
            "give another --out, or --overwrite to replace it"
        )


def _write(source: Source, folder: Path, path: Path, wishes: _Wishes) -> None:
    if source.clip is not None:
        if wishes.classes is not None:
            raise UsageError(f"{path} holds a CLIP, which has no classes: leave out --classes")
        stored = clip_files.read_foreign(path, source, wishes.name, wishes.licence)
        with files.replacing(folder) as new:
            clip_files.write_folder(stored, new, wishes.dtype)
            _keep_digests(folder, new, wishes)
        return
    header, model, other = _prepared(source, path, wishes)
    with files.replacing(folder) as new:
        files.write_folder(new, header, model, other, catalogue.card(header), wishes.dtype)
        _keep_digests(folder, new, wishes)


def _prepared(
    source: Source, path: Path, wishes: _Wishes
) -> tuple[files.Folder, files.Arrays, files.Arrays | None]:
    """The folder's config, without file digests, and the arrays of generator and discriminator."""
    if source.backbone is not None:
        return *_prepared_backbone(source, path, wishes), None
    public = catalogue.public_by_file(path.name)
    made, other = _networks(source, path, wishes.classes)
    header = files.Folder(
        kind=clip_files.kind_of(source),
        name=wishes.name or (public.name if public else clip_files.name_of(path)),
        licence=wishes.licence or (public.licence if public else Info.licence),
        generator=made.config,
        discriminator=other.config if other else None,
        source={"file": path.name, "sha256": wishes.digest, "layout": source.layout},
        notes=(*source.notes, *made.notes, *(other.notes if other else ())),
    )
    return header, made.arrays, other.arrays if other else None


def _prepared_backbone(
    source: Source, path: Path, wishes: _Wishes
) -> tuple[files.Folder, files.Arrays]:
    public = catalogue.public_by_file(path.name)
    if wishes.classes is not None:
        raise UsageError(f"{path} holds a backbone, which draws no classes: leave out --classes")
    table, arrays = _backbone(source, str(path))
    name = wishes.name or (public.name if public else clip_files.name_of(path))
    usual = catalogue.DINOV2_LICENCE if name.startswith(catalogue.DINOV2) else Info.licence
    header = files.Folder(
        kind="backbone",
        name=name,
        licence=wishes.licence or (public.licence if public else usual),
        generator={},
        source={"file": path.name, "sha256": wishes.digest, "layout": source.layout},
        notes=source.notes,
        backbone=table,
    )
    return header, arrays


def _backbone(source: Source, what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The table that `load_backbone` builds the network from, and its arrays."""
    assert source.backbone is not None
    arrays = source.backbone.arrays
    if source.layout == "transformers-dinov2":
        config, ours = dinov2.convert(arrays, what)
        return {"arch": "dinov2", **asdict(config)}, ours
    if source.layout == "torchvision-resnet":
        arch, ours = resnet.convert(arrays, what)
    else:
        arch, ours = efficientnet.convert(arrays, source.layout, what)
    return {"arch": arch}, ours


def _networks(
    source: Source, path: Path, classes: int | Iterable[int] | None
) -> tuple[stylegan2.Converted, stylegan2.Converted | None]:
    """The generator and, where there is one, the discriminator under our names."""
    what, other = str(path), None
    if source.generator is None:
        raise SisError(f"{what} holds a discriminator but no generator")
    if source.layout == "dcgan":
        made = dcgan.convert_generator(source.generator.arrays, what)
    elif source.layout == "biggan":
        made = biggan.convert_generator(
            source.generator.arrays, biggan.published_settings(path), what
        )
    else:
        made = stylegan2.convert_generator(source.generator, source.layout, what)
        if source.discriminator:
            other = stylegan2.convert_discriminator(
                source.discriminator, source.layout, f"{what} (discriminator)"
            )
    if classes is not None:
        count = made.config.get("c_dim", made.config.get("num_classes", 0))
        made = replace(made, config={**made.config, "classes": check_classes(classes, count)})
    return made, other


def _keep_digests(old: Path, new: Path, wishes: _Wishes) -> None:
    """The image digests of the folder that `new` replaces, for the same network and classes."""
    if not (wishes.keep_digests and files.is_ours(old) and (old / files.MODEL).is_file()):
        return
    before, now = files.read_config(old), files.read_config(new)
    sizes = [(place / files.MODEL).stat().st_size for place in (old, new)]
    if (before.kind, before.generator, before.clip, before.backbone) == (
        now.kind,
        now.generator,
        now.clip,
        now.backbone,
    ) and 0.8 < sizes[0] / sizes[1] < 1.25:
        files.write_config(new, replace(now, digests=before.digests))


def _cache_home() -> str:
    """XDG_CACHE_HOME or ~/.cache; the temporary folder for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return tempfile.gettempdir() if home.startswith("~") else home


def cached(path: Path, wanted: Literal["generator", "clip", "backbone"] = "generator") -> Path:
    """The converted folder of a checkpoint, kept under SIS_JAX_CONVERTED (default
    ~/.cache/sis_jax).

    UsageError where the file holds another kind. Files beside a CLIP and its name count as part of
    it.
    """
    root = os.environ.get(CACHE) or os.path.join(_cache_home(), "sis_jax")
    own = digest = shards.sha256_of(path)
    settings = biggan.published_settings(path) if path.suffix == ".bin" else None
    if settings is not None:
        digest = _joined(digest, json.dumps(settings, sort_keys=True))
    elif wanted == "clip":
        beside = [path.with_name(name) for name in clip_names.BESIDE]
        published = catalogue.clip_by_digest(own)
        digest = _joined(
            digest,
            published.name if published else path.name,
            *(f"{p.name} {files.sha256_of(p)}" for p in beside if p.is_file()),
        )
    folder = Path(root) / "weights" / f"{digest[:24]}-{_CACHE_VERSION}"
    if files.is_folder(folder):
        return folder
    _check_cache(folder)
    _write(_checked(path, wanted, own), folder, path, _Wishes(own))
    return folder


def _check_cache(folder: Path) -> None:
    """CannotWrite, before the file is read, where nothing can be kept."""
    there = next(place for place in folder.absolute().parents if place.exists())
    with disk_errors(folder):
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


Read = Callable[[str], tuple[files.Arrays, str]]  # the name of a file to (arrays, sha256)


def opened(path: Path, wanted: Literal["generator", "backbone"]) -> tuple[Path, files.Folder, Read]:
    """The weights folder at `path`, or that of a checkpoint file (in memory, where none can be
    kept): its place, its config, and what reads its arrays.
    """
    if path.is_file():
        try:
            path = cached(path, wanted)
        except CannotWrite:
            folder, arrays = _unkept(path, wanted)
            return path, folder, lambda file: (arrays[file], folder.sha256[file])
    folder = files.read_config(path)
    return path, folder, lambda file: files.read_arrays(path, folder, file)


def _unkept(
    path: Path, wanted: Literal["generator", "backbone"]
) -> tuple[files.Folder, dict[str, files.Arrays]]:
    """The config and arrays that the converted folder would hold."""
    own = shards.sha256_of(path)
    header, model, other = _prepared(_checked(path, wanted, own), path, _Wishes(own))
    arrays = {files.MODEL: model} | ({} if other is None else {files.DISCRIMINATOR: other})
    digests = {file: files.digest_of(part) for file, part in arrays.items()}
    return replace(header, sha256=digests), arrays


def _checked(path: Path, wanted: str, digest: str) -> Source:
    """The contents of a checkpoint file; UsageError where its kind is not the wanted one."""
    source = recognise(shards.read_tree(path), shards.size_of(path), str(path))
    found = clip_files.kind_of(source)
    right = files.loader(found)
    if right != f"load_{wanted}":
        asked = files.KINDS.get(wanted, "a generator")
        raise UsageError(f"{path} holds {files.in_words(found)}, not {asked}: use sis.{right}")
    if (
        source.clip is None
    ):  # a CLIP that is given by its path may be anybody's, and is nobody's licence
        catalogue.check_published(path, catalogue.public_by_file(path.name), digest)
    return source


def _joined(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
