"""`ops/enlarge.py`: which class is ahead at a photo's own size."""

import numpy as np
import pytest

from sis_jax.ops.enlarge import enlarged, winners


def scores(h, w, k, seed=0):
    """Of regions with soft borders, as a student gives them."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(max(h // 8, 1), max(w // 8, 1), k)).astype(np.float32)
    logits = 4 * enlarged(coarse, (h, w))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "shape, size, box",
    [
        ((32, 48), (217, 331), None),
        ((32, 32), (1024, 1024), None),
        ((48, 32), (48, 32), None),
        ((32, 32), (20, 20), None),  # a photo smaller than the network sees it
        ((32, 32), (301, 150), (8.0, 0.0, 24.0, 32.0)),  # padded
        ((16, 16), (16, 900), None),
    ],
)
def test_the_winner_of_the_interpolated_scores(shape, size, box):
    given = scores(*shape, 5)
    found, expected = winners(given, size, box), enlarged(given, size, box).argmax(-1)
    assert found.shape == size and found.dtype == np.uint8
    assert (found == expected).mean() > 0.9999  # Pillow rounds between rows and columns
    assert len(np.unique(found)) > 1


def test_ties_go_to_the_first_class():
    assert not winners(np.full((16, 16, 3), 1 / 3, np.float32), (64, 64)).any()
