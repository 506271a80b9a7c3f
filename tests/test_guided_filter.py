"""The guided filter against its definition, and what it is for: borders on the photo's edges."""

from __future__ import annotations

import numpy as np
import pytest

from sis_jax.checkpoints.student import mirrored
from sis_jax.ops import guided_filter


def halves(size: int, at: int) -> np.ndarray:
    """Photo that is bright left of column `at`."""
    photo = np.where(np.arange(size)[None, :, None] < at, (200, 180, 160), (30, 40, 50))
    return np.broadcast_to(photo, (size, size, 3)).astype(np.uint8)


def two(left: np.ndarray) -> np.ndarray:
    return np.stack([left, 1 - left], -1).astype(np.float32)


def test_models_are_the_least_squares_of_every_window():
    """An interior pixel, whose windows all lie inside: the mean of their (a, b)."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
    scores = rng.random((40, 40, 2)).astype(np.float32)
    r, at, colour = 2, 20, photo / 255
    models = []
    for y in range(at - r, at + r + 1):
        for x in range(at - r, at + r + 1):
            window = np.s_[y - r : y + r + 1, x - r : x + r + 1]
            i, p = colour[window].reshape(-1, 3), scores[window].reshape(-1, 2)
            shared = (i - i.mean(0)).T @ (p - p.mean(0)) / len(i)
            a = np.linalg.solve(np.cov(i.T, bias=True) + 1e-4 * np.eye(3), shared)
            models.append(np.concatenate([a, (p.mean(0) - i.mean(0) @ a)[None]]))
    found = guided_filter._linear_models(photo, scores)[:, at, at].T
    np.testing.assert_allclose(found, np.mean(models, 0), atol=1e-5)


@pytest.mark.parametrize("size", [128, 256])
def test_a_border_moves_to_the_edge(size):
    """The scores, of 128 pixels, end two pixels beside the edge of a photo of either size."""
    scores = two(np.broadcast_to(np.arange(128)[None] < 66, (128, 128)))
    found = guided_filter.guided(halves(128, 64), scores, halves(size, size // 2))
    assert found.shape == (size, size, 2) and found.min() >= 0 and found.max() <= 1
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert np.abs((found[..., 0] > 0.5).sum(1) - size // 2).max() <= 1


def test_a_padded_square_gives_the_photo_its_part():
    """A photo half as high as wide, seen in the middle of a square."""
    seen = np.zeros((64, 64, 3), np.uint8)
    photo = halves(128, 64)[:64]
    seen[16:48] = photo[::2, ::2]
    scores = two(np.broadcast_to(np.arange(64)[None] < 32, (64, 64)))
    found = guided_filter.guided(seen, scores, photo, (0, 16, 64, 48))
    assert found.shape == (64, 128, 2)
    assert ((found[..., 0] > 0.5) == (np.arange(128) < 64)).mean() > 0.97


def test_an_even_photo_keeps_the_scores():
    rng = np.random.default_rng(0)
    scores = two(rng.random((8, 8)).repeat(16, 0).repeat(16, 1))
    even = np.full((128, 128, 3), 90, np.uint8)
    found = guided_filter.guided(even, scores, even)
    assert np.corrcoef(found[..., 0].ravel(), scores[..., 0].ravel())[0, 1] > 0.8


def test_left_and_right_swap_in_the_mirror():
    names = ("background", "left hand", "hat", "right hand")
    assert mirrored([{"name": n} for n in names]) == (0, 3, 2, 1)
    assert mirrored([{"name": "hair"}, {"name": "bright"}]) == ()
