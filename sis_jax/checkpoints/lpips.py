"""LPIPS from its published files: torchvision's VGG16 and the gains, or one file with both."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sis_jax.checkpoints.containers import read_tree
from sis_jax.checkpoints.sources import arrays_in
from sis_jax.models.lpips import BLOCKS, LPIPS
from sis_jax.types import SisError, UsageError

# "features.28.weight" (torchvision), "net.slice5.28.weight" (the LPIPS package),
# "lin4.model.1.weight" (both of its files)
_CONVOLUTION = re.compile(r"(?:.*\.)?(?:features|slice[1-5])\.(\d+)\.(weight|bias)")
_GAIN = re.compile(r"(?:.*\.)?lin([0-4])\.model\.1\.weight")
# Of the convolutions among VGG16's layers
_PLACES = (
    0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28,
)  # fmt: skip
_FILES = (
    "torchvision's vgg16-397923af.pth together with vgg.pth of the LPIPS repository "
    "(lpips/weights/v0.1), or one file that holds both"
)


def load_lpips(*paths: str | Path) -> LPIPS:
    """The network from one file or several (.pth, .pt, .safetensors); nothing in them is run.

    Raises UsageError for missing files, SisError for others; both name the expected ones.
    """
    files = [Path(p).expanduser() for p in paths]
    for file in files:
        if not file.is_file():
            raise UsageError(f"there is no file {file}: LPIPS needs {_FILES}")
    if not files:
        raise UsageError(f"no file was given: LPIPS needs {_FILES}")
    found: dict[str, np.ndarray] = {}
    for file in files:
        for name, value in arrays_in(read_tree(file), file.stat().st_size, str(file)).items():
            if m := _CONVOLUTION.fullmatch(name):
                found[f"{m[1]}.{m[2]}"] = np.asarray(value, np.float32)
            elif m := _GAIN.fullmatch(name):
                found[f"lin{m[1]}"] = np.asarray(value, np.float32).reshape(-1)
    what = " and ".join(map(str, files))
    wrong = list(_faults(found))
    if wrong:
        raise SisError(
            f"{what} {'are' if len(files) > 1 else 'is'} not LPIPS on VGG16 ({wrong[0]}, "
            f"{len(wrong)} in all): expected {_FILES}"
        )
    kernels = tuple(jnp.asarray(found[f"{i}.weight"].transpose(2, 3, 1, 0)) for i in _PLACES)
    biases = tuple(jnp.asarray(found[f"{i}.bias"]) for i in _PLACES)
    return LPIPS(kernels, biases, tuple(jnp.asarray(found[f"lin{i}"]) for i in range(len(BLOCKS))))


def _faults(found: Mapping[str, Any]) -> Iterator[str]:
    for name, shape in _shapes().items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name].shape != shape:
            yield f"{name} has the shape {list(found[name].shape)}, expected {list(shape)}"
        elif not np.isfinite(found[name]).all() or (
            name.startswith("lin") and (found[name] < 0).any()
        ):
            yield f"{name} holds numbers that are not finite, or gains below 0"


def _shapes() -> dict[str, tuple[int, ...]]:
    pairs = [pair for block in BLOCKS for pair in itertools.pairwise(block)]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (n_in, n_out) in zip(_PLACES, pairs, strict=True):
        shapes |= {f"{i}.weight": (n_out, n_in, 3, 3), f"{i}.bias": (n_out,)}
    return shapes | {f"lin{i}": (block[-1],) for i, block in enumerate(BLOCKS)}
