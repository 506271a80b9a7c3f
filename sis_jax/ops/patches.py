"""4-connected patches of masks: small ones given to their neighbour, or left out."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage


def without_specks(label: UInt8[np.ndarray, "h w"], share: float) -> UInt8[np.ndarray, "h w"]:
    """Patches below `share` of the image take the label of the nearest larger patch."""
    small = np.zeros(label.shape, bool)
    for value in np.unique(label):
        patches: np.ndarray = ndimage.label(label == value)[0]  # type: ignore[index,assignment]
        sizes = np.bincount(patches.ravel())
        sizes[0] = label.size
        small |= (sizes < share * label.size)[patches]
    if not small.any() or small.all():
        return label
    nearest: Any = ndimage.distance_transform_edt(
        small, return_distances=False, return_indices=True
    )
    return label[nearest[0], nearest[1]]


def large_patches(mask: Bool[np.ndarray, "h w"], share: float) -> Bool[np.ndarray, "h w"]:
    """The connected patches larger than `share` of the largest one."""
    patches: np.ndarray = ndimage.label(mask)[0]  # type: ignore[index,assignment]
    sizes = np.bincount(patches.ravel())
    sizes[0] = 0
    return (sizes > share * sizes.max())[patches]
