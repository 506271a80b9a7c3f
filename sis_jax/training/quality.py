"""How far generated images are from photos, in the features of a backbone.

The Fréchet distance is not the FID: that is defined by Inception's features of 50,000 images.
Here the features are those of a backbone of `models/backbones.py`, averaged over the image, and a
set has as many images as there are held-out photos. So numbers compare with each other for one
backbone, one resolution and one set of photos, and with `floor`, which held-out photos reach.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from sis_jax import parallel
from sis_jax.ops import metrics, plan
from sis_jax.ops.resize import resize_bilinear

LEAST = 16  # held-out photos: fewer say nothing
REFERENCE = 2000  # photos compared with, at most
SIZES = 128, 224  # pixels: smaller images are enlarged, larger ones reduced to be seen
NAMES = ("frechet", "kernel", "precision", "recall")


def spread(count: int, most: int = REFERENCE) -> np.ndarray:
    """Numbers of at most `most` of so many photos, evenly spread."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(int))


class Quality:
    """Photos with their features, so that many sets of images can be compared with them.

    backbone: of `load_backbone`; its coarsest features are used. photos: the reference, some of
        those that the generator learns from (`spread`). held_out: from `LEAST` on.
    floor: `measure` of the held-out photos.
    """

    def __init__(
        self,
        backbone: Any,
        photos: UInt8[np.ndarray, "n r r 3"],
        held_out: UInt8[np.ndarray, "m r r 3"],
    ):
        self.backbone, self.size = backbone, len(held_out)
        self.real = self._features(photos)
        self.floor = self._compare(self._features(held_out))

    def measure(self, images: UInt8[np.ndarray, "m r r 3"]) -> dict[str, float]:
        """frechet: Fréchet distance; kernel: kernel distance x 1000 (both: lower is better);
        precision, recall: of the manifolds, 0 to 1. Means over parts of the images, each as many
        as photos are held out, since such numbers depend on how many there are.
        """
        found = self._features(images)
        parts = np.array_split(found, max(1, len(found) // self.size))
        rows = [self._compare(part) for part in parts]
        return {name: float(np.mean([row[name] for row in rows])) for name in NAMES}

    def _compare(self, found: Float[np.ndarray, "m d"]) -> dict[str, float]:
        overlap = metrics.manifold_overlap(self.real, found)
        return {
            "frechet": metrics.frechet_distance(self.real, found),
            "kernel": 1000 * metrics.kernel_distance(self.real, found),
            "precision": overlap[0],
            "recall": overlap[1],
        }

    def _features(self, images: UInt8[np.ndarray, "n r r 3"]) -> Float[np.ndarray, "n d"]:
        graph, weights = nnx.split(self.backbone)
        size = int(np.clip(images.shape[1], *SIZES))
        devices = parallel.local_devices()
        rows = plan.rows_at_once(
            _pooled, (None, 0), (weights, images), devices[0].platform, graph=graph, size=size
        )[0]
        run = parallel.map_devices(_pooled, (None, 0), 0, graph=graph, size=size)
        found, step = [], rows * len(devices)
        for i in range(0, len(images), step):
            part = images[i : i + step]
            blocks = parallel.shard(part, len(devices), rows)[0]
            found.append(parallel.unshard(np.asarray(run(weights, blocks)), len(part)))
        return np.concatenate(found)


def _pooled(weights: Any, images: jax.Array, *, graph: Any, size: int) -> jax.Array:
    """Mean over the image of the coarsest features."""
    x = resize_bilinear(images.astype(np.float32) / 127.5 - 1, (size, size))
    return nnx.merge(graph, weights)(x)[-1].mean((1, 2))
