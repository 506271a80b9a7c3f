"""Where a CLIP of a name is: weights here, OpenAI's published files, the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from sis_jax.checkpoints import catalogue, files, hub
from sis_jax.types import UsageError, unknown_name

BESIDE = (
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "vocab.json",
    "merges.txt",
)


def is_name(text: str) -> bool:
    """True for OpenAI's names and those of the hub, unless a file or folder of that path exists."""
    if Path(text).exists():
        return False
    return catalogue.clip_name(text) in catalogue.CLIPS or hub.is_name(text)


def find(name_or_path: str | os.PathLike) -> Path:
    """The folder or file of a name or path; UsageError with the remedy.

    Names: folders in the search path, OpenAI's ("ViT-B/32" or "clip-vit-b32"), hub names
        ("owner/model").
    """
    text = catalogue.text_of(name_or_path)
    known, path = catalogue.folders(), Path(text)
    if text in known:
        return known[text]
    public = catalogue.CLIPS.get(text) or catalogue.CLIPS.get(catalogue.clip_name(text))
    if public is not None and not path.exists():
        return catalogue.public_file(public)
    if path.name in (files.MODEL, files.CONFIG) and files.is_folder(path.parent):
        return path.parent
    if text and path.exists():
        return path
    if text in catalogue.PUBLIC:
        raise UsageError(f"{text} is a generator, not a CLIP: use sis.load_generator")
    if path.suffix in hub.SUFFIXES:
        raise UsageError(
            f"{text} is no file that exists: give the path of a CLIP checkpoint, or a name"
        )
    if hub.is_name(text):
        return hub.fetch(text, BESIDE)
    catalogue.check_installed(text)
    cure = (
        "Give one of these, a hub name (owner/model), a Hugging Face folder, a weights folder or "
        "a checkpoint file."
    )
    raise unknown_name("CLIP", text, {*known, *catalogue.CLIPS}, cure)
