"""What a method needs beside the generator, read from the paths in its settings: `photos`, `masks`, and the discriminator beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sis_jax.core import cli
from sis_jax.core.types import Generator, UsageError
from sis_jax.methods import Inputs


def gather(settings: Any, gen: Generator, named: str | None, folder: Path | None) -> dict[str, Any]:
    """Keyword arguments for `settings.fit`: {} for a method that wants nothing but the generator.

    named: how the user named the generator (its weights folder holds the discriminator); None where it came as an object. folder: see `Inputs`.
    """
    wants = getattr(type(settings), "wants", ())
    if not wants:
        return {}
    found: dict[str, Any] = {"folder": folder}
    for name in wants:
        found |= {"photos": _photos, "discriminator": _discriminator}[name](settings, gen, named)
    return {"inputs": Inputs(**found)}


def _photos(settings: Any, gen: Generator, named: str | None) -> dict[str, Any]:
    from sis_jax.data.photos import Photos

    if not settings.photos:
        return {"photos": None}
    photos = Photos.open(settings.photos, gen.resolution, progress=True)
    cli.say(photos.summary())
    return {"photos": photos.images}


def _discriminator(settings: Any, gen: Generator, named: str | None) -> dict[str, Any]:
    """The one beside the generator's weights, None where there is none: then the method says what it does without."""
    from sis_jax.weights import load_discriminator

    try:
        return {"discriminator": load_discriminator(named)}
    except UsageError:
        return {"discriminator": None}
