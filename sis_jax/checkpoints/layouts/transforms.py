"""Array transforms by name: other people's orientation to ours (HWIO, [in, out], NHWC).

Each entry is (number of axes it expects or None, function).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sis_jax.types import SisError

_BINOMIAL = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


def _hwio(a: np.ndarray) -> np.ndarray:
    return a.transpose(2, 3, 1, 0)


def _rows_chw_to_hwc(a: np.ndarray) -> np.ndarray:
    """[(c 4 4), out] -> [(4 4 c), out]: the flattened 4x4 map of the discriminator."""
    if a.shape[0] % 16:
        raise SisError(f"its {a.shape[0]} inputs are not 16 positions times channels")
    return a.reshape(a.shape[0] // 16, 4, 4, a.shape[1]).transpose(1, 2, 0, 3).reshape(a.shape)


def _filter(a: np.ndarray) -> None:
    """Drop a resampling filter, but only the one that the networks here have built in."""
    total = float(a.sum())
    if a.ndim == 1 and total:
        a, total = np.outer(a, a), total * total
    if a.shape != (4, 4) or not total or np.abs(a / total - _BINOMIAL).max() > 1e-3:
        raise SisError("it is not the filter [1, 3, 3, 1], the only one supported here")


def _variance(a: np.ndarray) -> np.ndarray:
    if (a < 0).any():
        raise SisError("it holds negative variances")
    return a


def _drop(a: np.ndarray) -> None:
    return None


TRANSFORMS: dict[str, tuple[int | None, Callable[[np.ndarray], np.ndarray | None]]] = {
    "same": (None, lambda a: a),
    "drop": (None, _drop),
    "filter": (None, _filter),
    "scalar": (None, lambda a: a.reshape(()) if a.size == 1 else a),  # [1] or [] -> []
    "flat": (None, lambda a: a.reshape(-1)),
    "first": (3, lambda a: a[0] if len(a) == 1 else a),
    "variance": (1, _variance),
    "plus_one": (1, lambda a: a + np.float32(1)),
    "transpose": (2, lambda a: a.T),
    # PyTorch
    "oihw": (4, _hwio),
    "oihw_flipped": (
        4,
        lambda a: _hwio(a)[::-1, ::-1],
    ),  # up-convolutions are stored mirrored there
    "depthwise": (4, lambda a: a[:, 0].transpose(1, 2, 0) if a.shape[1] == 1 else a),
    "1oihw": (5, lambda a: _hwio(a[0])),
    "1oihw_flipped": (5, lambda a: _hwio(a[0])[::-1, ::-1]),
    "oihw_rgb": (4, lambda a: _hwio(a[:3])),
    "rgb": (1, lambda a: a[:3]),
    "chw": (3, lambda a: a.transpose(1, 2, 0)),
    "1chw": (4, lambda a: a[0].transpose(1, 2, 0)),
    "11hw": (4, lambda a: a[0, 0]),
    "1c11": (4, lambda a: a.reshape(a.shape[1]) if a.size == a.shape[1] else a),
    "linear_chw": (2, lambda a: _rows_chw_to_hwc(a.T)),
    # TensorFlow, and flaxmodels, which keeps its orientation in NHWC
    "1hwc": (4, lambda a: a[0] if len(a) == 1 else a),
    "1hw1": (4, lambda a: a[0, :, :, 0] if len(a) == 1 == a.shape[3] else a),
    "rows_chw": (2, _rows_chw_to_hwc),
}


def apply(name: str, value: np.ndarray) -> np.ndarray | None:
    """The transformed array, None where it is dropped; SisError where it does not fit."""
    rank, function = TRANSFORMS[name]
    if rank is not None and value.ndim != rank:
        raise SisError(f"it has {value.ndim} axes, expected {rank}")
    try:
        with np.errstate(all="ignore"):  # overflow is reported as a fault
            return function(value)
    except (IndexError, ValueError):  # an axis of no length
        raise SisError("it cannot be brought into our orientation") from None
