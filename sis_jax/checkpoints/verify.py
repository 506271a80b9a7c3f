"""Does a weights folder still draw the same images? Digests of fixed seeds, stored once."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.checkpoints import backbones, clip, files, load
from sis_jax.types import SisError, to_uint8

_SEEDS, _PSI = (0, 1, 2, 3), 0.7
_GREY_LEVELS = 1
_POINTS = (
    5e-3  # of unit length; devices with short matrix products stay below, another network does not
)


def verify(path: str | os.PathLike) -> str:
    """Render four fixed seeds and compare with the stored digests, or store them; returns a text.

    Images may differ by rounding between devices, so small averages count too; SisError where those
    differ.
    """
    path = Path(path)
    folder = files.read_config(path)
    if folder.kind == "clip":
        return _verify_clip(path, folder)
    if folder.kind == "backbone":
        now = backbones.fingerprint(backbones.load_backbone(path))
        return _compared(path, folder, now, "mean features of one image")
    now = _digests(load.load_generator(path))
    before = folder.digests
    if before is None:
        files.write_config(path, replace(folder, digests=now))
        return f"stored the digests of {len(_SEEDS)} images"
    if before == now:
        return f"the {len(_SEEDS)} images are the same to the byte"
    try:
        old, new = (
            np.frombuffer(bytes.fromhex(d["averages"]), np.uint8).astype(int) for d in (before, now)
        )
        worst = int(np.abs(old - new).max())
    except (KeyError, ValueError, TypeError):
        raise SisError(
            f'the "digests" in {path / files.CONFIG} are damaged: remove them and verify again'
        ) from None
    if worst > _GREY_LEVELS:
        raise SisError(
            f"{path} draws other images than when it was converted (averages differ by {worst} "
            "grey levels): convert it again with --overwrite"
        )
    return (
        f"the {len(_SEEDS)} images are the same up to rounding (averages within {worst} grey level)"
    )


def _verify_clip(path: Path, folder: files.Folder) -> str:
    model = clip.load_clip(path)
    if model.tokenizer.has_vocabulary:
        model.tokenizer.check()
        model.tokenize("a photo")
    texts = (
        "" if model.tokenizer.has_vocabulary else "; it has no vocabulary and takes token ids only"
    )
    return _compared(path, folder, clip.fingerprint(model), "points of one image and one text") + (
        texts
    )


def _compared(path: Path, folder: files.Folder, now: np.ndarray, what: str) -> str:
    """Store a network's points where there are none, else compare."""
    if folder.digests is None:
        files.write_config(path, replace(folder, digests={"points": now.tolist()}))
        return f"stored the {what}"
    try:
        worst = float(np.abs(np.array(folder.digests["points"], np.float32) - now).max())
    except (KeyError, ValueError, TypeError):
        raise SisError(
            f'the "digests" in {path / files.CONFIG} are damaged: remove them and verify again'
        ) from None
    if not worst <= _POINTS:
        raise SisError(
            f"{path} gives other {what} than when it was converted (they differ by {worst:.2g}): "
            "convert it again with --overwrite"
        )
    return f"the {what} are the same (within {worst:.2g})"


def _digests(gen: Any) -> dict[str, Any]:
    images = to_uint8(gen.sample(_SEEDS, truncation=_PSI).images)
    n, h = len(images), images.shape[1] // 4
    averages = images.reshape(n, 4, h, 4, h, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return {
        "seeds": list(_SEEDS),
        "truncation": _PSI,
        "sha256": digest,
        "averages": averages.tobytes().hex(),
    }
