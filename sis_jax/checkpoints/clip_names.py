"""Where a CLIP of a name is: weights here, OpenAI's published files, the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sis_jax.checkpoints import catalogue, files
from sis_jax.checkpoints.clip_files import weights_file
from sis_jax.checkpoints.shards import WEIGHTS
from sis_jax.types import UsageError, unknown_name

_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SUFFIXES = (
    ".pt", ".pth", ".pkl", ".bin", ".safetensors", ".h5", ".npz", ".zip", ".onnx", ".tar", ".ckpt",
    ".json",
)  # fmt: skip
_SHARDED = ("model.safetensors.index.json", "model-*-of-*.safetensors")
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
    return catalogue.clip_name(text) in catalogue.CLIPS or is_hub_name(text)


def is_hub_name(text: str) -> bool:
    """True for the form owner/model, unless a file or folder of that path exists."""
    return (
        not Path(text).exists()
        and Path(text).suffix not in _SUFFIXES
        and _HUB.fullmatch(text) is not None
    )


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
    if path.suffix in _SUFFIXES:
        raise UsageError(
            f"{text} is no file that exists: give the path of a CLIP checkpoint, or a name"
        )
    if _HUB.fullmatch(text):
        return hub(text)
    cure = (
        "Give one of these, a hub name (owner/model), a Hugging Face folder, a weights folder or "
        "a checkpoint file."
    )
    raise unknown_name("CLIP", text, {*known, *catalogue.CLIPS}, cure)


def hub(name: str, beside: tuple[str, ...] = BESIDE) -> Path:
    """A model of the hub: a folder here, the hub's cache, or the network; with the files beside."""
    model = name.split("/")[1]
    for place in catalogue.search_folders():
        if _complete(place / model):
            return place / model
    folder, problem = _snapshot(name, [*beside, *WEIGHTS], offline=True)
    for weights in (*((w,) for w in WEIGHTS), _SHARDED):
        if folder is not None and _complete(folder):
            return folder
        folder, problem = _snapshot(name, [*beside, *weights], offline=False)
        if folder is None:
            break
    if folder is not None and _complete(folder):
        return folder
    here = os.environ.get(catalogue.SEARCH_PATH, "").split(os.pathsep)[0] or "ported_weights"
    raise UsageError(
        f"{name} is not here and was not downloaded ({problem}): download {WEIGHTS[0]}, "
        f"{', '.join(p for p in beside if 'open' not in p)} from "
        f"https://huggingface.co/{name} into {Path(here) / model}, or give the path of a folder "
        "that holds them, "
        f"or of one made by scripts/convert_weights.py"
    )


def _complete(folder: Path) -> bool:
    return files.is_folder(folder) or weights_file(folder).is_file()


def _snapshot(name: str, patterns: list[str], offline: bool) -> tuple[Path | None, str]:
    """The hub client's folder of a model, None with the reason where it has none."""
    from huggingface_hub import snapshot_download  # late: only for the network

    try:
        return Path(
            snapshot_download(name, allow_patterns=patterns, local_files_only=offline)
        ), "it has no weights that can be read here"
    except (
        Exception
    ) as error:  # the client raises its own errors, those of its HTTP library, and OSError
        text = str(error).strip()
        return None, (text.splitlines()[0].rstrip(".:")[:160] if text else type(error).__name__)
