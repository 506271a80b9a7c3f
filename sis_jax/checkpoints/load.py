"""Names, folders and foreign files to generators and discriminators, and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from sis_jax.checkpoints import catalogue, clip_files, files, hub
from sis_jax.checkpoints.build import arrays_of
from sis_jax.checkpoints.convert import opened
from sis_jax.checkpoints.layouts import biggan, dcgan, furrygan, stylegan2
from sis_jax.data.photo_files import ARCHIVES, holds_photos
from sis_jax.models.biggan import BigGAN
from sis_jax.models.conditional import check_classes
from sis_jax.models.dcgan import DCGAN
from sis_jax.models.discriminator import Discriminator
from sis_jax.models.furrygan import FurryGAN
from sis_jax.models.stylegan2 import StyleGAN2
from sis_jax.types import Generator, SisError, UsageError

_KINDS = {StyleGAN2: "stylegan2", DCGAN: "dcgan", BigGAN: "biggan", FurryGAN: "furrygan"}
_CONVERT = "convert a checkpoint with scripts/convert_weights.py"


def load_generator(
    name_or_path: str | os.PathLike | None = None, classes: int | Iterable[int] | None = None
) -> Generator:
    """A generator by name, from a weights folder, or from a foreign checkpoint (converted once,
    kept).

    name_or_path: None is the default that ships, "faces64"; "owner/model" is downloaded from the
        Hugging Face hub once. classes: those that a conditional
        generator draws from, by number (default: those it was converted for, else all). Raises
        UsageError for an unknown name or a folder without a generator, SisError for damaged
        weights, NaN included.
    """
    path, folder, read = opened(_place(name_or_path), "generator")
    if folder.kind not in ("stylegan2", "dcgan", "biggan", "furrygan"):
        raise UsageError(
            f'{path} holds {files.in_words(folder.kind)}: expected "stylegan2", "dcgan", '
            f'"biggan" or "furrygan"; {_CONVERT}'
        )
    arrays, digest = read(files.MODEL)
    info = replace(folder.info(), sha256=digest)
    if folder.kind == "furrygan":
        check_classes(classes, 0)
        config = furrygan.config_of(folder.generator)
        return furrygan.build_generator(config, arrays, str(path), info)
    if folder.kind == "dcgan":
        check_classes(classes, 0)
        return dcgan.build_generator(dcgan.config_of(folder.generator), arrays, str(path), info)
    if folder.kind == "biggan":
        gen = biggan.build_generator(biggan.config_of(folder.generator), arrays, str(path), info)
    else:
        gen = stylegan2.build_generator(
            stylegan2.generator_config(folder.generator), arrays, str(path), info
        )
    return gen if classes is None else gen.with_classes(classes)


def load_discriminator(name_or_path: str | os.PathLike | None = None) -> Discriminator:
    """The discriminator beside a generator, named as in `load_generator`: images [n r r 3] in [-1,
    1] to scores [n 1], higher for real ones.
    """
    path, folder, read = opened(_place(name_or_path), "generator")
    if folder.discriminator is None:
        asked = catalogue.DEFAULT if name_or_path is None else os.fspath(name_or_path)
        raise UsageError(
            f"{asked} has no discriminator: convert a checkpoint that holds one (most published "
            ".pt files hold the generator only)"
        )
    arrays, digest = read(files.DISCRIMINATOR)
    config = stylegan2.discriminator_config(folder.discriminator)
    return stylegan2.build_discriminator(
        config, arrays, str(path), replace(folder.info(files.DISCRIMINATOR), sha256=digest)
    )


def save_generator(
    gen: StyleGAN2 | DCGAN | BigGAN | FurryGAN,
    path: str | os.PathLike,
    discriminator: Discriminator | None = None,
    *,
    card: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a generator (and its discriminator) as a weights folder; returns its path.

    card: the README.md, by default written from `gen.info`. dtype: "float32" or "float16" (half the
        size; images change by about 1 grey level).
    """
    path = Path(path)
    folder = files.Folder(
        kind=_KINDS[type(gen)],
        name=gen.info.name,
        licence=gen.info.licence,
        generator=asdict(gen.config),
        discriminator=asdict(discriminator.config) if discriminator is not None else None,
        source={"file": gen.info.source, "layout": gen.info.layout},
    )
    model = _finite(arrays_of(gen), "the generator")
    other = (
        _finite(arrays_of(discriminator), "the discriminator")
        if discriminator is not None
        else None
    )
    files.write_folder(path, folder, model, other, card or catalogue.card(folder), dtype)
    return path


def _finite(arrays: Mapping[str, np.ndarray], what: str) -> Mapping[str, np.ndarray]:
    bad = [key for key, value in arrays.items() if not np.isfinite(value).all()]
    if bad:
        raise SisError(
            f"{what} was not saved: {bad[0]} holds NaN or infinite numbers (and {len(bad) - 1} "
            "other arrays)"
        )
    return arrays


def _place(name_or_path: str | os.PathLike | None) -> Path:
    """The weights folder or checkpoint file of a generator; UsageError for a CLIP."""
    text = catalogue.DEFAULT if name_or_path is None else catalogue.text_of(name_or_path)
    name = text if text in catalogue.CLIPS else catalogue.clip_name(text)
    if name in catalogue.CLIPS and not Path(text).exists() and text not in catalogue.folders():
        raise UsageError(f"{text} is a CLIP, not a generator: use sis.load_clip")
    if text in catalogue.BACKBONES and not Path(text).exists():
        raise UsageError(f"{text} is a backbone, not a generator: use sis.load_backbone")
    hosted = None if text in catalogue.folders() else hub.folder_of(text)
    path = biggan.checkpoint_in(hosted or catalogue.find(name_or_path))
    foreign = clip_files.weights_file(path)
    if (
        path.is_dir()
        and (path / files.CONFIG).is_file()
        and foreign.is_file()
        and not files.is_ours(path)
    ):
        raise UsageError(
            f"{text} is a folder of another program, no weights folder: a CLIP is loaded with "
            f"sis.load_clip, a backbone with sis.load_backbone; {_CONVERT}"
        )
    if foreign == path and not files.is_folder(path):
        _check_is_generator(text, path)
    kind = files.read_config(path).kind if files.is_ours(path) else ""
    if kind in ("clip", "backbone"):
        raise UsageError(
            f"{text} holds {files.in_words(kind)}, not a generator: use sis.{files.loader(kind)}"
        )
    return path


def _check_is_generator(text: str, path: Path) -> None:
    """UsageError, with what to type, for a run or photos in place of a generator."""
    if (path / "run.json").is_file():
        trained = files.is_folder(path / "generator")
        cure = "give" if trained else "continue with python -m sis_jax.synthesize"
        place = f"{text}/generator" if trained else text
        raise UsageError(f"{text} is a run, expected a generator: {cure} {place}")
    if holds_photos(path):
        masks = f"python -m sis_jax.predict {catalogue.DEFAULT_STUDENT} {text} --out DIR"
        if path.is_file() and not path.name.lower().endswith(ARCHIVES):
            raise UsageError(
                f"{text} is a photo, expected a generator: {masks} gives the mask of a portrait"
            )
        raise UsageError(
            f"{text} holds photos, expected a generator: python -m sis_jax run {text} --out RUN "
            f"trains one, {masks} gives masks of portraits"
        )
