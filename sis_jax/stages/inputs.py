"""The inputs of a method: photos, masks, and the discriminator beside the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.checkpoints import load_discriminator
from sis_jax.data.blanks import IGNORE, read_blanks
from sis_jax.data.photo_files import list_source
from sis_jax.data.photos import Photos
from sis_jax.methods.base import Inputs
from sis_jax.ops.progress import say
from sis_jax.types import Generator, UsageError


def gather(settings: Any, gen: Generator, named: str | None, folder: Path | None) -> dict[str, Any]:
    """Keyword arguments for `settings.fit`: {} for a method that wants nothing but the generator.

    named: how the user named the generator, or None. folder: see `Inputs`.
    """
    wants = settings.wants
    if not wants:
        return {}
    found: dict[str, Any] = {"folder": folder}
    for name in wants:
        found |= {"photos": _photos, "discriminator": _discriminator, "annotated": _annotated}[
            name
        ](settings, gen, named)
    return {"inputs": Inputs(**found)}


def digests(settings: Any, gen: Generator, clip: str | None = None) -> dict[str, str] | str:
    """Everything the parts depend on beside the settings: generator, text model, masks, photos."""
    found: dict[str, str] = {} if clip is None else {"clip": clip}
    wants = settings.wants
    if "annotated" in wants and settings.masks:
        found["masks"] = _masks_digest(settings.masks)
    if "photos" in wants and settings.photos:
        found["photos"] = _photos_digest(settings.photos)
    return {"generator": gen.info.sha256} | found if found else gen.info.sha256


def _masks_digest(folder: str) -> str:
    """Of class ids and names, not of files: a mask that was only saved again is the same."""
    blanks = read_blanks(folder)
    known = repr((blanks.seeds, blanks.masks.shape, sorted(blanks.names.items())))
    digest = hashlib.sha256(known.encode() + blanks.masks.tobytes()).hexdigest()
    return f"{int((blanks.masks != IGNORE).sum()):,} painted pixels ({digest[:16]})"


def _photos_digest(source: str) -> str:
    """Of names and sizes, not of times, which change when a folder is copied."""
    listing = list_source(Path(source))
    rows: list[tuple[str, Any]] = []
    for name in listing.names:
        try:
            rows.append((name, listing.stamp(name)[0]))
        except OSError:
            rows.append((name, "gone"))  # a broken link; `_photos` names it and goes on
    return (
        f"{len(rows):,} photos in {listing.path.name} "
        f"({hashlib.sha256(repr(rows).encode()).hexdigest()[:16]})"
    )


def _photos(settings: Any, gen: Generator, named: str | None) -> dict[str, Any]:
    if not settings.photos:
        return {"photos": None}
    photos = Photos.open(settings.photos, settings.trains_at(gen))
    say(photos.summary())
    return {"photos": photos.images}


def _discriminator(settings: Any, gen: Generator, named: str | None) -> dict[str, Any]:
    """The one beside the generator's weights, or None."""
    try:
        return {"discriminator": load_discriminator(named)}
    except UsageError:
        return {"discriminator": None}


def _annotated(settings: Any, gen: Generator, named: str | None) -> dict[str, Any]:
    """Annotated blanks, after a check that they are images of this generator."""
    if not settings.masks:
        return {"annotated": None}
    blanks = read_blanks(settings.masks)
    theirs = blanks.generator
    if theirs.get("sha256") and gen.info.sha256 and theirs["sha256"] != gen.info.sha256:
        raise UsageError(
            f"{blanks.path} was drawn by the generator {theirs.get('name')} "
            f"({theirs['sha256'][:12]}), this one is {gen.info.name} "
            f"({gen.info.sha256[:12]}): give that generator, or blanks of this one"
        )
    if abs(blanks.truncation - settings.truncation) > 1e-9:
        raise UsageError(
            f"{blanks.path} was drawn at psi {blanks.truncation:g}, not {settings.truncation:g}: "
            f"give --truncation {blanks.truncation:g}"
        )
    if blanks.masks.shape[1] != gen.resolution:
        raise UsageError(
            f"{blanks.path} holds images of {blanks.masks.shape[1]} pixels, {gen.info.name} "
            f"draws {gen.resolution}"
        )
    _same_images(blanks, gen)
    return {
        "annotated": blanks.masks,
        "annotated_seeds": blanks.seeds,
        "annotated_names": blanks.names,
    }


def _same_images(blanks: Any, gen: Generator) -> None:
    """UsageError for seeds that stand for other images: they would spoil the features silently."""
    if blanks.images is None:
        return
    drawn = gen.sample(blanks.seeds[:4], blanks.truncation).to_uint8().astype(np.int16)
    far = np.abs(drawn - blanks.images[:4]).mean(axis=(1, 2, 3))
    if far.max() > 4:  # grey values; another processor rounds differently by a fraction of one
        raise UsageError(
            f"the image of seed {blanks.seeds[int(far.argmax())]} in {blanks.path} is not the "
            f"image that {gen.info.name} draws for it (mean difference {far.max():.0f} of 255): "
            "use the generator that drew the blanks, without --rare, and leave images/ as it is"
        )
