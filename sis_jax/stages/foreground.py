"""The clustering that a run on photos takes: its foreground stands out in the photos, too.

The sweep of `discover` looks for parts that are stable. A generator of an hour has few of them: of
standing people it took the torso (10 % of the image, people 22 %), and legs and hair were
background. So the place of each clustering's foreground begins a fit to features of the photos
(`training/photo_labels.py`), and the one whose result lies most in the middle is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from jaxtyping import Bool, UInt8

from sis_jax.checkpoints import load_backbone, load_generator
from sis_jax.data.decode import CROPS, Fit
from sis_jax.data.part_names import BACKGROUND
from sis_jax.data.photos import Photos
from sis_jax.methods.segmentation_in_style import SegmentationInStyle, candidate_layers
from sis_jax.ops.progress import progress
from sis_jax.ops.sampling import sample_seeds
from sis_jax.stages.background import at_the_sides
from sis_jax.training.photo_labels import PhotoLabels, fitted
from sis_jax.types import Generator

KS = 3, 4, 5, 6
COARSE = 16  # pixels of the coarsest feature map: clusters of finer ones alone follow colours
COMPARED, SIDE = 128, 128  # samples; pixels of the photos
QUICK = {"refine": "none", "max_points": 20_000, "n_init": 3}


def features(photos: str, fit: Fit) -> PhotoLabels:
    """Of some of the photos, framed as a generator saw them."""
    backbone = load_backbone()
    opened = Photos.open(photos, SIDE, crop=CROPS[fit], min_size=1)
    return PhotoLabels(backbone, np.asarray(opened.images[fitted(backbone, len(opened))]))


def clustering(generator: str, seed: int, photos: PhotoLabels) -> dict[str, int | str]:
    """k and layer for `discover`, as its settings."""
    gen = load_generator(generator)
    seeds, found = sample_seeds(seed, COMPARED), {}
    settings = list(product(layers(gen), KS))
    with progress(len(settings), "comparing foregrounds", "setting") as bar:
        for layer, k in settings:
            found[layer, k] = photos.standing_out(_foreground(gen, k, layer, seed, seeds))
            bar.update(1)
    layer, k = max(settings, key=found.__getitem__)
    return {"k": k, "layer": layer}


def layers(gen: Generator) -> list[str]:
    """The candidates of the sweep, of two feature maps at most, one of them `COARSE`."""
    found = [layer.split("+") for layer in candidate_layers(gen)]
    sizes = [[int(tap.split("x")[0]) for tap in taps] for taps in found]
    chosen = [
        "+".join(taps) for taps, size in zip(found, sizes) if len(taps) <= 2 and min(size) <= COARSE
    ]
    return chosen or candidate_layers(gen)


def _foreground(
    gen: Generator, k: int, layer: str, seed: int, seeds: Sequence[int]
) -> Bool[np.ndarray, "n h w"]:
    """What is no background by the rules of `discover` and of the sides."""
    fitted = SegmentationInStyle(k=k, layer=layer, **QUICK).fit(gen, seed)
    masks = np.concatenate([clusters for _, clusters, _ in fitted.label_seeds(gen, seeds)])
    return foreground(masks, [bool(c["background"]) for c in fitted.clusters])


def foreground(
    clusters: UInt8[np.ndarray, "n h w"], background: Sequence[bool]
) -> Bool[np.ndarray, "n h w"]:
    """background: whether `discover` took each cluster for it."""
    ids = np.where(background, BACKGROUND, 1 + np.arange(len(background))).astype(np.uint8)
    masks = ids[clusters]
    return ~np.isin(masks, [BACKGROUND, *at_the_sides([masks], sorted(set(ids.tolist())))])
