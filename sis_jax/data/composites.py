"""Photos ready to be cut out and pasted on each other's backgrounds. No JAX.

A network that learned from clusters confuses dark hair and dark background; where the foreground of
a photo in which it is right is pasted on another background, the boundary is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from sis_jax.data.threads import in_threads

CANDIDATES = 8  # backgrounds looked at for each photo
ALIKE = 0.6  # how often the one nearest in colour is taken, otherwise any
_LEAST_BACKGROUND = 0.018  # share of the pixels that must surely be background
_BACKGROUND, _FOREGROUND = 0.1, 0.9  # probability of foreground: confident on either side
_CONTRAST, _UNCERTAIN = 0.5, 0.6  # quantiles, see `reliable`
_BAND = 0.12  # of the resolution: how near to the background foreground must be to count


@dataclass(frozen=True, eq=False)
class Layers:
    """What compositing needs of each photo.

    backgrounds: the photo without its foreground, filled from the nearest background; usable:
        whether there is enough of it. reliable: whether the foreground may be pasted elsewhere: it
        differs from the background in colour more than in half of the photos, with fewer uncertain
        pixels than in 40 % of them. background_colour, edge_colour: mean RGB, 0 to 255, of the
        background, and of the foreground next to it.
    """

    backgrounds: UInt8[np.ndarray, "n h w 3"]
    usable: Bool[np.ndarray, "n"]
    reliable: Bool[np.ndarray, "n"]
    background_colour: Float[np.ndarray, "n 3"]
    edge_colour: Float[np.ndarray, "n 3"]

    @classmethod
    def of(
        cls, photos: UInt8[np.ndarray, "n h w 3"], background: UInt8[np.ndarray, "n h w"]
    ) -> Layers:
        """From photos and the probability of background per pixel, 255 = certain."""
        import cv2  # late: takes long to import

        cv2.setNumThreads(1)

        filled = np.empty_like(photos)

        def one(i: int) -> tuple[bool, np.ndarray, np.ndarray]:
            filled[i], usable, behind, edge = _layers(photos[i], background[i])
            return usable, behind, edge

        usable, behind, edge = zip(*in_threads(one, range(len(photos))))
        behind, edge, usable = np.stack(behind), np.stack(edge), np.array(usable)
        contrast = np.linalg.norm(edge - behind, axis=1)
        doubtful = (background > 255 * _BACKGROUND) & (background < 255 * _FOREGROUND)
        uncertain = doubtful.mean((1, 2))
        reliable = usable & (contrast >= np.quantile(contrast, _CONTRAST))
        reliable &= uncertain <= np.quantile(uncertain, _UNCERTAIN)
        return cls(filled, usable, reliable, behind, edge)

    def partners(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each photo of `rows` one whose background to put behind it; some must be usable."""
        pool = np.flatnonzero(self.usable)
        candidates = pool[rng.integers(len(pool), size=(len(rows), CANDIDATES))]
        distance = np.square(
            self.background_colour[candidates] - self.edge_colour[rows][:, None]
        ).sum(-1)
        nearest = candidates[np.arange(len(rows)), distance.argmin(1)]
        return np.where(rng.random(len(rows)) < ALIKE, nearest, candidates[:, 0])


def _layers(
    photo: UInt8[np.ndarray, "h w 3"], background: UInt8[np.ndarray, "h w"]
) -> tuple[np.ndarray, bool, np.ndarray, np.ndarray]:
    import cv2  # late: takes long to import

    behind = background > 255 * (1 - _BACKGROUND)
    object_ = background < 255 * (1 - _FOREGROUND)
    usable = bool(behind.mean() >= _LEAST_BACKGROUND)
    if not behind.any():
        mean = photo.reshape(-1, 3).mean(0)
        return photo, False, mean, mean
    # For every pixel the number of the nearest one that is surely background.
    distance, nearest = cv2.distanceTransformWithLabels(
        (~behind).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    labels: np.ndarray = np.asarray(nearest).astype(np.int64)
    colours = np.zeros((int(labels.max()) + 1, 3), np.uint8)
    colours[labels[behind]] = photo[behind]
    edge = object_ & (distance < _BAND * min(behind.shape))
    edge = edge if edge.any() else object_ if object_.any() else ~behind
    edge_colour = photo[edge].mean(0) if edge.any() else photo[behind].mean(0)
    return colours[labels], usable, photo[behind].mean(0), edge_colour
