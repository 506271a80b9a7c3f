"""Weights by their name on the Hugging Face hub, "owner/model": read from the hub's cache where
they are in it, else downloaded into it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sis_jax.checkpoints import catalogue, files
from sis_jax.checkpoints.clip_files import weights_file
from sis_jax.checkpoints.shards import WEIGHTS
from sis_jax.types import UsageError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
SUFFIXES = (
    ".pt", ".pth", ".pkl", ".bin", ".safetensors", ".h5", ".npz", ".zip", ".onnx", ".tar", ".ckpt",
    ".json",
)  # fmt: skip
_SHARDED = ("model.safetensors.index.json", "model-*-of-*.safetensors")
OURS = (files.CONFIG, files.DISCRIMINATOR, files.CARD)
_OPTIONAL = (files.DISCRIMINATOR, files.CARD, "open_clip_config.json")


def is_name(text: str) -> bool:
    """True for the form owner/model, unless a file or folder of that path exists."""
    path = Path(text)
    return not path.exists() and path.suffix not in SUFFIXES and _NAME.fullmatch(text) is not None


def folder_of(text: str) -> Path | None:
    """The weights folder of a hub name; None where the text is no such name, or a path in a folder
    that is here: "runs/facs" is then a slip. UsageError where the hub does not have it.
    """
    return fetch(text) if is_name(text) and not Path(text).parent.is_dir() else None


def fetch(name: str, beside: tuple[str, ...] = OURS) -> Path:
    """A model of the hub: from the hub's own cache, or the network, in this order. A model of other
    people's is looked for here first, by the second half of its name, which says enough for them.

    beside: the files that belong to its weights. Raises UsageError, with the cure, where it is in
    none of them.
    """
    model = name.split("/")[1]
    places = [] if beside == OURS else [place / model for place in catalogue.search_folders()]
    if known := next(filter(_complete, places), None):
        return known
    folder, problem = _snapshot(name, [*beside, *WEIGHTS], offline=True)
    for weights in (*((w,) for w in WEIGHTS), _SHARDED):
        if folder is not None and _complete(folder):
            return folder
        folder, problem = _snapshot(name, [*beside, *weights], offline=False)
        if folder is None:
            break
    if folder is not None and _complete(folder):
        return folder
    wanted = ", ".join([WEIGHTS[0], *(p for p in beside if p not in _OPTIONAL)])
    here = os.environ.get(catalogue.SEARCH_PATH, "").split(os.pathsep)[0] or "ported_weights"
    into = "a folder and give its path"
    if places:
        into = (
            f"{Path(here) / model}, or give the path of a folder that holds them, or of one made "
            "by scripts/convert_weights.py"
        )
    raise UsageError(
        f"{name} is not here and was not downloaded ({problem}): download {wanted} from "
        f"https://huggingface.co/{name} into {into}"
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
    # The client raises its own errors, those of its HTTP library, and OSError.
    except Exception as error:
        text = str(error).strip()
        return None, (text.splitlines()[0].rstrip(".:")[:160] if text else type(error).__name__)
